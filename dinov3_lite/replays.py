"""CUDA graphs of a whole forward, one for each shape: a small model's kernels take less time than launching them."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pretrained import version

MAX_REPLAYS = 32  # of one model: further shapes are launched kernel by kernel
GAIN = 0.95  # of the time of launching everything: a graph that takes longer is given up, and its memory with it
CALLS = 5

Tensors = list[Tensor]
Forward = Callable[[Tensor], Tensors]


class State:
    """The objects that a forward was recorded with, kept alive, and how often these tensors were written to, and where.

    Two are equal if they hold the same objects, not merely equal ones.
    """

    def __init__(self, objects: list[object], tensors: Iterable[Tensor | None] = ()) -> None:
        self.objects = objects
        self.numbers = [number for t in tensors if t is not None for number in (version(t), t.data_ptr())]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State) or len(self.objects) != len(other.objects):
            return False
        return self.numbers == other.numbers and all(map(operator.is_, self.objects, other.objects))

    __hash__ = None  # type: ignore[assignment]


class Replay(NamedTuple):
    """A recorded forward: its input and outputs, which every replay writes anew, and what it was recorded for."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    outputs: Tensors
    state: State

    def run(self, images: Tensor) -> Tensors:
        self.images.copy_(images)
        self.graph.replay()
        return [output.clone() for output in self.outputs]


class Replays:
    """Run forwards by CUDA graphs where that is faster, as measured when the graph is made.

    A graph reads the weights where they lay when it was recorded, and is recorded anew when the `state` is another one.
    """

    def __init__(self) -> None:
        self.made: dict[Hashable, Replay | None] = {}
        self.lock = threading.Lock()
        self.pool: Any = None
        self.done: torch.cuda.Event | None = None

    def __call__(self, kind: Hashable, state: State, forward: Forward, images: Tensor) -> Tensors | None:
        """The outputs of `forward(images)`, replayed; None where there is no graph that would be faster.

        kind: what else the forward depends on, beside the shape and dtype of the images.
        """
        if torch.cuda.is_current_stream_capturing():
            return None  # into somebody's own graph
        kind = (kind, images.shape, images.dtype)
        with self.lock, torch.cuda.device(images.device), torch.inference_mode(False), torch.no_grad():
            replay = self.made.get(kind)
            if kind not in self.made or (replay is not None and replay.state != state):
                replay = self.made[kind] = self._record(forward, images, state, again=kind in self.made)
            if replay is None:
                return None
            if self.done is not None:
                self.done.wait()  # another stream's replay may still use the same memory
            outputs = replay.run(images)
            self.done = torch.cuda.Event()
            self.done.record()
            return outputs

    def _record(self, forward: Forward, images: Tensor, state: State, again: bool) -> Replay | None:
        if len(self.made) >= MAX_REPLAYS and not again:
            return None
        images = images.clone()  # which inference mode may have made, and which the graph reads
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(images)  # whatever is compiled, checked or allocated at a first use
            launched = seconds(lambda: forward(images))
        torch.cuda.current_stream().wait_stream(stream)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = forward(images)
        replay = Replay(graph, images, outputs, state)
        replayed = seconds(lambda: replay.run(images))
        return replay if again or replayed < GAIN * launched else None


def seconds(call: Callable[[], object]) -> float:
    """Of a call, by the GPU's clock: of several in a row, so that what the host takes counts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS
