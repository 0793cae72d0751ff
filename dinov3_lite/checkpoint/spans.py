"""Stored tensors and runs of their elements: what is known of them without their data, and their data."""

# Annotations are evaluated here, as in `layouts.table`.
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class StoredTensor(NamedTuple):
    """A tensor of a file, or one in memory: what is known without its data, and the data on `read()`."""

    name: str
    dtype: torch.dtype
    shape: Shape
    reader: Callable[["StoredTensor"], Tensor]
    file: Path
    offset: int | None = None
    """Where in `file` its bytes start, in order and without gaps; None if they are not there as such."""
    problem: str = ""
    """Why it can't be read, as in "is sparse, expected a plain one"; mostly empty."""

    @classmethod
    def in_memory(cls, name: str, tensor: Tensor, file: Path | None = None) -> "StoredTensor":
        """Wrap a tensor in memory. file: the one that it was made from, for messages."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda _: tensor, file or Path())

    @classmethod
    def unreadable(cls, name: str, file: Path, problem: str) -> "StoredTensor":
        """A tensor that has a name and can't be read: `read()` raises ValueError that says why."""

        def refuse(stored: "StoredTensor") -> Tensor:
            raise ValueError(f"{file}: tensor {name!r} {problem}")

        return cls(name, torch.uint8, (), refuse, file, problem=problem)

    def read(self) -> Tensor:
        """The tensor, memory-mapped where the file allows it."""
        return self.reader(self)

    def span(self) -> "Span":
        """All its elements."""
        return Span(self, 0, math.prod(self.shape))


class Span(NamedTuple):
    """Elements start to stop of a stored tensor, in memory order."""

    stored: StoredTensor
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Span":
        """Some of its elements."""
        return Span(self.stored, self.start + start, self.start + stop)

    def read(self) -> Tensor:
        """The elements, (stop - start,), without a copy: the mapping keeps what was touched of the file in memory."""
        flat = self.stored.read().reshape(-1)
        return flat if self.size == flat.numel() else flat[self.start : self.stop]

    def load(self, parts: Iterable[tuple[int, int]] | None = None, opened: IO[bytes] | None = None) -> Tensor:
        """The elements, or these parts of them, flat, read into memory of their own, which is freed with the tensor.

        opened: the file of the stored tensor, unbuffered, where it is open already.
        """
        ranges = [(self.start + a, self.start + b) for a, b in ([(0, self.size)] if parts is None else parts)]
        stored = self.stored
        if stored.offset is None or not self.size:
            flat = stored.read().reshape(-1)
            return flat[slice(*ranges[0])] if len(ranges) == 1 else torch.cat([flat[a:b] for a, b in ranges])
        itemsize = stored.dtype.itemsize
        data = bytearray(sum(stop - start for start, stop in ranges) * itemsize)
        rest = memoryview(data)
        with nullcontext(opened) if opened else stored.file.open("rb", buffering=0) as file:
            for start, stop in ranges:
                size = (stop - start) * itemsize
                file.seek(stored.offset + start * itemsize)
                read_into(file, rest[:size])
                rest = rest[size:]
        return torch.frombuffer(data, dtype=stored.dtype)


def samples(spans: Iterable[Span]) -> Iterator[Tensor]:
    """Read the elements at `places` of each span, into memory of their own."""
    for path, of_it in itertools.groupby(spans, lambda span: span.stored.offset is not None and span.stored.file):
        with path.open("rb", buffering=0) if path else nullcontext() as file:
            for span in of_it:
                yield span.load(places(span.size), file)


def sample(flat: Tensor) -> Tensor:
    """The elements at `places`."""
    return flat.index_select(0, _indices(flat.numel()).to(flat.device))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they hold the same numbers, or NaN, in the same places."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def places(size: int) -> list[tuple[int, int]]:
    """Which of `size` elements tell weights apart: start and stop of five runs of 64, from the first to the last."""
    return [(start, min(start + 64, size)) for start in (0, size // 4, size // 2, size * 3 // 4, max(0, size - 64))]


@functools.lru_cache
def _indices(size: int) -> Tensor:
    return torch.cat([torch.arange(start, stop, device="cpu") for start, stop in places(size)])


def cut(spans: Iterable[Span], sizes: Sequence[int]) -> list[list[Span]]:
    """The spans, laid one after the other, cut into runs of `sizes` elements."""
    runs = []
    queue = list(spans)
    for size in sizes:
        run: list[Span] = []
        while size:
            span = queue.pop(0)
            if span.size > size:
                queue.insert(0, span.part(size, span.size))
                span = span.part(0, size)
            run.append(span)
            size -= span.size
        runs.append(run)
    return runs


def read_into(file: Any, buffer: memoryview) -> None:
    """Fill the buffer from an unbuffered file. Raises OSError if it ends before."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise OSError(f"{file.name}: ended early: was it changed meanwhile?")
        buffer = buffer[count:]
