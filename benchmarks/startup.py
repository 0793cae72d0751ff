"""From a new process to the first features: ours beside transformers' from_pretrained, on the same weights.

    python benchmarks/startup.py [--rounds 7] [--variant vitb16] [--save startup]
    git worktree add ../earlier COMMIT
    python benchmarks/startup.py --reference ../earlier --rounds 25 --variant vits16 --save startup_reference

With a reference, another checkout of this repository stands in transformers' place. Each round starts a process for
each contender, in rotated order. Times start after `import torch`, which both need; files are in the page cache. Peak
memory is Linux's VmHWM. Prints medians, quartiles and ratios, and writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from environment import environment, headline, save
from peers import write_checkpoint
from timing import in_a_child, turns

from convert import convert

MEASURE = """
import json, sys, time
sys.path[:0] = {path!r}
import torch
def peak():  # KiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
base = peak()
images = torch.zeros(1, 3, 224, 224)
t0, c0 = time.perf_counter(), time.process_time()
{imports}
t1 = time.perf_counter()
model = {load}
t2, c2 = time.perf_counter(), time.process_time()
with torch.inference_mode():
    features = model(images).last_hidden_state
t3 = time.perf_counter()
print(json.dumps({{"import": t1 - t0, "load": t2 - t1, "forward": t3 - t2, "total": t3 - t0,
                   "cpu": c2 - c0, "peak": (peak() - base) / 1024, "checksum": features.double().abs().sum().item()}}))
"""
IMPORT_OURS = "from dinov3_lite import DINOv3ViT"
SOURCES = {
    "converted file": "DINOv3ViT.from_pretrained({folder!r} + '/converted.safetensors')",
    "transformers' folder": "DINOv3ViT.from_pretrained({folder!r})",
}
THEIRS = ("from transformers import DINOv3ViTModel", "DINOv3ViTModel.from_pretrained({folder!r}).eval()")
WHOSE = ("ours", "reference")
SECONDS = ("import", "load", "forward", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variant", default="vitb16")
    parser.add_argument("--reference", type=Path, help="another checkout of this repository, in transformers' place")
    parser.add_argument("--save", default="startup", metavar="NAME")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.variant)
        convert(folder, Path(folder) / "converted.safetensors")
        megabytes = (Path(folder) / "model.safetensors").stat().st_size / 2**20
        contenders = {f"ours, {source}": (IMPORT_OURS, load, []) for source, load in SOURCES.items()}
        if args.reference:
            root = [str(args.reference.resolve())]
            contenders |= {f"reference, {source}": (IMPORT_OURS, load, root) for source, load in SOURCES.items()}
        else:
            contenders["transformers"] = (*THEIRS, [])
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for i, name in turns(contenders, args.rounds + 1):
            run = measure(*contenders[name], folder)
            if i:  # the first round fills caches
                runs[name].append(run)

    checksums = {name: run[0]["checksum"] for name, run in runs.items()}
    *_, reference = checksums.values()
    for name, checksum in checksums.items():
        assert abs(checksum / reference - 1) < 1e-5, f"{name} computes other features: {checksums}"

    result = {"environment": environment(), "variant": args.variant, "megabytes": megabytes, "runs": runs}
    save(args.save, result)
    print(headline(result))
    print(f"{args.variant}, {megabytes:.0f} MiB of float32 weights, 224 x 224 px, batch 1\n")
    print(compared(result) if args.reference else table(result))


def measure(imports: str, load: str, path: list[str], folder: str) -> dict[str, float]:
    code = MEASURE.format(imports=imports, load=load.format(folder=folder), path=path)
    # bytecode is kept, as of packages that pip has installed: ours is written in the first round
    return json.loads(in_a_child("-c", code, cwd=folder, PYTHONDONTWRITEBYTECODE=""))


def compared(result: dict) -> str:
    """Of each source the medians and quartiles of import and load, ours beside the reference's, and their ratio."""
    lines = ["| | | ours ms | reference ms | ratio |", "|---" * 5 + "|"]
    measures = {"import": ("import",), "load": ("load",), "both": ("import", "load"), "both, CPU": ("cpu",)}
    for source in SOURCES:
        for name, keys in measures.items():
            both = [
                [1e3 * sum(run[key] for key in keys) for run in result["runs"][f"{whose}, {source}"]] for whose in WHOSE
            ]
            ours, theirs = map(statistics.median, both)
            cells = [f"{q[1]:.1f} ({q[0]:.1f} to {q[2]:.1f})" for q in (statistics.quantiles(v, n=4) for v in both)]
            lines.append(f"| {source} | {name} | {' | '.join(cells)} | {ours / theirs:.3f} |")
    return "\n".join(lines)


def table(result: dict) -> str:
    """A row a contender: medians, and the ratio of the totals to transformers'."""
    lines = [
        "| | import ms | load ms | first forward ms | total ms (quartiles) | ratio | peak MiB above `import torch` |"
    ]
    lines.append("|---" * 7 + "|")
    runs = result["runs"]
    baseline = statistics.median(run["total"] for run in runs["transformers"])
    for name, measured in runs.items():
        median = {key: statistics.median(run[key] for run in measured) for key in (*SECONDS, "peak")}
        low, _, high = statistics.quantiles([run["total"] for run in measured], n=4)
        cells = [f"{median[key] * 1e3:.0f}" for key in SECONDS[:-1]]
        cells.append(f"{median['total'] * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})")
        cells += [f"{median['total'] / baseline:.3f}", f"{median['peak']:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
