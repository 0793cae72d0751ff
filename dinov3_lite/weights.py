"""Checkpoints: open any supported one lazily, check it against its config, hand out the model's tensors one by one."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hub
from .config import MODEL_TYPE, DINOv3Config
from .files import StoredTensor, checkpoint_files, open_file, parse_json_object, read_into, read_json
from .layouts import LAYOUTS, LITE, TRANSFORMERS, Layout, detect, infer_config, kind, lite_shapes, masked, numel

LITE_FILE = "dinov3_lite.safetensors"
LITE_VERSION = "1"
NOTE_KEY = "dinov3_lite_note"
CARRIED = "carried."  # what our own file calls a tensor that it keeps for another layout
KNOWN = {name: reason for layout in LAYOUTS.values() for name, reason in layout.carried.items()}
KEY_BIAS = "blocks.{i}.attn.qkv.k_bias"
ONE_MODEL = "weights and config must be of one model"

# What --dtype of the command lines offers.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What enters the residual stream directly: in released models that stream leaves float16's range.
FLOAT32_UNDER_HALF = ("cls_token", "register_tokens", "mask_token")


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of weights in `dtype` holds the tensor of that name."""
    if name == "rope_embed.periods" or (name in FLOAT32_UNDER_HALF and dtype == torch.float16):
        return torch.float32
    return dtype


