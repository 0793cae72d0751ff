"""Checkpoints: open any supported one lazily, check it against its config, hand out the model's tensors one by one."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import hub
from .config import MODEL_TYPE, DINOv3Config
from .layouts import LITE, Layout, Shape, detect, lite_shapes

LITE_FILE = "dinov3_lite.safetensors"
LITE_VERSION = "1"
NOTE_KEY = "dinov3_lite_note"
ONE_MODEL = "weights and config must be of one model"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What enters the residual stream directly: in released models that stream leaves float16's range.
FLOAT32_UNDER_HALF = ("cls_token", "register_tokens", "mask_token")


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of weights in `dtype` holds the tensor of that name."""
    if name == "rope_embed.periods" or (name in FLOAT32_UNDER_HALF and dtype == torch.float16):
        return torch.float32
    return dtype


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what its header says, and the memory-mapped data on `read()`."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: Shape
    handle: Any

    def read(self) -> Tensor:
        return self.handle.get_tensor(self.name)


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
    note: str
    """A word of the checkpoint's maker on the weights, as the sample's "made, not trained"; mostly empty."""
    sources: dict[str, list[StoredTensor]]
    """For each of the model's tensors that is stored: the tensors that make it up, along the first axis."""

    def names(self) -> list[str]:
        """The model's tensors, in the order of the model."""
        return list(lite_shapes(self.config))

    def parts(self, name: str) -> list[Tensor]:
        """The tensors whose concatenation along the first axis is the model's tensor `name`, without a copy."""
        if name in self.layout.computed:
            return [self.layout.computed[name](self.config)]
        return [stored.read() for stored in self.sources[name]]

    def tensor(self, name: str) -> Tensor:
        """The model's tensor `name`: memory-mapped where the layout stores it whole."""
        parts = self.parts(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights.

        Raises ValueError if they have several, apart from the tensors that are kept in float32 on purpose.
        """
        weight = self.sources["patch_embed.proj.weight"][0]
        for name, parts in self.sources.items():
            for stored in parts:
                if stored.dtype not in (weight.dtype, storage_dtype(name, weight.dtype)):
                    raise ValueError(
                        f"{stored.file}: tensor {stored.name!r} is {stored.dtype} "
                        f"but {weight.name!r} is {weight.dtype}: say which dtype you want"
                    )
        return weight.dtype

    def digest(self, dtype: torch.dtype | None = None) -> str:
        """A SHA-256 over samples of every stored tensor, as cast to `dtype`: equal for equal weights in any layout.

        Both ends of each tensor are hashed, not all of it: loading stays instant and unused pages stay on disk.
        """
        sha = hashlib.sha256()
        shapes = lite_shapes(self.config)
        for name in self.names():
            if name == "rope_embed.periods":
                continue  # not stored in every layout
            parts = self.parts(name)
            chunks = [chunk for part in parts for chunk in part.chunk(shapes[name][1] // len(parts))]
            for chunk in chunks:
                data = chunk.reshape(-1)
                for end in (data[:64], data[-64:]):
                    sampled = end if dtype is None else end.to(storage_dtype(name, dtype))
                    sha.update(sampled.view(torch.uint8).numpy().data)
        return sha.hexdigest()

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
    """Open a checkpoint folder, a converted file, or a hub id, and check names, shapes and dtypes; read no data yet.

    Raises FileNotFoundError or ValueError, in one sentence that names the file and the tensor.
    """
    path = locate(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    if path.is_dir() and (path / LITE_FILE).is_file():
        converted = open_source(path / LITE_FILE)
        if weight_files(path):
            _check_current(converted, open_source(path))
        return converted
    return open_source(path)


def open_source(path: Path) -> Checkpoint:
    """Like `open_checkpoint` for a local path, but of a folder the weights it came with, not their converted copy."""
    files = [path] if path.is_file() else weight_files(path)
    if not files:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{path}: no model.safetensors, model.safetensors.index.json or {LITE_FILE} in this folder "
            f"(it holds {found})"
        )
    return _open(path, files)


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local file or folder that `source` names, downloaded first if it is a hub id."""
    path = Path(source)
    if path.exists():
        return path
    if hub.is_hub_id(os.fspath(source)):
        return hub.download(
            os.fspath(source), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
    raise FileNotFoundError(f"{source}: no such file or folder, and no hub id (owner/name) either")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder in transformers' layout: one, or the shards that its index lists, or none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: no weight_map in it: download it again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index}: shard {name!r} is not a file name in this folder")
            if not (folder / name).is_file():
                raise ValueError(f"{index}: shard {name!r} is missing from the folder: download it")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def read_preprocessing(path: Path) -> dict[str, Any] | None:
    """The parsed preprocessor_config.json of a checkpoint folder, or the copy of it in a converted file."""
    file = path / "preprocessor_config.json" if path.is_dir() else path.with_name("preprocessor_config.json")
    converted = path / LITE_FILE if path.is_dir() else path
    if converted.is_file() and not (path.is_dir() and file.is_file()):
        metadata = _open_file(converted)[1]
        if "preprocessing" in metadata:
            return json.loads(metadata["preprocessing"])
        if "dinov3_lite" in metadata:
            return None
    return read_json(file) if file.is_file() else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError if the file holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a JSON object: download it again")
    return content


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


def _open(path: Path, files: list[Path]) -> Checkpoint:
    stored: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, metadata = _open_file(file)
        for tensor in tensors:
            name = tensor.name.removeprefix("model.") if tensor.name.startswith("model.layer.") else tensor.name
            if name in stored:
                raise ValueError(f"{file}: tensor {tensor.name!r} is also in {stored[name].file.name}: remove one")
            stored[name] = tensor

    if "dinov3_lite" in metadata:
        return _open_lite(files[0], stored, metadata)
    config_file = files[0].parent / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{config_file}: missing: a checkpoint in this layout needs the config.json it came with")
    content = read_json(config_file)
    if "model_type" not in content:
        raise ValueError(f"{config_file}: no model_type in it, expected {MODEL_TYPE!r}: this is no model's config.json")
    config = _config_from(config_file, content)
    layout = _detect(files[0], stored)
    sources = _match(files[0], layout, config, stored)
    preprocessing = files[0].parent / "preprocessor_config.json"
    return Checkpoint(
        path=path,
        layout=layout,
        config=config,
        preprocessing=read_json(preprocessing) if preprocessing.is_file() else None,
        metadata={},
        note=str(content.get(NOTE_KEY, "")),
        sources=sources,
    )


def _open_lite(file: Path, stored: dict[str, StoredTensor], metadata: dict[str, str]) -> Checkpoint:
    if metadata["dinov3_lite"] != LITE_VERSION:
        raise ValueError(
            f"{file}: converted file of version {metadata['dinov3_lite']}, "
            f"this release reads {LITE_VERSION}: convert again"
        )
    try:
        content = json.loads(metadata["config"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: its metadata holds no config: convert again") from error
    config = _config_from(file, content)
    opened = Checkpoint(
        path=file,
        layout=LITE,
        config=config,
        preprocessing=json.loads(metadata["preprocessing"]) if "preprocessing" in metadata else None,
        metadata=metadata,
        note=metadata.get("note", ""),
        sources=_match(file, LITE, config, stored),
    )
    if opened.digest() != metadata.get("digest"):
        raise ValueError(f"{file}: its tensors are not those it was written with (another digest): convert again")
    return opened


def _open_file(file: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file."""
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a folder or a .safetensors file")
    try:
        handle = safe_open(file, framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - the handle is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as f:
            lfs = f.read(32).startswith(b"version https://git-lfs")
        what = "a git-lfs pointer, not the weights" if lfs else f"not a whole safetensors file ({error})"
        raise ValueError(f"{file}: {what}: download it again") from error
    tensors = []
    for name, view in slices.items():
        if view.get_dtype() not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r} is {view.get_dtype()}, expected one of {', '.join(DTYPES)}")
        tensors.append(StoredTensor(file, name, DTYPES[view.get_dtype()], tuple(view.get_shape()), handle))
    return tensors, handle.metadata() or {}


def _config_from(file: Path, content: dict[str, Any]) -> DINOv3Config:
    try:
        return DINOv3Config.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _detect(file: Path, stored: dict[str, StoredTensor]) -> Layout:
    try:
        layout = detect(stored)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if layout is LITE:
        raise ValueError(f"{file}: a converted file whose metadata is lost: convert it again from its source")
    return layout


def _match(
    file: Path, layout: Layout, config: DINOv3Config, stored: dict[str, StoredTensor]
) -> dict[str, list[StoredTensor]]:
    """The stored tensors behind each of the model's, after checking that none is missing, left over or misshapen."""
    sources = layout.sources(config)
    expected = dict(source for parts in sources.values() for source in parts)
    the_config = f"the config ({config.name})"
    if missing := expected.keys() - stored.keys():
        raise ValueError(f"{file}: lacks {_first(missing)}, which {the_config} calls for: {ONE_MODEL}")
    if extra := stored.keys() - expected.keys():
        raise ValueError(f"{file}: holds {_first(extra)}, which {the_config} has no place for: {ONE_MODEL}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{stored[name].file}: tensor {name!r} has shape {stored[name].shape}, "
                f"but {the_config} calls for {shape}: {ONE_MODEL}"
            )
    return {ours: [stored[name] for name, _ in parts] for ours, parts in sources.items()}


def _first(names: set[str]) -> str:
    first = f"tensor {min(names)!r}"
    return first if len(names) == 1 else f"{first} (and {len(names) - 1} more)"


def _check_current(converted: Checkpoint, source: Checkpoint) -> None:
    """A converted file beside its source must come from it: stale weights would be loaded silently."""
    if converted.metadata.get("source_digest") != source.digest():
        raise ValueError(
            f"{converted.path}: was converted from other weights than those beside it: "
            "run `python -m convert --force` on the folder, or load the file by its own path"
        )
