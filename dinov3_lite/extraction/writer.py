"""Files of a shard as they are written: counted, hashed, growing by rows."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..checkpoint.files import whole_files


def write_whole(path: Path, data: bytes) -> None:
    """A small file, at once."""
    with whole_files() as files, files.create(path) as file:
        file.write(data)


class Hashed:
    """Bytes on their way to a file, counted and hashed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.sha.update(data)
        self.bytes += len(data)

    def summary(self) -> dict[str, Any]:
        """What a marker keeps of the file."""
        return {"bytes": self.bytes, "sha256": self.sha.hexdigest()}


class Rows(Hashed):
    """A .npy file that grows by rows. Its header names as many as are expected, and is corrected at the end."""

    def __init__(
        self, file: IO[bytes], shape: tuple[int, ...], dtype: Any, expected: int, *, ragged: bool = False
    ) -> None:
        """shape: of a row. ragged: what is appended are pictures of several rows each."""
        super().__init__(file)
        self.shape, self.dtype, self.expected, self.ragged, self.count = shape, np.dtype(dtype), expected, ragged, 0
        self.write(self._header(expected))

    def _header(self, count: int) -> bytes:
        file = io.BytesIO()
        description = np.lib.format.dtype_to_descr(self.dtype)
        content = {"descr": description, "fortran_order": False, "shape": (count, *self.shape)}
        np.lib.format.write_array_header_1_0(file, content)  # with room for any other count
        return file.getvalue()

    def append(self, rows: Sequence[np.ndarray]) -> None:
        """rows: (n, ..) of the file's shape and dtype; ragged, n arrays of several rows each."""
        for block in rows if self.ragged or not isinstance(rows, np.ndarray) else [rows]:
            many = self.ragged or isinstance(rows, np.ndarray)
            assert block.dtype == self.dtype and block.shape[many:] == self.shape, (block.dtype, block.shape)
            if block.size:
                self.write(np.ascontiguousarray(block).data.cast("B"))
            self.count += len(block) if many else 1

    def close(self) -> None:
        """Correct the count, where some of the expected rows did not come, and the hash with it."""
        if self.count == self.expected:
            return
        self.file.seek(0)
        self.file.write(self._header(self.count))
        self.file.seek(0)
        self.sha = hashlib.sha256()
        while data := self.file.read(1 << 20):
            self.sha.update(data)
