"""Conversion beside `cp` of the same bytes, and its peak memory, on a made checkpoint of any size.

    python benchmarks/conversion.py [--variant vit7b16] [--depth 16] [--rounds 3] [--folder SCRATCH] [--to lite ...]

Writes a sharded checkpoint in transformers' layout (random numbers; the 7B's shapes at depth 16 are 10.8 GB), then in
turns copies it with cp and converts it, each in a new process and onto new files, flushed to disk by both. Prints
medians and writes benchmarks/results/conversion.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from environment import environment, headline, save
from safetensors.torch import save_file
from timing import in_a_child, turns

from dinov3_lite import DINOv3Config
from dinov3_lite.checkpoint.layouts import TRANSFORMERS

CONVERT = """
import sys, torch
def peak():  # KiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
base = peak()
from convert import convert
dtype = getattr(torch, sys.argv[4]) if len(sys.argv) > 4 else None
convert(sys.argv[1], sys.argv[2], to=sys.argv[3], dtype=dtype, allow_loss=True)
print((peak() - base) / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="vit7b16")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="scratch space of three times the checkpoint's size")
    parser.add_argument("--to", nargs="+", default=["lite", "meta", "lite bfloat16"])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        size = write_shards(source, replace(DINOv3Config.from_name(args.variant), num_hidden_layers=args.depth))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("cp", *args.to)}
        for i, name in turns(runs, args.rounds):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            subprocess.run(["sync"], check=True)
            start = time.perf_counter()
            peak = copy(source, target) if name == "cp" else convert(source, target, name)
            runs[name].append({"seconds": time.perf_counter() - start, "peak": peak})
            print(f"round {i + 1}: {name}: {runs[name][-1]}", file=sys.stderr)

    result = {"environment": environment(), "variant": args.variant, "depth": args.depth, "bytes": size, "runs": runs}
    save("conversion", result)
    print(headline(result))
    print(f"{args.variant} at depth {args.depth}: {size / 1e9:.1f} GB of float32\n")
    print(table(result))


def write_shards(folder: Path, config: DINOv3Config) -> int:
    """A made checkpoint, a shard a block and one for the rest; every block holds the same random numbers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for equation in TRANSFORMERS.table(config).equations(config):
        for name, shape in equation.theirs:
            block = name.split(".")[1] if name.startswith("layer.") else "rest"
            shards.setdefault(f"model-{block}.safetensors", {})[name] = shape
    random: dict[tuple[int, ...], torch.Tensor] = {}
    total = 0
    for file, shapes in shards.items():
        tensors = {name: random.setdefault(shape, torch.randn(shape)).clone() for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def copy(source: Path, target: Path) -> float:
    subprocess.run(f"cp {source}/* {target}/ && sync {target}/*", shell=True, check=True)
    return 0.0


def convert(source: Path, target: Path, name: str) -> float:
    """Peak memory in MiB above the interpreter with torch loaded."""
    return float(in_a_child("-c", CONVERT, source, target, *name.split(), cwd=target))


def table(result: dict) -> str:
    """A row a way: the source's bytes over the median of seconds, the ratio of the medians to cp's, and peak memory."""
    lines = ["| | seconds | GB/s | ratio to cp | peak MiB above `import torch` |", "|---" * 5 + "|"]
    medians = {name: statistics.median(run["seconds"] for run in runs) for name, runs in result["runs"].items()}
    for name, seconds in medians.items():
        peak = max(run["peak"] for run in result["runs"][name])
        rate = result["bytes"] / 1e9 / seconds
        cells = [f"{seconds:.1f}", f"{rate:.2f}", f"{seconds / medians['cp']:.2f}", f"{peak:.0f}" if peak else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
