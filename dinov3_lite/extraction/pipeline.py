"""A shard's pictures, read and decoded in threads ahead of the model, a batch at a time."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .decode import Preparation, decode
from .reading import Item, NotThere, Rejected

AHEAD = 2  # batches under way beside the one that the model has


class ReadFailed(Exception):
    """A picture or an archive could not be read, for reasons that lie outside of it."""


@dataclass
class Seconds:
    """Where the time of a shard went; the first three are summed over the threads."""

    read: float = 0.0
    decode: float = 0.0
    resize: float = 0.0
    forward: float = 0.0
    write: float = 0.0

    def add(self, *others: Seconds) -> None:
        for name in vars(self):
            setattr(self, name, sum((getattr(other, name) for other in others), getattr(self, name)))

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)


@dataclass
class Outcome:
    """What became of one picture: a reason, or none and, of pictures of several sizes, the model's input."""

    reason: str | None = None
    there: bool = True
    pixels: Tensor | None = None
    seconds: Seconds = field(default_factory=Seconds)


@dataclass
class Batch:
    """Pictures in the plan's order, rejected ones too: in `images` they are zeros, so that batches keep their shape."""

    keys: list[str]
    outcomes: list[Outcome]
    images: Tensor | None
    """(B, 3, h, w), or None where each outcome has its own pixels."""


class Pipeline:
    """Decodes in `threads` threads."""

    def __init__(
        self,
        threads: int,
        batch_size: int,
        prepare: Preparation,
        *,
        scaled: bool = False,
        pin: bool = False,
    ) -> None:
        """scaled: JPEGs may be decoded at a fraction of their size. pin: batches are made in pinned memory."""
        self.batch_size, self.prepare, self.pin = batch_size, prepare, pin
        self.size = prepare.processor.size
        self.wanted = self.size if scaled else None
        own = torch.get_num_threads()
        # in these threads every operation of torch is to run in one thread
        self.pool = ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,))
        self.pool.submit(int).result()
        torch.set_num_threads(own)  # which is otherwise 1 in threads that begin from now on

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def batches(self, items: Iterable[Item]) -> Iterator[Batch]:
        """Raises ReadFailed as soon as a picture can't be read."""
        under_way: deque[tuple[list[str], list[Future[Outcome]], Tensor | None]] = deque()
        stream = _reading(items)
        try:
            while group := list(itertools.islice(stream, self.batch_size)):
                under_way.append(self._start(group))
                if len(under_way) > AHEAD:
                    yield self._finish(*under_way.popleft())
            while under_way:
                yield self._finish(*under_way.popleft())
        finally:
            for _, futures, _ in under_way:
                for future in futures:
                    future.cancel()

    def _start(self, group: list[Item]) -> tuple[list[str], list[Future[Outcome]], Tensor | None]:
        images = None
        if self.size is not None:
            channels = self.prepare.processor.num_channels
            images = torch.empty(len(group), channels, *self.size, dtype=self.prepare.dtype, pin_memory=self.pin)
        futures = []
        for i, item in enumerate(group):
            futures.append(self.pool.submit(self._prepare, item, None if images is None else images[i]))
        return [item.key for item in group], futures, images

    def _finish(self, keys: list[str], futures: list[Future[Outcome]], images: Tensor | None) -> Batch:
        return Batch(keys, [future.result() for future in futures], images)

    def _prepare(self, item: Item, image: Tensor | None) -> Outcome:
        """Read, decode and resize one picture, into its place in the batch where that has one size."""
        outcome = Outcome()
        times = [time.perf_counter()]
        try:
            data = item.read()
            times.append(time.perf_counter())
            picture = decode(data, self.wanted)
            times.append(time.perf_counter())
            ready = self.prepare(picture)
            if image is None:
                outcome.pixels = ready
            else:
                image.copy_(ready)
        except Rejected as rejected:
            outcome.reason, outcome.there = str(rejected), not isinstance(rejected, NotThere)
            if image is not None:
                image.zero_()
        except OSError as error:
            raise ReadFailed(f"{item.key}: {error}") from error
        times.append(time.perf_counter())
        steps = [b - a for a, b in itertools.pairwise(times)]
        outcome.seconds = Seconds(*steps) if len(steps) == 3 else Seconds(read=sum(steps))
        return outcome


def _reading(items: Iterable[Item]) -> Iterator[Item]:
    """The items, where failing to go on is a failed read."""
    try:
        yield from items
    except OSError as error:
        raise ReadFailed(str(error)) from error
