"""Inductor's graphs of a stack of blocks: each made once, by one thread, and tried before anybody gets it."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Tensors = tuple[Tensor, ...]
Run = Callable[[Sequence[nn.Module], Tensors, Sequence[int], str], list[Tensor]]
Example = Callable[[Tensors, bool], Tensors]

MAX_GRAPHS = 32  # of one model: calls of further kinds run eagerly
# Relative errors against eager that pass, by the narrowest dtype: a graph that fails gives NaN or noise. TF32 alone is
# 1e-3; of a deep stack in bfloat16, whose roundings a graph has elsewhere, it is 1e-2.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.2}


class Graphs:
    """Run blocks by torch.compile.

    run: what is compiled, (blocks, tensors, taps, attention) -> states; the first tensor is the residual stream.
    example: tensors like those given, random, with unequal sizes where the graph is to hold for all.
    dynamic: True makes a graph for one image and one for several, of any size; False a graph for each shape.
    """

    def __init__(self, run: Run, example: Example, dynamic: bool) -> None:
        self.run = run
        self.example = example
        self.dynamic = dynamic
        self.made: dict[Hashable, Callable[..., list[Tensor]] | None] = {}
        self.lock = threading.RLock()
        self.warned: set[str] = set()

    def __call__(
        self, blocks: tuple[nn.Module, ...], tensors: Tensors, taps: tuple[int, ...], attention: str = ""
    ) -> list[Tensor]:
        """Return what `run` returns, from a graph of this kind of call where there is or can be one."""
        if not tensors[0].numel():
            return self.run(blocks, tensors, taps, attention)
        with torch.inference_mode(False), torch.no_grad():  # inference mode would take graphs of its own
            tensors = tuple(t.clone() if t.is_inference() else t for t in tensors)
            graph = self._graph(blocks, tensors, taps, attention)
            if graph is not None:
                try:
                    return graph(*tensors)
                except Exception as error:  # torch names no class that all of its compiler's errors are of
                    with self.lock:  # under which others add to them
                        self.made = {kind: None if made is graph else made for kind, made in self.made.items()}
                    self._warn(f"a compiled call failed; calls of its kind run eagerly from now on: {error}"[:500])
            return self.run(blocks, tensors, taps, attention)

    def _graph(
        self, blocks: tuple[nn.Module, ...], tensors: Tensors, taps: tuple[int, ...], attention: str
    ) -> Callable[..., list[Tensor]] | None:
        """The graph of this kind of call, made now if it is the first; None where there can be none."""
        x = tensors[0]
        shape = x.shape[:1] == (1,) if self.dynamic else x.shape
        kinds = tuple((t.ndim, t.dtype) for t in tensors)
        kind = (blocks, taps, attention, shape, kinds, x.device, _global_state(x.device.type))
        if kind not in self.made:
            with self.lock:
                if kind not in self.made:
                    self.made[kind] = self._make(blocks, tensors, taps, attention)
        return self.made[kind]

    def _make(
        self, blocks: tuple[nn.Module, ...], tensors: Tensors, taps: tuple[int, ...], attention: str
    ) -> Callable[..., list[Tensor]] | None:
        if len(self.made) >= MAX_GRAPHS:
            self._warn(
                f"this model has {MAX_GRAPHS} graphs: calls of further kinds run eagerly; prepare it with dynamic=True "
                "if they differ in size alone"
            )
            return None
        example = self.example(tensors, self.dynamic)
        expected = self.run(blocks, example, taps, attention)
        bound = _bound(blocks, example)
        tapped = [i in taps for i in range(len(blocks))]  # in a closure, torch takes whole numbers for sizes
        for options in ({}, {"force_disable_caches": True}):

            def function(*tensors: Tensor) -> list[Tensor]:
                constant = tuple(i for i, tap in enumerate(tapped) if tap)
                return self.run(blocks, tensors, constant, attention)

            # of its own code: torch counts recompilations by code, and ends what has more than a few
            own = types.FunctionType(
                function.__code__.replace(), function.__globals__, "graph", None, function.__closure__
            )
            with torch._inductor.config.patch(options):
                graph: Callable[..., list[Tensor]] = torch.compile(own, fullgraph=True, dynamic=self.dynamic)
                actual = graph(*example)
            pairs = zip(actual, expected, strict=True)
            if len(actual) == len(expected) and all(_error(*pair) <= bound for pair in pairs):
                return graph
        self._warn(
            "what torch compiled differs from the model, with its caches and without: calls of this kind run eagerly"
        )
        return None

    def _warn(self, message: str) -> None:
        """Warn, once."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)


def _bound(blocks: Sequence[nn.Module], tensors: Tensors) -> float:
    """Of the narrowest dtype that anything is computed in: the stream's, the weights', or autocast's."""
    weights = (weight for block in blocks for weight in block.parameters())
    dtypes = {tensor.dtype for tensor in (*tensors, *weights)} | {_autocast(tensors[0].device.type)}
    return max(bound for dtype, bound in BOUNDS.items() if dtype in dtypes)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative; 0 where what is expected is no number itself."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return error.item() if expected.isfinite().all() else 0.0


def _global_state(device: str) -> tuple[Any, ...]:
    """What else torch compiles a graph for."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _autocast(device), deterministic, torch.get_default_dtype(), torch.get_num_threads()


def _autocast(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in on this kind of device, where it is on."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
