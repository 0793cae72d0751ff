"""What each optimisation is worth by itself: a forward with one of them undone, or with one that was not taken.

    python benchmarks/steps.py [--variant vitb16] [--rows 224x1 512x1 224x8] [--dtypes float32 bfloat16] [--rounds 7]

Times in one process, interleaved rounds in rotated order, no gradients, on a CPU. Page faults, memory that the
allocator gave back and has to fetch anew, of the third forward of a process of its own: one with a past keeps more.
Writes benchmarks/results/steps.json, a row as soon as it is measured.
"""

from __future__ import annotations

import argparse
import copy
import resource
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from environment import environment, headline, save
from timing import in_a_child, interleaved, median_ratio, relative_difference, spread
from torch import Tensor, nn

from dinov3_lite import DINOv3Config, DINOv3Output, DINOv3ViT, layers, optimize_for_inference, prepacked, rope
from dinov3_lite.folding import fold
from dinov3_lite.sample import made_weights

NOW = "eager"
Run = Callable[[Tensor], DINOv3Output]


def activations_apart(model: DINOv3ViT) -> Run:
    def activate(name: str, hidden: Tensor, projection: nn.Module) -> Tensor:
        return getattr(F, name)(hidden)

    def run(images: Tensor) -> DINOv3Output:
        with patch.object(layers, "activate", activate):
            return model(images)

    return run


def rotation_apart(model: DINOv3ViT) -> Run:
    def run(images: Tensor) -> DINOv3Output:
        with patch.object(rope, "writes_in_place", lambda x: False):
            return model(images)

    return run


def small_pages(model: DINOv3ViT) -> Run:
    prepared = optimize_for_inference(model, backend="prepacked", dynamic=False)

    def run(images: Tensor) -> DINOv3Output:
        with patch.object(prepacked, "to_huge_pages", lambda address, size: None):
            return prepared(images)

    return run


def narrow(model: DINOv3ViT) -> DINOv3ViT:
    result = copy.deepcopy(model)
    result.residual_dtype = result.dtype
    return result


def folded(model: DINOv3ViT) -> DINOv3ViT:
    result = copy.deepcopy(model)
    result.blocks = nn.ModuleList(map(fold, model.blocks))
    return result


def frozen(model: DINOv3ViT) -> Run:
    """A static graph with inductor's freezing, a switch of the process: on while this compiles."""
    import torch._inductor.config

    compiled = torch.compile(folded(model), fullgraph=True, dynamic=False)

    def run(images: Tensor) -> DINOv3Output:
        with torch._inductor.config.patch(freezing=True):
            return compiled(images)

    return run


STEPS: dict[str, Callable[[DINOv3ViT], Run]] = {
    NOW: lambda model: model,
    "eager, activations not in place": activations_apart,
    "eager, RoPE not in place": rotation_apart,
    "eager, LayerScale folded": folded,
    "eager, bfloat16 stream": narrow,
    "prepacked for all sizes": lambda model: optimize_for_inference(model, backend="prepacked"),
    "prepacked for this size": lambda model: optimize_for_inference(model, backend="prepacked", dynamic=False),
    "prepacked for this size, weights in small pages": small_pages,
    "compiled for all sizes": lambda model: optimize_for_inference(model, backend="inductor"),
    "compiled for this size": lambda model: optimize_for_inference(model, backend="inductor", dynamic=False),
    "compiled for this size, frozen": frozen,
}
OF_ONE_DTYPE = {"eager, bfloat16 stream": "bfloat16", "compiled for this size, frozen": "float32"}
AGREEMENT = {"float32": 1e-5, "bfloat16": 3e-2}  # of last_hidden_state with the eager model's


def made(variant: str, dtype: str) -> DINOv3ViT:
    config = DINOv3Config.from_name(variant)
    model = DINOv3ViT(config).eval()
    model.load_state_dict(made_weights(config))
    return model.to(getattr(torch, dtype))


def made_images(pixels: int, batch: int, dtype: str) -> Tensor:
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    return images.to(getattr(torch, dtype))


def measure(variant: str, pixels: int, batch: int, dtype: str, rounds: int) -> dict:
    torch._dynamo.reset()
    model, images = made(variant, dtype), made_images(pixels, batch, dtype)
    steps = {name: step for name, step in STEPS.items() if OF_ONE_DTYPE.get(name, dtype) == dtype}
    runs = {name: step(model) for name, step in steps.items()}
    reference = model(images).last_hidden_state
    for name, run in runs.items():
        assert relative_difference(run(images).last_hidden_state, reference) < AGREEMENT[dtype], name
    seconds = interleaved({name: lambda run=run: run(images) for name, run in runs.items()}, rounds)
    words = ("--variant", variant, "--faults-of")
    faults = {name: int(in_a_child(__file__, *words, name, pixels, batch, dtype)) for name in steps}
    return {"pixels": pixels, "batch": batch, "dtype": dtype, "seconds": seconds, "faults": faults}


def faults_of(variant: str, name: str, pixels: int, batch: int, dtype: str) -> int:
    """Page faults of the third forward of this process."""
    run, images = STEPS[name](made(variant, dtype)), made_images(pixels, batch, dtype)
    for _ in range(2):
        run(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(images)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def table(result: dict) -> str:
    """A row a contender and shape: times, the time's ratio to the eager forward as it is, and page faults."""
    lines = ["| | ms (quartiles) | time, ratio to eager | page faults |", "|---" * 4 + "|"]
    for row in result["rows"]:
        for name, times in row["seconds"].items():
            label = f"{row['dtype']}, {row['pixels']} px, batch {row['batch']}: {name}"
            ratio = median_ratio(times, row["seconds"][NOW])
            lines.append(f"| {label} | {spread(times)} | {ratio:.2f} | {row['faults'][name]:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="vitb16")
    parser.add_argument("--rows", nargs="+", default=["224x1", "512x1", "224x8"], metavar="PIXELSxBATCH")
    parser.add_argument("--dtypes", nargs="+", default=list(AGREEMENT), choices=list(AGREEMENT))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--faults-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with torch.no_grad():
        if args.faults_of:
            name, pixels, batch, dtype = args.faults_of
            print(faults_of(args.variant, name, int(pixels), int(batch), dtype))
            return
        rows: list[dict] = []
        for dtype in args.dtypes:
            for row in args.rows:
                rows.append(measure(args.variant, *map(int, row.split("x")), dtype, args.rounds))
                result = {"environment": environment(), "variant": args.variant, "rows": rows}
                save("steps", result)
    print(headline(result), table(result), sep="\n\n")


if __name__ == "__main__":
    main()
