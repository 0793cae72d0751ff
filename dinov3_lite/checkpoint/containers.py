"""The formats of files of tensors, each read lazily and written tensor by tensor: safetensors, and PyTorch's .pth."""

# Annotations are evaluated here, as in `layouts.table`.
import errno
import functools
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..pages import empty, mapped, view
from .spans import Shape, Span, StoredTensor, read_into
from .words import not_whole

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALIGNMENT = 64  # bytes; the data starts on a cache line, as matrix kernels like it
STEP = 64 << 20  # bytes copied between two calls of on_bytes
BLOCK = 512 << 10  # bytes at a time where the kernel doesn't copy: they stay in the processor's cache
OnBytes = Callable[[int], Any]
Headers = tuple[list[StoredTensor], dict[str, str]]


class OutputTensor(NamedTuple):
    """A tensor to be written: its elements are those of its spans, one after the other, cast to `dtype`."""

    name: str
    dtype: torch.dtype
    shape: Shape
    spans: list[Span]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "OutputTensor":
        """A tensor in memory, as it is."""
        return cls(name, tensor.dtype, tuple(tensor.shape), [StoredTensor.in_memory(name, tensor).span()])

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return sum(span.size for span in self.spans) * self.dtype.itemsize

    def cast(self, span: Span) -> Tensor:
        """One of its spans in its dtype, flat. Raises ValueError if float16 can't hold it."""
        return cast(span.load().reshape(-1), self.name, self.dtype)


class Container(NamedTuple):
    """A format: how the tensors and the metadata of a file are opened, and how they are written."""

    read: Callable[[Path], Headers]
    write: Callable[[IO[bytes], Sequence[OutputTensor], Mapping[str, str], OnBytes], None]


def cast(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`. Raises ValueError if a finite value leaves its range."""
    is_cast_here = tensor.dtype != dtype and tensor.device.type == "cpu"
    result = empty(tensor.shape, dtype).copy_(tensor) if is_cast_here else tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ValueError(
            f"tensor {name!r} reaches {tensor.abs().max().item():.4g}, beyond float16's 65504: use bfloat16 or float32"
        )
    return result


def read_headers(files: Sequence[Path]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a checkpoint's files by name, without their data, and the metadata in the last of them.

    Raises ValueError, in one sentence, if a file is damaged or something else, or if two hold the same tensor.
    """
    stored: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix not in CONTAINERS:
            raise ValueError(f"{file}: expected a folder or a file of type {', '.join(CONTAINERS)}")
        tensors, metadata = CONTAINERS[file.suffix].read(file)
        for tensor in tensors:
            if tensor.name in stored:
                other = stored[tensor.name].file.name
                raise ValueError(f"{file}: tensor {tensor.name!r} is also in {other}: remove one")
            stored[tensor.name] = tensor
    return stored, metadata


# ---- safetensors


def _read_safetensors(file: Path) -> Headers:
    try:
        safe_open(file, framework="np")  # checks header, offsets and size
        header, start = _header(file)
    except UnicodeEncodeError as error:
        raise ValueError(f"{file!a}: its path is no UTF-8, which safetensors needs: rename it") from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: {not_whole(file, 'safetensors', error)}") from error
    except OSError as error:  # a path or memory, nothing in the file
        raise error if error.filename else OSError(f"{file}: can't be opened: {error}") from error
    metadata = header.pop("__metadata__", None) or {}
    data = functools.cache(functools.partial(mapped, file))

    def read(stored: StoredTensor) -> Tensor:
        assert stored.offset is not None
        return view(data(), stored.dtype, stored.offset, math.prod(stored.shape)).view(stored.shape)

    tensors = []
    for name, entry in sorted(header.items()):
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            expected = ", ".join(SAFETENSORS_DTYPES)
            tensors.append(StoredTensor.unreadable(name, file, f"is {entry['dtype']}, expected one of {expected}"))
            continue
        offset = start + entry["data_offsets"][0]
        tensors.append(StoredTensor(name, dtype, tuple(entry["shape"]), read, file, offset))
    return tensors, metadata


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The parsed header of a safetensors file, and where the data starts."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return json.loads(f.read(size)), 8 + size


def _write_safetensors(
    file: IO[bytes], tensors: Sequence[OutputTensor], metadata: Mapping[str, str], on_bytes: OnBytes
) -> None:
    """Eight bytes of length, a JSON header padded with spaces, the tensors' bytes (huggingface.co/docs/safetensors)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    offset = 0
    # wide dtypes first, so that every tensor is aligned for its own
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        _write_tensor(file, tensor, on_bytes)


# ---- PyTorch's archive


def _write_pth(
    file: IO[bytes], tensors: Sequence[OutputTensor], metadata: Mapping[str, str], on_bytes: OnBytes
) -> None:
    """PyTorch's archive: torch.save lays it out without data, which is then written in its places. No metadata."""
    from .pth import record_offset

    with torch.serialization.skip_data():
        torch.save(
            {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in tensors}, file
        )
    with zipfile.ZipFile(file) as archive:
        # the i-th tensor is called data/i; in which order they lie in the archive depends on the release
        records = {Path(info.filename).name: info for info in archive.infolist() if "/data/" in info.filename}
        for i, tensor in enumerate(tensors):
            record = records[str(i)]
            if record.file_size != tensor.nbytes:
                raise ValueError(
                    f"torch.save reserved {record.file_size} bytes for {tensor.name!r}, not {tensor.nbytes}"
                )
            file.seek(record_offset(file, record))
            _write_tensor(file, tensor, on_bytes)


def _read_pth(file: Path) -> Headers:
    from .pth import open_pth  # imported where there is such a file: most have none

    return open_pth(file), {}


PTH = Container(_read_pth, _write_pth)
CONTAINERS = {
    ".safetensors": Container(_read_safetensors, _write_safetensors),
    **dict.fromkeys((".pth", ".pt", ".ckpt", ".bin"), PTH),
}


# ---- bytes of a tensor


def _write_tensor(file: IO[bytes], tensor: OutputTensor, on_bytes: OnBytes) -> None:
    """Copied from file to file where nothing changes, else loaded and cast a span at a time."""
    for span in tensor.spans:
        stored, itemsize = span.stored, tensor.dtype.itemsize
        if stored.offset is not None and stored.dtype == tensor.dtype:
            _copy(stored.file, stored.offset + span.start * itemsize, span.size * itemsize, file, on_bytes)
        else:
            data = tensor.cast(span).view(torch.uint8).numpy().data
            file.write(data)
            on_bytes(data.nbytes)


def _copy(source: Path, offset: int, count: int, target: IO[bytes], on_bytes: OnBytes) -> None:
    """Copy bytes from file to file, within the kernel where it can."""
    with source.open("rb", buffering=0) as file:
        while count:
            size = min(count, STEP)
            if not (copied := _copy_in_kernel(file, offset, size, target)):
                buffer = memoryview(bytearray(min(size, BLOCK)))
                file.seek(offset)
                read_into(file, buffer)
                target.write(buffer)
                copied = len(buffer)
            offset, count = offset + copied, count - copied
            on_bytes(copied)


def _copy_in_kernel(source: IO[bytes], offset: int, count: int, target: IO[bytes]) -> int:
    """How many bytes were copied: none where the system or these two files don't allow it."""
    if not hasattr(os, "copy_file_range"):  # Linux only
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), count, offset)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise
