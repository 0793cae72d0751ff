"""Which part of the shards a process does, from what a launcher tells it. No process waits for another."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Shard i of the plan belongs to part i % count, whatever is done already."""

    index: int
    count: int
    told_by: str = ""

    def __contains__(self, shard: int) -> bool:
        return shard % self.count == self.index

    def __str__(self) -> str:
        return f"part {self.index} of {self.count}" + (f" ({self.told_by})" if self.told_by else "")


def parse_part(text: str) -> Part:
    """`I/N`, with I from 0 to N - 1 or from 1 to N: N is the same part as 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[2]) < 1 or int(match[1]) > int(match[2]):
        raise ValueError(f"part {text!r}: expected I/N, I from 0 to N - 1 or from 1 to N")
    return Part(int(match[1]) % int(match[2]), int(match[2]))


def part_from_environment(env: Mapping[str, str] = os.environ) -> Part:
    """The part of this process: all, unless torchrun, SLURM or Kubernetes say otherwise.

    An array of SLURM jobs may have several tasks, or a torchrun, in each. Raises ValueError for Kubernetes' index
    without the number of completions, which it does not tell.
    """
    index, count, told_by = 0, 1, []
    if "SLURM_ARRAY_TASK_ID" in env:
        first, step = int(env.get("SLURM_ARRAY_TASK_MIN", 0)), int(env.get("SLURM_ARRAY_TASK_STEP", 1))
        index, count = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step, int(env["SLURM_ARRAY_TASK_COUNT"])
        told_by.append("SLURM_ARRAY_TASK_ID")
    inner = None
    if "RANK" in env and "WORLD_SIZE" in env:
        inner = ("RANK", env["RANK"], env["WORLD_SIZE"])
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        inner = ("SLURM_PROCID", env["SLURM_PROCID"], env["SLURM_NTASKS"])
    elif "JOB_COMPLETION_INDEX" in env:
        completions = env.get("JOB_COMPLETIONS") or env.get("WORLD_SIZE")
        if completions is None:
            raise ValueError(
                "JOB_COMPLETION_INDEX is set, and not how many there are: set JOB_COMPLETIONS to the job's "
                "spec.completions, or give --part $(JOB_COMPLETION_INDEX)/N"
            )
        inner = ("JOB_COMPLETION_INDEX", env["JOB_COMPLETION_INDEX"], completions)
    if inner is not None:
        name, i, n = inner
        index, count = index * int(n) + int(i), count * int(n)
        told_by.append(name)
    if not 0 <= index < count:
        raise ValueError(f"{' and '.join(told_by)}: part {index} of {count}: give --part I/N instead")
    return Part(index, count, " and ".join(told_by))


def local_device(env: Mapping[str, str] = os.environ) -> str:
    """The GPU that a launcher gave this process, the only one, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    rank = int(env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or 0)
    return f"cuda:{rank % torch.cuda.device_count()}"  # SLURM may show each task its own GPU alone


def local_threads(env: Mapping[str, str] = os.environ) -> int:
    """As many threads as there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(env.get("LOCAL_WORLD_SIZE") or 1))
