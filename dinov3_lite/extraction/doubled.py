"""Keys that come twice, found in bounded memory: digests of them in many files, each of which is sorted alone."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np

FILES = 64
RECORD = np.dtype([("digest", "V16"), ("number", "<u8")])


class Keys:
    """Keys in the order of the plan. Use as a context manager: what it holds on disk goes at its end."""

    def __init__(self) -> None:
        self.count = 0
        self._open = ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Keys:
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="dinov3-lite-"))
        for i in range(FILES):
            self._files.append(self._open.enter_context(Path(folder, str(i)).open("w+b")))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, key: str) -> None:
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        self._files[digest[0] % FILES].write(digest + self.count.to_bytes(8, "little"))
        self.count += 1

    def doubled(self) -> list[int]:
        """Numbers, ascending, of the keys that another one before them is equal to; the first key has number 0."""
        return sorted(number for file in self._files for number in _doubled(file))


def _doubled(file: IO[bytes]) -> Iterator[int]:
    file.seek(0)
    records = np.frombuffer(file.read(), RECORD)
    # two halves as numbers, which sort; equal keys keep their order
    halves = records["digest"].copy().view("<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    halves = halves[order]
    again = np.flatnonzero((halves[1:] == halves[:-1]).all(axis=1)) + 1
    yield from records["number"][order[again]].tolist()
