"""Files of tensors: safetensors and PyTorch's .pth, opened lazily. Knows files and bytes, no tensor's name."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shape = tuple[int, ...]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_JSON_BYTES = 64 << 20  # of a config or an index; a real one has kilobytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, or one in memory: what is known without its data, and the data on `read()`."""

    name: str
    dtype: torch.dtype
    shape: Shape
    read: Callable[[], Tensor]
    """Memory-mapped where the file allows it."""
    file: Path
    offset: int | None = None
    """Where in `file` its bytes start, in order and without gaps; None if they are not there as such."""

    @classmethod
    def in_memory(
        cls, name: str, make: Callable[[], Tensor], shape: Shape, dtype: torch.dtype, file: Path | None = None
    ) -> StoredTensor:
        """A tensor that no file holds as it is, made when it is read; `file`: whose tensor it was made of."""
        return cls(name, dtype, shape, make, file or Path())


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file, and the metadata in it."""

    tensors: list[StoredTensor]
    metadata: dict[str, str]


def open_file(file: Path) -> TensorFile:
    """Open a .safetensors, .pth or .pt file. Raises ValueError, in one sentence, if it is damaged or something else."""
    openers = {".safetensors": _open_safetensors, ".pth": _open_pth, ".pt": _open_pth}
    if file.suffix not in openers:
        raise ValueError(f"{file}: expected a folder or a file of type {', '.join(openers)}")
    opened = openers[file.suffix](file)
    for tensor in opened.tensors:
        if tensor.dtype not in DTYPES.values():
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise ValueError(f"{file}: tensor {tensor.name!r} is {tensor.dtype}, expected one of {expected}")
    return opened


def _open_safetensors(file: Path) -> TensorFile:
    try:
        handle = safe_open(file, framework="pt")  # checks header, offsets and size
        metadata = handle.metadata() or {}
        header, start = _header(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: {_not_whole(file, 'safetensors', error)}: download it again") from error
    tensors = []
    for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
        entry = header[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{file}: tensor {name!r} is {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        offset = start + entry["data_offsets"][0]

        def read(name: str = name) -> Tensor:
            return handle.get_tensor(name)

        tensors.append(StoredTensor(name, dtype, tuple(entry["shape"]), read, file, offset))
    return TensorFile(tensors, metadata)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The parsed header of a safetensors file, and where the data starts."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return json.loads(f.read(size)), 8 + size


def _open_pth(file: Path) -> TensorFile:
    """A .pth file, without running any code in it: torch.load with weights_only and mmap."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: holds Python objects beyond tensors, which are not loaded since they could run code: "
            "save its state dict by itself"
        ) from error
    except Exception as error:  # torch.load raises what its many readers raise
        raise ValueError(f"{file}: {_not_whole(file, 'PyTorch', error)}: download it again") from error
    tensors = _backbone(content)
    if not tensors:
        raise ValueError(f"{file}: no tensors in it (it holds a {type(content).__name__}): expected a state dict")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{file}: tensor {name!r} is sparse or quantized, expected a plain one")
    offsets = _record_offsets(file, tensors)

    def stored(name: str, tensor: Tensor) -> StoredTensor:
        return StoredTensor(name, tensor.dtype, tuple(tensor.shape), lambda: tensor, file, offsets.get(name))

    return TensorFile([stored(name, tensor) for name, tensor in tensors.items()], {})


# Where training code keeps the weights to use, best first.
_NESTED = ("teacher", "model_ema", "ema", "model", "state_dict", "student", "backbone")


def _backbone(content: Any) -> dict[str, Tensor]:
    """The state dict in a training checkpoint: nested dictionaries opened, other entries left."""
    if not isinstance(content, Mapping):
        return {}
    for key in _NESTED:
        if isinstance(content.get(key), Mapping) and (inner := _backbone(content[key])):
            return inner
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _record_offsets(file: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Where the bytes of each contiguous memory-mapped tensor start in the file; nothing where that can't be told.

    All storages lie in one mapping of the file: one place gives the others, and all must be the archive's records.
    """
    if not zipfile.is_zipfile(file):
        return {}
    with zipfile.ZipFile(file) as archive, file.open("rb") as f:
        records = {record_offset(f, info) for info in archive.infolist() if info.file_size}
        data = [record_offset(f, i) for i in archive.infolist() if i.file_size and "/data/" in i.filename]
    pointers = {name: t.untyped_storage().data_ptr() for name, t in tensors.items() if t.numel()}
    if not pointers or not data:
        return {}
    for base in {min(pointers.values()) - start for start in sorted(data)[:64]}:
        if all(pointer - base in records for pointer in pointers.values()):
            return {
                name: pointer - base + int(tensors[name].storage_offset()) * tensors[name].element_size()
                for name, pointer in pointers.items()
                if tensors[name].is_contiguous()
            }
    return {}


def record_offset(f: Any, info: zipfile.ZipInfo) -> int:
    """Where an uncompressed member of an archive starts: after its local header of 30 bytes, name and extra field."""
    f.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", f.read(4))
    return info.header_offset + 30 + name + extra


def read_into(file: Any, buffer: memoryview) -> None:
    """Fill the buffer from an unbuffered file. Raises OSError if it ends before."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise OSError(f"{file.name}: ended early: was it changed meanwhile?")
        buffer = buffer[count:]


def _not_whole(file: Path, kind: str, error: Exception) -> str:
    with file.open("rb") as f:
        if f.read(32).startswith(b"version https://git-lfs"):
            return "a git-lfs pointer, not the weights"
    return f"not a whole {kind} file ({' '.join(str(error).split())[:200]})"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError if the file holds anything else, or far more than a config or an index does."""
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{file}: {size} bytes, expected a JSON file of at most {MAX_JSON_BYTES}: download it again")
    try:
        return parse_json_object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}: download it again") from error


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """The object that the text spells. Raises ValueError if it is anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a JSON object")
    return content


def checkpoint_files(folder: Path) -> list[Path]:
    """The weights in a folder: the shards that an index lists, model.safetensors, the only .pth, or nothing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _shards(index)
    single = folder / "model.safetensors"
    if single.is_symlink() and not single.exists():
        raise ValueError(f"{single}: a link to a file that is gone: download it again")
    if single.is_file():
        return [single]
    pth = sorted(p for p in folder.iterdir() if p.suffix in (".pth", ".pt") and p.is_file()) if folder.is_dir() else []
    return pth if len(pth) == 1 else []


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map in it: download it again")
    folder = index.parent.resolve()
    # the hub's cache keeps the files of a snapshot as links into the repository's own folder
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index}: shard {name!r} is not the name of a file in this folder")
        shard = index.parent / name
        if not shard.is_file():
            raise ValueError(f"{index}: shard {name!r} is missing from the folder: download it")
        if not shard.resolve().is_relative_to(home):
            raise ValueError(f"{index}: shard {name!r} is a link out of the folder: put the file itself there")
    return [index.parent / name for name in dict.fromkeys(weight_map.values())]