@dataclass(frozen=True)
class Piece:
    """Elements start to stop of a stored tensor, in memory order."""

    stored: StoredTensor
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Piece:
        """Some of its elements."""
        return Piece(self.stored, self.start + start, self.start + stop)

    def read(self) -> Tensor:
        """The elements, (stop - start,), without a copy."""
        return self.stored.read().reshape(-1)[self.start : self.stop]

    def load(self) -> Tensor:
        """The elements in memory of their own, which goes when they do: a mapping keeps what it has touched."""
        return self._load([(self.start, self.stop)])

    def sample(self) -> Tensor:
        """64 elements at each of five places, likewise."""
        quarters = (self.size * quarter // 4 for quarter in range(4))
        starts = [self.start + offset for offset in (*quarters, max(0, self.size - 64))]
        return self._load([(start, min(start + 64, self.stop)) for start in starts])

    def _load(self, ranges: Sequence[tuple[int, int]]) -> Tensor:
        stored = self.stored
        if stored.offset is None or not self.size:
            flat = stored.read().reshape(-1)
            return flat[slice(*ranges[0])] if len(ranges) == 1 else torch.cat([flat[a:b] for a, b in ranges])
        itemsize = stored.dtype.itemsize
        data = bytearray(sum(stop - start for start, stop in ranges) * itemsize)
        rest = memoryview(data)
        with stored.file.open("rb", buffering=0) as file:
            for start, stop in ranges:
                size = (stop - start) * itemsize
                file.seek(stored.offset + start * itemsize)
                read_into(file, rest[:size])
                rest = rest[size:]
        return torch.frombuffer(data, dtype=stored.dtype)


def recut(pieces: Iterable[Piece], sizes: Sequence[int]) -> list[list[Piece]]:
    """Cut the pieces, laid one after the other, into runs of `sizes` elements."""
    runs = []
    queue = list(pieces)
    for size in sizes:
        run: list[Piece] = []
        while size:
            piece = queue.pop(0)
            taken = min(size, piece.size)
            run.append(piece.part(0, taken))
            if taken < piece.size:
                queue.insert(0, piece.part(taken, piece.size))
            size -= taken
        runs.append(run)
    return runs


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, checked to hold exactly the tensors that its config calls for."""

    path: Path
    layout: Layout
    config: DINOv3Config
    preprocessing: dict[str, Any] | None
    """The parsed preprocessor_config.json, if there is one."""
    metadata: dict[str, str]
    """What a converted file says of itself; empty for other layouts."""
    license: str
    """The name of the weights' licence, if it is known; else empty."""
    note: str
    """A word of the checkpoint's maker on the weights, as the sample's "made, not trained"; mostly empty."""
    pieces: dict[str, list[Piece]]
    """For each of the model's tensors: the stored elements that make it up."""
    left_out: list[str]
    """Tensors of the file that are not the model's, each with the reason."""
    carried: dict[str, StoredTensor]
    """Those of them that a layout knows by these names: our own file and that layout's keep them."""

    def names(self) -> list[str]:
        """The model's tensors, in the order of the model."""
        return list(lite_shapes(self.config))

    def tensor(self, name: str) -> Tensor:
        """The model's tensor `name`: memory-mapped where the layout stores it whole."""
        parts = [piece.read() for piece in self.pieces[name]]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)
        return flat.view(lite_shapes(self.config)[name][0])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights.

        Raises ValueError if they have several, apart from the tensors that are kept in float32 on purpose.
        """
        weight = self.pieces["patch_embed.proj.weight"][0].stored
        for name, pieces in self.pieces.items():
            if name in self.layout.assumed or name == "rope_embed.periods":  # Meta's are bfloat16 under float32 weights
                continue
            for stored in (piece.stored for piece in pieces):
                if stored.dtype not in (weight.dtype, storage_dtype(name, weight.dtype)):
                    raise ValueError(
                        f"{stored.file}: tensor {stored.name!r} is {stored.dtype} "
                        f"but {weight.name!r} is {weight.dtype}: say which dtype you want"
                    )
        return weight.dtype

    @property
    def rope(self) -> str:
        """Where the RoPE periods come from: "computed" from the config, or "stored" in the source and kept."""
        return self.metadata.get("rope", "computed" if "rope_embed.periods" in self.layout.assumed else "stored")

    def digest(self, dtype: torch.dtype | None = None) -> str:
        """A SHA-256 over samples of every tensor, as cast to `dtype`: the same for the same weights in any layout.

        Loading stays instant and most pages stay on disk. Training changes every number and so the digest; a change of
        a few by hand may go unseen.
        """
        sha = hashlib.sha256()
        for name, sample in self.samples:
            sample = sample if dtype is None else sample.to(storage_dtype(name, dtype))
            sha.update(sample.view(torch.uint8).numpy().data)
        return sha.hexdigest()

    @cached_property
    def samples(self) -> list[tuple[str, Tensor]]:
        """A few numbers of each tensor, of each of those that are fused in one of ours."""
        return [
            (name, piece.sample())
            for name, (shape, chunks) in lite_shapes(self.config).items()
            if name not in ("rope_embed.periods", "mask_token")  # not stored in every layout
            for piece in itertools.chain(*recut(self.pieces[name], [numel(shape) // chunks] * chunks))
        ]

    @property
    def weights_id(self) -> str:
        """Layout and digest, as in `transformers 3f9a1c2e`: what a log should show of the weights that ran."""
        digest = self.metadata.get("digest") or self.digest()
        return f"{self.layout.name} {digest[:8]}" + (f" ({self.note})" if self.note else "")


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open a checkpoint folder, a file or a hub id, and check names, shapes and dtypes; read samples of the data only.

    Raises FileNotFoundError or ValueError, in one sentence that names the file and the tensor.
    """
    path = locate(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    if path.is_dir() and (path / LITE_FILE).is_file():
        converted = open_source(path / LITE_FILE)
        if checkpoint_files(path):
            _check_current(converted, open_source(path))
        return converted
    return open_source(path)


def open_source(path: Path) -> Checkpoint:
    """Like `open_checkpoint` for a local path, but of a folder the weights it came with, not their converted copy."""
    files = [path] if path.is_file() else checkpoint_files(path)
    if not files and (path / LITE_FILE).is_file():
        files = [path / LITE_FILE]
    if not files:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{path}: no model.safetensors, model.safetensors.index.json, single .pth or {LITE_FILE} in this folder "
            f"(it holds {found})"
        )
    stored: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        opened = open_file(file)
        metadata = opened.metadata
        for tensor in opened.tensors:
            if tensor.name in stored:
                other = stored[tensor.name].file.name
                raise ValueError(f"{file}: tensor {tensor.name!r} is also in {other}: remove one")
            stored[tensor.name] = tensor
    if "dinov3_lite" in metadata:
        return _open_lite(files[0], stored, metadata)
    return _open_foreign(path, files[0], stored)


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local file or folder that `source` names, downloaded first if it is a hub id."""
    path = Path(source)
    if os.fspath(source) and path.exists():
        return path
    if hub.is_hub_id(os.fspath(source)):
        return hub.download(
            os.fspath(source), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
    raise FileNotFoundError(f"{source}: no such file or folder, and no hub id (owner/name) either")


def read_preprocessing(path: Path) -> dict[str, Any] | None:
    """The parsed preprocessor_config.json of a checkpoint folder, or the copy of it in a converted file."""
    file = path / "preprocessor_config.json" if path.is_dir() else path.with_name("preprocessor_config.json")
    if path.is_dir() and file.is_file():
        return read_json(file)
    if path.is_file() or (path / LITE_FILE).is_file() or (path.is_dir() and checkpoint_files(path)):
        return open_checkpoint(path).preprocessing
    return None


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
    for name in model.state_dict():
        tensor = opened.tensor(name)
        state[name] = cast(tensor, name, storage_dtype(name, weights_dtype)).to(device)
    model.load_state_dict(state, strict=True, assign=True)


def cast(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`. Raises ValueError if a finite value leaves its range."""
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ValueError(
            f"tensor {name!r} reaches {tensor.abs().max().item():.4g}, beyond float16's 65504: use bfloat16 or float32"
        )
    return result


