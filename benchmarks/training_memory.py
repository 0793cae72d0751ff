"""Peak memory of each process that trains a model together with others: examples/distributed, started by torchrun.

    python benchmarks/training_memory.py [--variant vitb16] [--dry]

On CPUs, of which the peak is that of the process's resident memory: torch itself and mapped pages are in it, and the
first row says how much that is. Weights are random. Writes benchmarks/results/training_memory.json.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import environment, headline, save

from dinov3_lite import DINOv3ViT

EXAMPLES = Path(__file__).parent.parent / "examples" / "distributed"
OPTIONS = ("--steps", 2, "--batch", 4, "--size", 64)
TRAINED, WIDE, NOTHING = "trained", "7B's width, two blocks, bfloat16", "torch and a model of 3 M"
# what is measured: model, processes, script and its options
RUNS: dict[str, tuple[str, int, tuple[Any, ...]]] = {
    "`ddp.py`, one process": (NOTHING, 1, ("ddp.py",)),
    "`ddp.py`": (TRAINED, 2, ("ddp.py",)),
    "`sharded.py` (FSDP2)": (TRAINED, 2, ("sharded.py",)),
    "`sharded.py --tp 2`": (TRAINED, 2, ("sharded.py", "--tp", 2)),
    "`frozen.py`, one process": (WIDE, 1, ("frozen.py",)),
    "`frozen.py`": (WIDE, 2, ("frozen.py",)),
}


def measure(model: Path, processes: int, script: str, *options: object) -> list[int]:
    """Peak of each process, MB."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    words = (*command, EXAMPLES / script, "--model", model, *OPTIONS, *options)
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system: peaks are of what is used
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=os.environ | returned)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = re.search(r"^peak memory of each process, MB: ([\d ]+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    return [int(peak) for peak in found[1].split()]


def write_models(root: Path, variant: str) -> dict[str, Path]:
    """Each in one converted file, of which a process maps what it needs."""
    import torch

    models = {
        NOTHING: DINOv3ViT.from_name("vits16", num_hidden_layers=1),
        TRAINED: DINOv3ViT.from_name(variant),
        WIDE: DINOv3ViT.from_name("vit7b16", num_hidden_layers=2),
    }
    models[WIDE] = models[WIDE].to(torch.bfloat16)
    return {name: model.save_pretrained(root / f"{i}.safetensors") for i, (name, model) in enumerate(models.items())}


def table(result: dict[str, Any]) -> str:
    """A row for each run."""
    lines = ["| script | model | processes | peak of each, MB |", "|---|---|--:|---|"]
    for name, row in result["rows"].items():
        model = result["variant"] if row["model"] == TRAINED else row["model"]
        lines.append(f"| {name} | {model} | {len(row['peaks'])} | {', '.join(map(str, row['peaks']))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vitb16", help="that is trained (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="print only, write no results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder), args.variant)
        rows = {}
        for name, (model, processes, words) in RUNS.items():
            rows[name] = {"model": model, "peaks": measure(models[model], processes, *words)}
            print(name, rows[name]["peaks"], flush=True)
    result = {"environment": environment(), "variant": args.variant, "rows": rows}
    if not args.dry:
        save("training_memory", result)
    print(headline(result), table(result), sep="\n\n")


if __name__ == "__main__":
    main()
