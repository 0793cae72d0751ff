"""What a checkpoint becomes in a layout: its files as values, then written, all whole or none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FLOAT32_UNDER_HALF
from ..console import naming
from . import CONVERTED, Checkpoint, open_checkpoint
from .containers import CONTAINERS, OnBytes, OutputTensor
from .files import whole_files
from .folders import weight_files
from .layouts import LAYOUTS, STATE_DICT, reader_config
from .layouts.table import README, README_MARK, Card, Layout, numel, pattern
from .layouts.vit import storage_dtype
from .matching import match
from .spans import StoredTensor, cut, same

MAX_SHARD_SIZE = 5_000_000_000  # bytes in one file, of a layout that has shards
# what readers of folders look for: the one file of weights, shards and their index
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights to be written."""

    tensors: list[OutputTensor]
    metadata: Mapping[str, str]
    container: str
    """The suffix that names its format."""

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


Files = dict[str, WeightsFile | dict[str, Any] | str]
"""The files of a checkpoint by name, in the order of writing: a text, weights, and the content of JSON files."""


def files_of(
    opened: Checkpoint,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    max_shard_size: int | None = None,
) -> Files:
    """The files that the checkpoint is in that layout.

    dtype: of the weights; None keeps the source's. name: of the file of weights; None takes the layout's.
    max_shard_size: bytes in one file, of a layout that has shards.
    """
    card = opened.card
    if layout.mark:
        card = card._replace(
            source_layout=card.source_layout or opened.layout.name,
            source_digest=card.source_digest or opened.digest(),
            digest=opened.digest(dtype or opened.dtype),
            rope=opened.rope,
        )
    beside = layout.write_card(card)
    name = name or layout.file_name(opened.card, opened.carried)
    tensors = output_tensors(opened, layout, dtype)
    shards = _shards(tensors, max_shard_size) if layout.is_sharded and max_shard_size else [tensors]
    stem, suffix = Path(name).stem, Path(name).suffix
    names = (
        [f"{stem}-{i + 1:05}-of-{len(shards):05}{suffix}" for i in range(len(shards))] if len(shards) > 1 else [name]
    )
    files: Files = {README: beside.readme} if beside.readme else {}  # first: readers look for the last
    files |= {
        file: WeightsFile(shard, beside.metadata, layout.container) for file, shard in zip(names, shards, strict=True)
    }
    files |= beside.files
    if len(shards) > 1:
        files[f"{name}.index.json"] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard},
        }
    return files


def output_tensors(opened: Checkpoint, layout: Layout, dtype: torch.dtype | None) -> list[OutputTensor]:
    """The checkpoint's tensors as that layout has them, in `dtype` or the source's own."""
    config, table, weights_dtype = opened.config, layout.table(opened.config), dtype or opened.dtype
    result = []
    for equation in table.equations(config):
        first = equation.ours[0][0]
        runs = cut(opened.spans_of(equation), [numel(shape) for _, shape in equation.theirs])
        widened = layout.keeps_float32 or first == "rope_embed.periods"
        target = storage_dtype(first, weights_dtype) if widened else weights_dtype
        result += [
            OutputTensor(name, target, shape, run) for (name, shape), run in zip(equation.theirs, runs, strict=True)
        ]
    for name, mask in table.masks(config).items():
        span = StoredTensor.in_memory(name, mask).span()
        result.append(OutputTensor(name, weights_dtype, tuple(mask.shape), [span]))
    carried = carried_into(opened, layout)
    for name, stored in carried.items():
        result.append(OutputTensor(name, dtype or stored.dtype, stored.shape, [stored.span()]))
    for name, ours in table.copies(config).items():
        if name not in carried:
            shape = opened.tensor(ours).shape
            result.append(OutputTensor(name, weights_dtype, tuple(shape), opened.spans[ours]))
    return result


