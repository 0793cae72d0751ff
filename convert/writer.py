"""Write planned tensors to files, piece by piece, each file under its name only once all of them are whole."""

from __future__ import annotations

import errno
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from dinov3_lite.files import DTYPES, read_into, record_offset

from .plan import Entry

ALIGNMENT = 64  # bytes; the data starts on a cache line, as matrix kernels like it
STEP = 64 << 20  # bytes copied between two steps of the progress bar
BLOCK = 512 << 10  # bytes at a time where the kernel doesn't copy: they stay in the processor's cache
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OnBytes = Callable[[int], Any]


class Output:
    """The files of one conversion: temporary ones beside their final names, renamed together at the end."""

    def __init__(self) -> None:
        self.files: dict[Path, Path] = {}  # final name: temporary name, in the order of renaming

    @contextmanager
    def create(self, path: Path) -> Iterator[IO[bytes]]:
        """A new file that will be `path`, flushed to disk when the block ends."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with temporary.open("x+b", buffering=0) as file:
            self.files[path] = temporary
            yield file
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Rename all, the last one last: it is gone meanwhile, so that nobody reads a mixture of old and new."""
        if len(self.files) > 1:
            list(self.files)[-1].unlink(missing_ok=True)
        for path, temporary in self.files.items():
            os.replace(temporary, path)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        for temporary in self.files.values():
            temporary.unlink(missing_ok=True)


def write_safetensors(file: IO[bytes], entries: list[Entry], metadata: dict[str, str], on_bytes: OnBytes) -> None:
    """Eight bytes of length, a JSON header padded with spaces, the tensors' bytes (huggingface.co/docs/safetensors)."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    # wide dtypes first, so that every tensor is aligned for its own
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    for entry in entries:
        end = offset + entry.nbytes
        dtype = DTYPE_NAMES[entry.dtype]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        _write_entry(file, entry, on_bytes)


def write_pth(file: IO[bytes], entries: list[Entry], on_bytes: OnBytes) -> None:
    """PyTorch's archive: torch.save lays it out without data, which is then written in its places."""
    with torch.serialization.skip_data():
        torch.save({entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="cpu") for entry in entries}, file)
    with zipfile.ZipFile(file) as archive:
        # the i-th tensor is called data/i; in which order they lie in the archive depends on the release
        records = {Path(info.filename).name: info for info in archive.infolist() if "/data/" in info.filename}
        for i, entry in enumerate(entries):
            record = records[str(i)]
            if record.file_size != entry.nbytes:
                raise ValueError(f"torch.save reserved {record.file_size} bytes for {entry.name!r}, not {entry.nbytes}")
            file.seek(record_offset(file, record))
            _write_entry(file, entry, on_bytes)


def _write_entry(file: IO[bytes], entry: Entry, on_bytes: OnBytes) -> None:
    """The entry's bytes: copied from file to file where nothing changes, else loaded and cast a piece at a time."""
    for piece in entry.pieces:
        stored, itemsize = piece.stored, entry.dtype.itemsize
        if stored.offset is not None and stored.dtype == entry.dtype:
            _copy(stored.file, stored.offset + piece.start * itemsize, piece.size * itemsize, file, on_bytes)
        else:
            data = entry.cast(piece).view(torch.uint8).numpy().data
            _write_all(file, data)
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
                _write_all(target, buffer)
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


def _write_all(file: IO[bytes], data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
