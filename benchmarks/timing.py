"""How things are measured here: times in interleaved rounds of rotated order, memory by itself, relative errors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; one round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            elapsed = once(calls[name])
            if i:
                seconds[name].append(elapsed)
    return seconds


def once(call: Callable[[], object]) -> float:
    """Seconds of one call, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(seconds: list[float]) -> str:
    """Milliseconds: median (quartiles)."""
    low, median, high = (1e3 * t for t in statistics.quantiles(seconds, n=4))
    return f"{median:.0f} ({low:.0f} to {high:.0f})" if median >= 10 else f"{median:.2f} ({low:.2f} to {high:.2f})"


def peak_mib(call: Callable[[], object]) -> float:
    """What a call's peak lies above what was in use before it, in MiB: of the GPU, or of the process (Linux)."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark falls to what is resident now
    before = process_mib("VmRSS")
    call()
    return process_mib("VmHWM") - before


def process_mib(field: str) -> float:
    """One of Linux's figures of this process: VmRSS, what is resident, or VmHWM, the most that was."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; infinite where that is no number."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return difference.item() if difference.isfinite() else float("inf")