def carried_into(opened: Checkpoint, layout: Layout) -> dict[str, StoredTensor]:
    """The carried tensors that files of that layout keep, by the names they get there: our own file keeps all of them,
    another layout those that it knows.
    """
    if layout.carries:
        return {layout.carries + name: stored for name, stored in opened.carried.items()}
    known = layout.table(opened.config).carried
    return {name: opened.carried[name] for name in known if name in opened.carried}


def _shards(tensors: list[OutputTensor], max_size: int) -> list[list[OutputTensor]]:
    """The tensors in order, in files of at most `max_size` bytes where a single tensor allows it."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def losses(opened: Checkpoint, layout: Layout, dtype: torch.dtype | None) -> dict[str, str]:
    """What of this checkpoint the layout can't hold, because its readers would take another value: a sentence by name.

    dtype: of the weights; None keeps the source's, and then each of its numbers. Names are those of the model's
    tensors, with # for the block's number, and of config fields.
    """
    table = layout.table(opened.config)
    theirs = {name: equation for equation in table.equations(opened.config) for name, _ in equation.theirs}
    shapes = {name: shape for e in theirs.values() for name, shape in e.theirs}
    masks = table.masks(opened.config)
    shapes |= {name: tuple(mask.shape) for name, mask in masks.items()}

    def read(name: str) -> Tensor:
        if name in masks:
            return masks[name]
        return opened.read(opened.spans_of(theirs[name])).float().view(shapes[name])

    lost = {}
    try:
        taken = reader_config(layout, opened.card, shapes, read)
    except ValueError as error:
        taken = opened.config
        lost["config"] = f"the config: its files don't say it, and readers can't tell it from the tensors ({error})"
    if dtype is None and not layout.keeps_float32:
        lost |= _rounded(opened)
    lost |= {
        field: f"{field!r} {getattr(opened.config, field)!r}: its files don't say it, and its readers take "
        f"{getattr(taken, field)!r}"
        for field in table.family.unseen
        if getattr(taken, field) != getattr(opened.config, field)
    }
    values: dict[str, list[str]] = {}
    for ours, assumed in table.assumed.items():
        for number in table.family.numbers(ours, opened.config):
            name = ours.format(**number)
            if name in opened.spans and not torch.equal(opened.tensor(name).float(), assumed.make(taken)):
                values.setdefault(ours, []).append(name)
    for ours, names in values.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        lost[pattern(ours)] = f"{names[0]!r}{more}: {table.assumed[ours].reason}"
    return lost


def _rounded(opened: Checkpoint) -> dict[str, str]:
    """The tensors that readers of one dtype would have rounded: see `Layout.keeps_float32`."""
    narrow = opened.dtype
    wide = {name: opened.tensor(name) for name in FLOAT32_UNDER_HALF if opened.spans.get(name)}
    return {
        name: f"{name!r}: it is {tensor.dtype} among weights of {narrow}, and its readers expect one dtype: say which"
        for name, tensor in wide.items()
        if not same(tensor.to(narrow).to(tensor.dtype), tensor)
    }


def save_model(model: nn.Module, path: Path, layout_name: str, dtype: torch.dtype | None) -> Path:
    """Write a model's own weights in that layout and return the path of the checkpoint; see `save_pretrained`."""
    state = {name: _here(name, tensor) for name, tensor in model.state_dict().items()}
    stored = {name: StoredTensor.in_memory(name, tensor) for name, tensor in state.items()}
    return save_tensors(model, stored, path, layout_name, dtype)


