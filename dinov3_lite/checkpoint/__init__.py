"""Checkpoints: open any supported one without reading it, check it against its config, give a model its tensors.

The way of a load: `hub.locate` makes a local path of a source, `folders.weight_files` lists the files of weights in it,
`containers.read_headers` opens them, `layouts.detect` tells whose names they have, the layout's card gives the config
(or the tensors show it), `match` finds each of the model's tensors in the files, `assign` makes them the model's.
Tensors have the names of our own file; `STATE_DICT` tells which of them make up each of the model's parameters.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..pages import empty, give_back
from .containers import cast, read_headers
from .folders import SeveralFiles, check_index, read_license, weight_files
from .json_files import read_json
from .layouts import LAYOUTS, LITE, carried_names, detect, joined, model_tensors, reason_of
from .layouts.table import Beside, Card, Equation, Layout, Shape, Table, numel
from .layouts.vit import storage_dtype
from .matching import backbone, match
from .spans import Span, StoredTensor, cut, same, samples
from .words import few

# What --dtype of the command lines offers.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONVERTED = LITE.files[0]
"""The converted copy that may lie beside the weights it was made of."""
NOT_IN_EVERY_LAYOUT = "rope_embed.periods", "mask_token"


@dataclass(eq=False, repr=False)
class Checkpoint:
    """An opened checkpoint, checked to hold exactly the tensors that its config calls for."""

    path: Path
    layout: Layout
    card: Card
    """What is said of the weights; its config is never None here."""
    spans: dict[str, list[Span]]
    """For each of the model's tensors: the stored elements that make it up."""
    left_out: dict[str, str]
    """Tensors of the files that are not the model's, each with the reason."""
    carried: dict[str, StoredTensor]
    """Those of `left_out` that a layout knows, such as Meta's `local_cls_norm`, by the names it gives them: files of
    that layout, and our own, keep them."""

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.card.config

    @property
    def table(self) -> Table:
        """How its layout stores models of its family."""
        return self.layout.table(self.config)

    def check_family(self, config_class: type) -> None:
        """Raises ValueError if this is a model of another architecture, which says how that is loaded."""
        if not isinstance(self.config, config_class):
            found, wanted = self.table.family, LITE.tables[config_class].family
            raise ValueError(
                f"{self.path}: holds a {found.name} ({self.config.name}), not a {wanted.name}: load it with "
                f"{found.loader}.from_pretrained, or with dinov3_lite.load, which takes both"
            )

    def names(self) -> list[str]:
        """The model's tensors, in the order of the model."""
        return list(model_tensors(self.config))

    def tensor(self, name: str) -> Tensor:
        """The model's tensor `name`: memory-mapped where the layout stores it whole."""
        return self.read(self.spans[name]).view(model_tensors(self.config)[name][0])

    def spans_of(self, equation: Equation) -> list[Span]:
        """The stored elements of an equation's tensors, one after the other; zeros for one that the model lacks."""
        there = [span for name, _ in equation.ours for span in self.spans.get(name, ())]
        dtype = there[0].stored.dtype if there else torch.float32
        return [
            span
            for name, shape in equation.ours
            for span in self.spans.get(name)
            or [StoredTensor.in_memory(name, torch.zeros(shape, dtype=dtype, device="cpu")).span()]
        ]

    def state(self) -> dict[str, tuple[Shape, list[Span]]]:
        """The model's state dict: the shape of each of its tensors, and the stored elements that make it up."""
        state = {name: (shape, self.spans[name]) for name, (shape, _) in model_tensors(self.config).items()}
        for name, equation in joined(self.config).items():
            for ours, _ in equation.ours:
                state.pop(ours, None)
            state[name] = equation.theirs[0][1], self.spans_of(equation)
        return state

    def read(self, spans: Sequence[Span]) -> Tensor:
        """These elements one after the other, flat: memory-mapped where they are stored so, else copied.

        Of several dtypes the narrowest that holds them all; no elements in the weights'.
        """
        if len(spans) == 1:
            return spans[0].read()
        if not spans:
            return torch.empty(0, dtype=self.first.dtype, device="cpu")
        parts = [span.read() for span in spans]
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        whole = torch.cat(parts, out=empty((sum(span.size for span in spans),), dtype))
        for part in parts:
            give_back(part)
        return whole

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights.

        Raises ValueError if they have several, apart from the tensors that are kept in float32 on purpose.
        """
        for stored in self.of_other_dtypes():
            raise ValueError(
                f"{stored.file}: tensor {stored.name!r} is {stored.dtype} "
                f"but {self.first.name!r} is {self.first.dtype}: say which dtype you want (dtype=, --dtype)"
            )
        return self.first.dtype

    def of_other_dtypes(self) -> Iterator[StoredTensor]:
        """What stores weights in another dtype than the first's, and than a model of that would."""
        first, assumed = self.first.dtype, self.table.assumed
        for name, spans in self.spans.items():
            if name not in assumed and name != "rope_embed.periods":  # Meta's are bfloat16 under float32 weights
                kept = first, storage_dtype(name, first)
                yield from (span.stored for span in spans if span.stored.dtype not in kept)

    @property
    def first(self) -> StoredTensor:
        """What stores the projection of the images, or its begin."""
        return self.spans[self.table.family.weight][0].stored

    @property
    def rope(self) -> str:
        """Where the RoPE periods come from: "computed" from the config, or "stored" and kept; empty: it has none."""
        if "rope_embed.periods" not in self.spans:
            return ""
        return self.card.rope or ("computed" if "rope_embed.periods" in self.table.assumed else "stored")

    def digest(self, dtype: torch.dtype | None = None) -> str:
        """A SHA-256 over samples of every tensor, as a model in `dtype` holds it: the same for the same weights in any
        layout. None: each in its own dtype.

        Loading stays instant and most pages stay on disk. Training changes every number and so the digest; a change of
        a few by hand may go unseen.
        """
        found = [
            sample.to(storage_dtype(name, dtype or sample.dtype))
            for name, parts in self.samples.items()
            if name not in NOT_IN_EVERY_LAYOUT
            for sample in parts
        ]
        sha = hashlib.sha256()
        for _, alike in itertools.groupby(found, lambda sample: sample.dtype):
            sha.update(torch.cat(list(alike)).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    @functools.cached_property
    def samples(self) -> dict[str, list[Tensor]]:
        """A few numbers of each of the model's tensors: one sample, or one of each of those that are fused in it."""
        spans = {
            name: list(itertools.chain(*cut(self.spans[name], [numel(shape) // fused] * fused)))
            if fused > 1
            else self.spans[name]
            for name, (shape, fused) in model_tensors(self.config).items()
        }
        read = samples(itertools.chain(*spans.values()))
        return {name: list(itertools.islice(read, len(parts))) for name, parts in spans.items()}

    def state_samples(self, dtype: torch.dtype | None) -> dict[str, list[Tensor | None]]:
        """The samples by tensor of a model's state dict, part by part, in `dtype`; None for a bias that it lacks."""
        weights_dtype = dtype or self.dtype
        result: dict[str, list[Tensor | None]] = {
            name: [part.to(storage_dtype(name, weights_dtype)) for part in parts]
            for name, parts in self.samples.items()
        }
        for name, equation in joined(self.config).items():
            result[name] = [part for ours, _ in equation.ours for part in result.pop(ours, [None])]
        return result

    @property
    def weights_id(self) -> str:
        """Layout and digest, as in `transformers 3f9a1c2e`: what a log should show of the weights that ran."""
        digest = self.card.digest or self.digest()
        return f"{self.layout.name} {digest[:8]}" + (f" ({self.card.note})" if self.card.note else "")


def open_checkpoint(path: str | os.PathLike[str], *, original: bool = False, prefix: str | None = None) -> Checkpoint:
    """Open a local folder or file and check names, shapes and dtypes; of the data only samples are read.

    Of a folder with a converted copy beside its weights, the copy is opened, or with `original` the weights.
    prefix: what stands before the names of the backbone that is meant, where the files hold several (see `choose`).
    Raises FileNotFoundError or ValueError, in one sentence that names the file and the tensor; also if the copy was
    made of other weights than those beside it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return _open(path, [path], prefix)
    files, copy = weights_in(path)
    if not files and not copy:
        found = few(sorted(p.name for p in path.iterdir())) or "nothing"
        raise ValueError(
            f"{path}: no model.safetensors, pytorch_model.bin, index of shards, single .pth or {CONVERTED} in this "
            f"folder (it holds {found})"
        )
    if files and (original or not copy):
        return _open(path, files, prefix)
    converted = _open(copy[0], copy, prefix)
    if files:
        _check_current(converted, _open(path, files, prefix))
    return converted


def weights_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of weights in a folder, in the order in which layouts look for them, and the converted copy of them."""
    names = [name for layout in LAYOUTS.values() if not layout.mark for name in layout.files]
    copy = weight_files(folder, [CONVERTED])
    try:
        return weight_files(folder, list(dict.fromkeys(names))), copy
    except SeveralFiles:
        if copy:
            return [], copy
        raise


def _open(path: Path, files: list[Path], prefix: str | None) -> Checkpoint:
    """Headers -> the backbone's names -> layout -> card -> config -> match."""
    file = files[0]
    stored, metadata = read_headers(files)
    check_index(files, stored)
    try:
        stored, left_out = backbone(stored, prefix)
        layout, config_class = detect(stored, metadata)
        table = layout.tables[config_class]
        heads = {name: reason for name in stored if (reason := table.reason_against(name))}
        card = layout.read_card(_beside(file, layout, metadata))
        card = _with_config(card, path, layout, table, {name: stored[name] for name in stored if name not in heads})
        carried = carried_names(layout, table, stored)
        own = {name: tensor for name, tensor in stored.items() if name not in carried and name not in heads}
        spans = match(file, table, card.config, own)
    except ValueError as error:
        from .layouts.others import what_else  # for those alone that no layout of ours fits

        if other := what_else(stored):
            raise ValueError(f"{file}: is {other}") from error
        raise error if str(error).startswith(str(file.parent)) else ValueError(f"{file}: {error}") from error
    checkpoint = Checkpoint(
        path=path,
        layout=layout,
        card=card,
        spans=spans,
        left_out=left_out | heads | {own: reason_of(own) for own in carried.values()},
        carried={own: stored[name] for name, own in carried.items()},
    )
    if card.digest and checkpoint.digest() != card.digest:
        raise ValueError(f"{file}: its tensors are not those it was written with (another digest): convert again")
    return checkpoint


def _beside(file: Path, layout: Layout, metadata: dict[str, str]) -> Beside:
    """What lies beside the tensors: the layout says in which files, unless the file itself says it all."""
    if layout.mark in metadata:
        return Beside(metadata, weights=file)
    paths = [file.with_name(name) for name in layout.side_files]
    files = {path.name: read_json(path) for path in paths if path.is_file()}
    return Beside(metadata, files, read_license(file.parent), file)


def _with_config(card: Card, path: Path, layout: Layout, table: Table, stored: dict[str, StoredTensor]) -> Card:
    """The card with a config: the one that it says, or that the tensors show.

    What lies in the folder of a file that was named by itself decides only if it is about that file: a config.json of
    other sizes is of another model, and so is the preprocessing beside it.
    """
    if card.config is not None and layout.table(card.config) is not table:
        if path.is_dir() or layout.needs_config:
            raise ValueError(
                f"{(path if path.is_dir() else path.parent) / 'config.json'}: is of a "
                f"{layout.table(card.config).family.name}, and the tensors beside it are those of a "
                f"{table.family.name}: weights and config must be of one model"
            )
        card = card._replace(config=None, preprocessing=None, note="")
    if card.config is not None and (path.is_dir() or layout.needs_config or card.digest):
        return card
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    try:
        shown = table.family.infer(table, shapes, lambda name: stored[name].read())
    except ValueError:
        if card.config is None:
            raise
        return card  # the tensors alone don't tell: matching says whether they are of this config
    if card.config is None:
        return card._replace(config=shown)
    said, seen = (
        {n: shape for n, (shape, _) in model_tensors(c).items() if not n.endswith("bias") and n not in table.assumed}
        for c in (card.config, shown)
    )
    return card if said == seen else card._replace(config=shown, preprocessing=None, note="")


def _check_current(copy: Checkpoint, source: Checkpoint) -> None:
    """A converted file beside its source must come from it: stale weights would be loaded silently."""
    beside = [name for name in NOT_IN_EVERY_LAYOUT if name in source.spans and name not in source.table.assumed]
    pairs = [pair for name in beside for pair in zip(copy.samples[name], source.samples[name], strict=True)]
    same_beside = all(same(ours, theirs.to(ours.dtype)) for ours, theirs in pairs)
    if copy.config == source.config and copy.card.source_digest == source.digest() and same_beside:
        return
    if copy.card.source_layout == LITE.name:
        raise ValueError(f"{copy.path}: a model was saved here, beside other weights: load one of them by its own path")
    raise ValueError(
        f"{copy.path}: was converted from other weights, or another config, than those beside it: "
        "run `python -m convert --force` on the folder, or load the file by its own path"
    )


def assign(
    model: nn.Module,
    opened: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Make the checkpoint's tensors the model's parameters and buffers, one at a time; nothing keeps its initial value.

    A tensor that needs no cast, no move and no fusing stays memory-mapped. Raises ValueError if float16 can't hold a
    weight.
    """
    weights_dtype = dtype or opened.dtype
    state = {}
    for name, (shape, spans) in opened.state().items():
        tensor = opened.read(spans).view(shape)
        state[name] = cast(tensor, name, storage_dtype(name, weights_dtype)).to(device)
        if state[name] is not tensor:
            give_back(tensor)
    model.load_state_dict(state, strict=True, assign=True)
