"""A model prepared for inference on a CPU beside the model as loaded: times, memory, what was chosen, and overhead.

    python benchmarks/prepared.py [--rows vitb16:float32:224x1 vitb16:bfloat16:512x1 ...] [--rounds 7] [--save NAME]

Times in interleaved rounds of rotated order, no gradients. Memory is the peak of a process of its own that loads a
checkpoint, prepares and runs twice, above what its imports take, the choices known; beside it the weights alone.
"Overhead" is a forward of a model of the same depth, 32 channels and 5 tokens, in which nothing but Python and
dispatching takes time. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from environment import environment, headline, save
from peers import write_checkpoint
from timing import in_a_child, interleaved, median_ratio, process_mib, spread

from dinov3_lite import DINOv3Config, DINOv3ViT, optimize_for_inference

ROWS = [f"{row}" for row in ("vitb16:float32:224x1", "vitb16:bfloat16:224x1", "vitb16:bfloat16:224x8")]
ROWS += ["vitb16:bfloat16:512x1", "vitb16:float32:512x1", "vits16:float32:224x1", "vits16:bfloat16:224x1"]
WAYS = ("as loaded", "prepared for all sizes", "prepared for this size")


def made(way: str, source: DINOv3ViT | Path, dtype: torch.dtype) -> DINOv3ViT:
    """No second name holds the model that was loaded."""
    if isinstance(source, Path):
        if way == "as loaded":
            return DINOv3ViT.from_pretrained(source, dtype=dtype)
        return optimize_for_inference(DINOv3ViT.from_pretrained(source, dtype=dtype), dynamic="all sizes" in way)
    return source if way == "as loaded" else optimize_for_inference(source, dynamic="all sizes" in way)


def measure(folder: Path, row: str, rounds: int) -> dict:
    variant, dtype, shape = row.split(":")
    pixels, batch = map(int, shape.split("x"))
    checkpoint = folder / variant
    if not checkpoint.exists():
        write_checkpoint(checkpoint, variant)
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    loaded = DINOv3ViT.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    models = {way: made(way, loaded, loaded.dtype) for way in WAYS}
    seconds = interleaved({way: lambda m=model: m(images) for way, model in models.items()}, rounds)
    weights = sum(p.nbytes for p in loaded.parameters()) / 2**20
    explained = {way: model.explain() for way, model in models.items() if way != "as loaded"}
    tiny = replace(
        DINOv3Config.from_name(variant), hidden_size=32, num_attention_heads=2, intermediate_size=64, patch_size=8
    )
    small = DINOv3ViT(tiny).to(loaded.dtype).eval()
    smalls = {way: made(way, small, small.dtype) for way in WAYS}
    nothing = torch.zeros(1, 3, 8, 8)
    overhead = interleaved({way: lambda m=model: m(nothing) for way, model in smalls.items()}, 5 * rounds, repeats=5)
    del models, loaded
    memory = {way: float(in_a_child(__file__, "--memory-of", way, checkpoint, dtype, shape)) for way in WAYS}
    return {
        **{"row": row, "seconds": seconds, "overhead": overhead, "peak MiB": memory, "weights MiB": weights},
        "explained": explained,
    }


def memory_of(way: str, checkpoint: str, dtype: str, shape: str) -> float:
    pixels, batch = map(int, shape.split("x"))
    images = torch.randn(batch, 3, pixels, pixels)
    before = process_mib("VmRSS")
    model = made(way, Path(checkpoint), getattr(torch, dtype))
    for _ in range(2):
        model(images)
    return process_mib("VmHWM") - before


def table(result: dict) -> str:
    lines = ["| | ms (quartiles) | ratio to loaded | overhead ms | peak MiB | weights MiB |", "|---" * 6 + "|"]
    for row in result["rows"]:
        for way, seconds in row["seconds"].items():
            ratio = median_ratio(seconds, row["seconds"]["as loaded"])
            lines.append(
                f"| {row['row']}: {way} | {spread(seconds)} | {ratio:.2f} | {spread(row['overhead'][way])} "
                f"| {row['peak MiB'][way]:.0f} | {row['weights MiB']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", default="prepared", metavar="NAME")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if args.memory_of:
            print(memory_of(*args.memory_of))
            return
        result = {"rows": [measure(Path(folder), row, args.rounds) for row in args.rows]}
    result = {"environment": environment(), **result}
    save(args.save, result)
    print(headline(result), table(result), sep="\n\n")


if __name__ == "__main__":
    main()