def save_tensors(
    model: Any, stored: dict[str, StoredTensor], path: Path, layout_name: str, dtype: torch.dtype | None
) -> Path:
    """Write these tensors, which go by the names of the model's state dict and may be read one by one: see
    `save_pretrained`.
    """
    if layout_name not in LAYOUTS:
        raise ValueError(f"layout is {layout_name!r}: expected one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[layout_name]
    folder, name = destination(path, layout)
    opened = checkpoint_of(model, stored)
    if lost := losses(opened, layout, dtype):
        raise ValueError(f"the {layout.name} layout can't hold {'; '.join(lost.values())}")
    files = files_of(opened, layout, dtype=dtype, name=name, max_shard_size=MAX_SHARD_SIZE)
    leave_readme(folder, files)
    if layout.is_folder or not name:
        _check_alone(folder, layout, opened.digest(None if layout.mark else dtype or opened.dtype))
    save(folder, files, obsolete=obsolete(folder, files, layout))
    return folder if layout.is_folder else folder / next(iter(files))


def destination(path: Path, layout: Layout) -> tuple[Path, str | None]:
    """The folder that is written into, and the name of the file of weights if the path gives it.

    Raises ValueError for a layout of one file if the path is called as files of other layouts are.
    """
    if layout.is_folder or path.suffix not in CONTAINERS or path.is_dir():
        return path, None
    if path.suffix != layout.container:
        raise ValueError(
            f"{path}: a file of the {layout.name} layout ends in {layout.container}, not {path.suffix}: rename it, or "
            "name the layout that is meant"
        )
    return path.parent, path.name


def leave_readme(folder: Path, files: Files) -> None:
    """Take the model card from the files where one lies that was not written here: it stays."""
    readme = folder / README
    if readme.is_file() and README_MARK not in readme.read_text(encoding="utf-8", errors="replace"):
        files.pop(README, None)


def obsolete(folder: Path, files: Files, layout: Layout, *, side_files: bool = True) -> list[Path]:
    """Files of an earlier output that readers would take for part of this one: weights, indexes and, if asked for,
    preprocessing by the names that transformers' and our own saving give them. They go when the new files appear.
    """
    if not layout.is_folder or not folder.is_dir():
        return []
    of_weights = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name)]
    others = [folder / name for name in layout.side_files if side_files]
    return [path for path in sorted(of_weights) + others if path.name not in files and path.is_file()]


def _check_alone(folder: Path, layout: Layout, digest: str) -> None:
    """Raise ValueError if a folder that is saved into holds other weights, which loading it would take or stumble over.

    digest: of the weights to be saved.
    """
    of_folders = [file for each in LAYOUTS.values() if each.is_folder for file in each.files]
    names = [CONVERTED] if layout.is_folder else of_folders
    if others := weight_files(folder, names):
        there = open_checkpoint(others[0]) if layout.is_folder else open_checkpoint(folder, original=True)
        if digest != (there.card.source_digest or there.digest()):
            raise ValueError(f"{others[0]}: other weights lie where the model is to be saved: give another folder")


def checkpoint_of(model: Any, stored: dict[str, StoredTensor]) -> Checkpoint:
    """A model's tensors as a checkpoint. Raises ValueError if they are not those of a model of its config."""
    table = STATE_DICT.table(model.config)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    try:
        shown = table.family.infer(table, shapes, lambda name: stored[name].read())
    except (ValueError, KeyError):
        shown = model.config  # what does not fit is named below
    counts = {field: getattr(shown, field) for field in table.family.counts}
    config = replace(model.config, **counts)  # blocks and registers may have been dropped or appended
    card = (model.card or Card())._replace(config=config, digest="", source_digest="", source_layout="")
    spans = match(Path(f"the {type(model).__name__}"), table, config, stored)
    return Checkpoint(Path(), STATE_DICT, card, spans, {}, {})


def _here(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device and holds no numbers: save before a model is offloaded, or after "
            "accelerate.hooks.remove_hook_from_submodules(model)"
        )
    return tensor.detach().cpu().contiguous()


def save(folder: Path, files: Files, on_bytes: OnBytes = lambda count: None, *, obsolete: Iterable[Path] = ()) -> None:
    """Write the files into the folder: all appear, or none and what was there before stays.

    on_bytes: called with the number of bytes of tensors that were written since the last call. obsolete: files that are
    removed at the moment when the new ones appear.

    Raises OSError that names the file if one can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with whole_files() as out:
        for path in obsolete:
            out.remove(path)
        for name, content in files.items():
            with naming(folder / name), out.create(folder / name) as file:
                if isinstance(content, WeightsFile):
                    CONTAINERS[content.container].write(file, content.tensors, content.metadata, on_bytes)
                else:
                    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
                    file.write(text.encode())
