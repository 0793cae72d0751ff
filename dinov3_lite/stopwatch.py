"""How long each of several ways of computing the same takes, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Calls = Sequence[Callable[[], object]]
"""One way of computing, for each of the sizes that count."""

ROUNDS = 5
ENOUGH = 0.06  # seconds of one comparison, after which no further round begins; two are run in any case
HOPELESS = 2.0  # times as long as the best in two rounds: not run again
OTHERS = 1 << 23  # bytes read and written before a call, as by the layers that a model runs in between


def least_seconds(ways: Mapping[str, Calls]) -> dict[str, list[float]]:
    """Seconds of each call of each way: the least of a few interleaved rounds, after one that is not counted.

    The least, since whatever else runs on a machine only ever adds to a time.
    """
    others = torch.zeros(OTHERS, dtype=torch.uint8, device="cpu")

    def seconds(call: Callable[[], object]) -> float:
        others.add_(1)  # what is in the first caches of a processor while a layer waits is not its weight
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def once(calls: Calls) -> list[float]:
        return [seconds(call) for call in calls]

    for calls in ways.values():
        once(calls)  # not counted
    start = time.perf_counter()
    least = {name: once(calls) for name, calls in ways.items()}
    for done in range(1, ROUNDS):
        best = min(map(sum, least.values()))
        for name, calls in ways.items():
            if done == 1 or sum(least[name]) <= HOPELESS * best:
                least[name] = list(map(min, least[name], once(calls)))
        if time.perf_counter() - start > ENOUGH:
            break
    return least


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers of their own generator to time with: measuring changes nobody's random numbers."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