def _open_lite(file: Path, stored: dict[str, StoredTensor], metadata: dict[str, str]) -> Checkpoint:
    if metadata["dinov3_lite"] != LITE_VERSION:
        raise ValueError(
            f"{file}: converted file of version {metadata['dinov3_lite']}, "
            f"this release reads {LITE_VERSION}: convert again"
        )
    try:
        config = DINOv3Config.from_dict(parse_json_object(metadata["config"]))
        preprocessing = parse_json_object(metadata["preprocessing"]) if "preprocessing" in metadata else None
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: its metadata is not what this library writes ({error}): convert again") from error
    carried = {name.removeprefix(CARRIED): tensor for name, tensor in stored.items() if name.startswith(CARRIED)}
    own = {name: tensor for name, tensor in stored.items() if not name.startswith(CARRIED)}
    opened = Checkpoint(
        path=file,
        layout=LITE,
        config=config,
        preprocessing=preprocessing,
        metadata=metadata,
        license=metadata.get("license", ""),
        note=metadata.get("note", ""),
        pieces=_match(file, LITE, config, own),
        left_out=[f"{name!r} ({KNOWN.get(name, 'unknown to this release')})" for name in sorted(carried)],
        carried=carried,
    )
    if opened.digest() != metadata.get("digest"):
        raise ValueError(f"{file}: its tensors are not those it was written with (another digest): convert again")
    return opened


def _open_foreign(path: Path, file: Path, stored: dict[str, StoredTensor]) -> Checkpoint:
    """A checkpoint of another layout: its config lies beside it, or is read off the tensors."""
    stored, left_out = _without_prefix(file, stored)
    config_file = file.parent / "config.json"
    content = read_json(config_file) if config_file.is_file() else {}
    try:
        layout = detect(stored)
        if layout is LITE:
            raise ValueError("a converted file whose metadata is lost: convert it again from its source")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if layout is TRANSFORMERS and not config_file.is_file():
        raise ValueError(f"{config_file}: missing: a checkpoint in transformers' layout needs the config it came with")
    if layout is TRANSFORMERS and "model_type" not in content:
        raise ValueError(f"{config_file}: no model_type in it, expected {MODEL_TYPE!r}: this is no model's config.json")
    try:
        if "model_type" in content:
            config = DINOv3Config.from_dict(content)
        else:
            shapes = {name: tensor.shape for name, tensor in stored.items()}
            config = infer_config(layout, shapes, lambda name: stored[name].read())
    except ValueError as error:
        raise ValueError(f"{config_file if 'model_type' in content else file}: {error}") from error
    carried = {name: stored.pop(name) for name in sorted(stored.keys() & layout.carried.keys())}
    pieces = _match(file, layout, config, stored)
    preprocessing_file = file.parent / "preprocessor_config.json"
    preprocessing = read_json(preprocessing_file) if preprocessing_file.is_file() else _timm_preprocessing(content)
    return Checkpoint(
        path=path,
        layout=layout,
        config=config,
        preprocessing=preprocessing,
        metadata={},
        license=_license(file.parent),
        note=str(content.get(NOTE_KEY, "")),
        pieces=pieces,
        left_out=left_out + [f"{name!r} ({layout.carried[name]})" for name in carried],
        carried=carried,
    )


