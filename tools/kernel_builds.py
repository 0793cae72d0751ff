"""Compile every kernel in every configuration for every target, without a GPU, and say what the compiler made of it.

    python tools/kernel_builds.py [--quick] [--json FILE]

Compiles with the installed triton and with each other release that `make` keeps in references/, two processes at a
time, and prints the table of kernels/README.md. Exit status 1 if a build is not as it must be (`problems`).

Registers, stack and shared memory are those of the binary; instructions are counted in the PTX it is assembled from,
since disassembling takes longer than compiling.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

MODULES = ("dinov3_lite.kernels.builds",)
# what a program may use of a multiprocessor's shared memory, in bytes, by target
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
PROCESSES = 2
REFERENCES = Path(sys.prefix) / "references"


def problems(build: dict[str, Any]) -> list[str]:
    """What is wrong with one compiled build, a sentence each.

    A kernel without matrix products moves data, 16 bytes an access. Half-precision products use the target's own tensor
    core instructions, at the head dims of released models.
    """
    name = f"{build['name']} on sm_{build['target']} by triton {build['triton']}"
    if "error" in build:
        return [f"{name} does not compile: {build['error']}"]
    limit = SHARED_MEMORY[build["target"]]
    tensor_cores = build["multiplies"] and build["released"]
    checks = {
        f"has a stack frame of {build['stack']} bytes: registers spill": build["stack"] == 0,
        f"needs {build['shared']} bytes of shared memory, of {limit}": build["shared"] <= limit,
        f"has {build['atomics']} atomics: its sums have no fixed order": build["atomics"] == 0,
        f"has {build['narrow']} of {build['accesses']} accesses of less than 16 bytes": build["multiplies"]
        or build["accesses"] > build["narrow"] == 0,
    }
    if tensor_cores and build["target"] == 90:
        checks["does not use wgmma"] = build["wgmma"] > 0
        checks[f"has {build['mma']} products by the older mma"] = build["mma"] == 0
    if tensor_cores and build["target"] == 100:
        checks["does not use tcgen05"] = build["tcgen05"] > 0
    return [f"{name} {problem}" for problem, holds in checks.items() if not holds]


def is_released(build: Any) -> bool:
    """Whether a released model in half precision launches it: head dim 64 or 128, a tensor in half precision."""
    half = not {"*fp16", "*bf16"}.isdisjoint(build.signature.values())
    return half and build.constexprs.get("D", 64) in (64, 128)


def compile_build(build: Any, target: int) -> dict[str, Any]:
    """One row of the result: a build compiled for a target, as the launcher would specialise it.

    Pointers are aligned to 16 bytes, as torch allocates, and strides are multiples of 16, as the model's are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row = {"name": build.name, "kernel": build.kernel.__name__, "target": target, "triton": triton.__version__}
    signature = {name: build.signature[name] for name in build.kernel.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name.startswith("stride")]
    source = ASTSource(
        build.kernel, signature, build.constexprs, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error).strip()}"}
    registers, stack = resources(compiled.asm["cubin"])
    return row | {
        "multiplies": "tt.dot" in compiled.asm["ttir"],
        "released": is_released(build),
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        **instructions(compiled.asm["ptx"]),
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack frame, spilled registers among them."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def instructions(ptx: str) -> dict[str, int]:
    """How often the PTX has what a kernel must have or must not have."""
    accesses = re.findall(r"\b(?:ld|st)\.global(?:\.[a-zA-Z_:]\w*)*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return {
        "accesses": len(accesses),
        "narrow": sum(int(vector or 1) * int(bits) < 128 for vector, bits in accesses),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "mma": len(re.findall(r"\bmma\.sync\.", ptx)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\.", ptx)),
        "tcgen05": len(re.findall(r"\btcgen05\.mma\.", ptx)),
    }


def compile_all(
    modules: tuple[str, ...] = MODULES, triton: Path | None = None, quick: bool = False, path: Path | None = None
) -> list[dict[str, Any]]:
    """Compile what the modules' `builds(target)` list, in fresh processes and an empty cache.

    triton: the folder of another release than the installed one. path: where modules of no package lie.
    `quick` keeps to what is released: exact float32 products, without tensor cores, take more than half of the time.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in (triton, path) if folder is not None)
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        command = [sys.executable, __file__, *["--quick"] * quick, "--modules", *modules, "--share"]
        files = [Path(folder) / f"{share}.jsonl" for share in range(PROCESSES)]
        processes = [
            subprocess.Popen([*command, str(share)], env=environment, stdout=file.open("w"))
            for share, file in enumerate(files)
        ]
        if any([process.wait() for process in processes]):
            raise RuntimeError("a compiling process failed: its error is above")
        shares = [[json.loads(line) for line in file.open()] for file in files]
    rows: list[dict[str, Any]] = [{}] * sum(map(len, shares))
    for i, share in enumerate(shares):
        rows[i::PROCESSES] = share
    return rows


def compile_share(modules: list[str], quick: bool, share: int) -> None:
    """In a process of its own: compile every PROCESSES-th build and print a line of JSON for each."""
    builds = [
        (build, target)
        for module in map(importlib.import_module, modules)
        for target in SHARED_MEMORY
        for build in module.builds(target)
        if is_released(build) or not quick
    ]
    for build, target in builds[share::PROCESSES]:
        print(json.dumps(compile_build(build, target)), flush=True)


def other_tritons() -> list[Path]:
    """The folders of the releases beside the installed one."""
    return sorted(REFERENCES.glob("triton-*"))


def table(result: dict[str, Any]) -> str:
    """A line a build, a column a target: registers a thread by each release, and KB of shared memory, the larger."""
    rows = result["rows"]
    targets = sorted({row["target"] for row in rows})
    lines = ["| build | " + " | ".join(f"sm_{target}" for target in targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for target in targets:
            found = [row for row in rows if (row["name"], row["target"]) == (name, target)]
            registers = " / ".join(str(row["registers"]) for row in found)
            cells.append(f"{registers}, {max(row['shared'] for row in found) / 1024:.0f}" if found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what a released model in half precision launches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--modules", nargs="+", default=list(MODULES), help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share is not None:
        compile_share(arguments.modules, arguments.quick, arguments.share)
        return 0
    rows = [
        row for triton in (*other_tritons(), None) for row in compile_all(arguments.modules, triton, arguments.quick)
    ]
    found = [problem for row in rows for problem in problems(row)]
    releases = sorted({row["triton"] for row in rows})
    result = {"environment": {"date": str(date.today()), "triton": " and ".join(releases)}, "rows": rows}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result) if not found else "\n".join(found))
    print(f"{len(rows)} builds by triton {' and '.join(releases)}, {len(found)} problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
