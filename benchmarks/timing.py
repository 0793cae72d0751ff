"""How things are measured here: times in interleaved rounds of rotated order, memory by itself, relative errors."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in each round, the mean of `repeats`.

    Each is timed right after a call of its own. After another library's, whose threads and memory are still in the way,
    the same forward took a fifth longer on a CPU, and in a rotation everybody but the first keeps one predecessor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _, name in turns(calls, rounds):
        calls[name]()
        seconds[name].append(once(calls[name], repeats))
    return seconds


def turns(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Round and name: every name once a round, each round beginning with the next."""
    names = list(names)
    for i in range(rounds):
        first = i % len(names)
        yield from ((i, name) for name in names[first:] + names[:first])


def once(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of a call, the mean of `repeats`: by the GPU's own clock if there is one."""
    if torch.cuda.is_available():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios: a machine that slows down for some rounds slows both."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def quartiles(seconds: list[float]) -> list[float]:
    """The lower quartile, the median, the upper one; of fewer than three times the least, the median, the most."""
    if len(seconds) < 3:
        return [min(seconds), statistics.median(seconds), max(seconds)]
    return statistics.quantiles(seconds, n=4)


def uneven(seconds: list[float], most: float = 0.15) -> bool:
    """Whether a quartile lies further from the median than this share of it: the machine was not quiet."""
    low, median, high = quartiles(seconds)
    return max(median - low, high - median) > most * median


def spread(seconds: list[float]) -> str:
    """Milliseconds: median (quartiles)."""
    low, median, high = (1e3 * t for t in quartiles(seconds))
    return f"{median:.0f} ({low:.0f} to {high:.0f})" if median >= 10 else f"{median:.2f} ({low:.2f} to {high:.2f})"


def peak_mib(call: Callable[[], object]) -> float:
    """What a call's peak lies above what was in use before it, in MiB: of the GPU, or of the process (Linux)."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left in the heap would hide what this one takes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark falls to what is resident now
    before = process_mib("VmRSS")
    call()
    return process_mib("VmHWM") - before


def process_mib(field: str) -> float:
    """One of Linux's figures of this process: VmRSS, what is resident, or VmHWM, the most that was."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def in_a_child(*words: object, cwd: str | Path | None = None, **variables: str) -> str:
    """The last line that a new process of this Python prints; `variables` are added to its environment."""
    env = {**os.environ, **variables}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.splitlines()[-1]


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; infinite where that is no number."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return difference.item() if difference.isfinite() else float("inf")
