"""What a result was measured on, at the head of every table and file, and the file itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from timing import once

RESULTS = Path(__file__).parent / "results"
INSTRUCTIONS = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 bfloat16": "avx512_bf16", "AMX": "amx_tile"}


def environment(*packages: str) -> dict[str, str | int]:
    """Machine, versions and date; `packages` are named beside those that all figures depend on."""
    preloaded = os.environ.get("LD_PRELOAD")
    return {
        "date": str(date.today()),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", *packages)},
        **({"preloaded": Path(preloaded).name} if preloaded else {}),
    }


def headline(result: dict[str, Any]) -> str:
    """Where and with what a result was measured, in a line: the processor first."""
    found = dict(result["environment"])
    date, machine, threads = (found.pop(key) for key in ("date", "machine", "threads"))
    return f"{machine}, {threads} threads, {date}: " + ", ".join(f"{key} {value}" for key, value in found.items())


def save(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def opened(name: str, again: bool) -> dict[str, Any]:
    """benchmarks/results/NAME.json to go on with, if it was measured here, else a new result. SystemExit if it was not.

    again: begin anew, wherever it was measured.
    """
    now, file = environment(), RESULTS / f"{name}.json"
    if again or not file.exists():
        return {"environment": now, "rows": []}
    result = json.loads(file.read_text())
    for key in ("machine", "threads", "torch", "preloaded"):
        then, here = result["environment"].get(key, "nothing"), now.get(key, "nothing")
        if then != here:
            raise SystemExit(
                f"{file.name} was measured with {key} {then}, this is {here}: "
                "give --save another name, or --again to measure all of it here"
            )
    return {**result, "environment": {**result["environment"], **now}}


def processor(result: dict[str, Any]) -> str:
    """What a result was measured on in a few words: `Intel Xeon Processor (AMX)`, `AMD EPYC (AVX-512 bfloat16)`."""
    machine = result["environment"]["machine"].replace("(R)", "")
    name, _, marks = machine.partition(" (")
    strongest = [mark for mark in INSTRUCTIONS if mark in marks.partition(")")[0].split(", ")]
    return f"{name} ({strongest[-1]})" if strongest else machine.split(",")[0]


def machine() -> str:
    """The GPU if there is one, else the processor, what sets it apart, and its cores.

    A virtual machine often gives no more than a brand: family, model and instruction sets say which one it is.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    found = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    name = found.get("model name", platform.processor() or platform.machine())
    flags = set(found.get("flags", "").split())
    marks = [f"family {found['cpu family']}, model {found['model']}"] if "cpu family" in found else []
    marks += [mark for mark, flag in INSTRUCTIONS.items() if flag in flags]
    return f"{name} ({', '.join(marks)}), {os.cpu_count()} cores" if marks else f"{name}, {os.cpu_count()} cores"


def version(package: str) -> str:
    """The installed version, or that of the module which `make` put beside the environment, or a dash."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "-"))


def peak_gflops(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """GFLOP/s of a large matrix product, the best of ten: what the machine gives at that moment."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / min(once(lambda: a @ b) for _ in range(10)) / 1e9