def _without_prefix(file: Path, stored: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """The backbone's tensors under its own names, and what else the file holds.

    Training code puts `module.`, `backbone.`, `teacher.backbone.` before them, transformers `model.` before its layers.
    """
    prefixes = {
        name[: -len(anchor)]
        for name in stored
        for anchor in ("cls_token", "embeddings.cls_token")
        if ("." + name).endswith("." + anchor)
    }

    def preference(prefix: str) -> tuple[bool, bool, int]:
        blocks = sum(
            name.startswith((prefix + "blocks.", prefix + "layer.", prefix + "model.layer.")) for name in stored
        )
        return blocks > 0, "teacher" in prefix or "ema" in prefix, blocks

    prefix = max(sorted(prefixes), key=preference, default="")
    result: dict[str, StoredTensor] = {}
    left_out = []
    for name, tensor in stored.items():
        if not name.startswith(prefix):
            left_out.append(f"{name!r} (outside of {prefix!r})")
            continue
        own = name[len(prefix) :]
        own = own.removeprefix("model.") if own.startswith("model.layer.") else own
        if own in result:
            raise ValueError(f"{file}: tensor {name!r} is also there as {result[own].name!r}: remove one")
        result[own] = tensor
    return result, left_out


def _match(file: Path, layout: Layout, config: DINOv3Config, stored: dict[str, StoredTensor]) -> dict[str, list[Piece]]:
    """The pieces of each of the model's tensors.

    Raises ValueError if a tensor is missing, left over, misshapen, or not what it must be.
    """
    the_config = f"the config ({config.name})"
    equations = layout.equations(config)
    expected = {name: shape for equation in equations for name, shape in equation.theirs}
    masks = {equation.mask: equation.theirs[0][1] for equation in equations if equation.mask}
    expected |= {name: shape for name, shape in masks.items() if name in stored}
    if missing := expected.keys() - stored.keys():
        raise ValueError(f"{file}: lacks {_listed(missing)}, which {the_config} calls for: {ONE_MODEL}")
    if extra := stored.keys() - expected.keys():
        raise ValueError(f"{file}: holds {_listed(extra)}, which {the_config} has no place for: {ONE_MODEL}")
    misshapen = [name for name, shape in expected.items() if stored[name].shape != shape]
    if misshapen:
        shapes_found = ", ".join(f"{name!r} has shape {stored[name].shape}, not {expected[name]}" for name in misshapen)
        raise ValueError(f"{stored[misshapen[0]].file}: against {the_config}, tensor {shapes_found}: {ONE_MODEL}")

    shapes = lite_shapes(config)
    pieces: dict[str, list[Piece]] = {}
    for equation in equations:
        run = [Piece(_masked(file, stored, name, equation.mask), 0, numel(shape)) for name, shape in equation.theirs]
        runs = recut(run, [numel(shape) for _, shape in equation.ours])
        for (name, _), parts in zip(equation.ours, runs, strict=True):
            if name in shapes:
                pieces[name] = parts
            elif (equation.mask in stored or kind(name) != KEY_BIAS) and any(part.read().any() for part in parts):
                raise ValueError(
                    f"{file}: tensor {equation.theirs[0][0]!r} holds a {name.rsplit('.')[-1]} that is not zero, "
                    f"which {the_config} says the model lacks: {ONE_MODEL}"
                )
    for name, (shape, _) in shapes.items():
        if name not in pieces:
            make = layout.assumed[kind(name)].make
            assumed = StoredTensor.in_memory(name, lambda make=make: make(config), shape, torch.float32)  # type: ignore[misc]
            pieces[name] = [Piece(assumed, 0, numel(shape))]
    return pieces


def _masked(file: Path, stored: dict[str, StoredTensor], name: str, mask: str) -> StoredTensor:
    """The tensor times its mask, where the file has one that changes more than a key bias of zeros."""
    tensor = stored[name]
    if mask not in stored:
        return tensor
    try:
        product = masked(tensor.read(), stored[mask].read(), mask)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if torch.equal(product, tensor.read()):
        return tensor
    return StoredTensor.in_memory(name, lambda: product, tensor.shape, tensor.dtype, tensor.file)


def license_files(folder: Path) -> list[Path]:
    """The licence files in a checkpoint's folder."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.upper().startswith(("LICENSE", "LICENCE")))


def _license(folder: Path) -> str:
    """`dinov3-license` if a licence file says that it is Meta's, the file's name if it is another, or nothing."""
    for file in license_files(folder):
        return "dinov3-license" if "DINOv3" in file.read_text(encoding="utf-8", errors="replace")[:4096] else file.name
    return ""


def _timm_preprocessing(content: dict[str, Any]) -> dict[str, Any] | None:
    """What timm's config.json says of images, as a preprocessor_config.json would.

    timm resizes bicubically; the released models were trained and are evaluated by Meta with bilinear resizing.
    """
    cfg = content.get("pretrained_cfg")
    if not isinstance(cfg, dict) or not {"mean", "std"} <= cfg.keys() or not _is_triple(cfg.get("input_size")):
        return None
    size = {"height": cfg["input_size"][1], "width": cfg["input_size"][2]}
    return {"do_resize": True, "size": size, "resample": 2, "image_mean": cfg["mean"], "image_std": cfg["std"]}


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3


def _listed(names: set[str]) -> str:
    return f"tensor{'s' * (len(names) > 1)} {', '.join(repr(name) for name in sorted(names))}"


def _check_current(converted: Checkpoint, source: Checkpoint) -> None:
    """A converted file beside its source must come from it: stale weights would be loaded silently."""
    if converted.metadata.get("source_digest") != source.digest() or converted.config != source.config:
        raise ValueError(
            f"{converted.path}: was converted from other weights, or another config, than those beside it: "
            "run `python -m convert --force` on the folder, or load the file by its own path"
        )
