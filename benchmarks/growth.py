"""How time and memory grow with tokens and with the batch: medians, and the exponents of fitted power laws.

    python benchmarks/growth.py [--variant vits16] [--rounds 5]

Each path runs in a process of its own, without gradients. Memory is the peak of a forward above what was in use before
it: activations. Writes benchmarks/results/growth.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import torch
from environment import environment, headline, save
from peers import ours, write_checkpoint
from timing import in_a_child, once, peak_mib

SIDES = (256, 384, 512, 768, 1024)
BATCHES = (1, 2, 4, 8, 16)
PATHS = {
    "forward": lambda model, x: model(x),
    "forward, hidden states": lambda model, x: model(x, output_hidden_states=True),
    "four intermediate layers": lambda model, x: model.get_intermediate_layers(x, "quarters"),
    "packed": lambda model, x: model.forward_packed([*x, x[0, :, :32]]),
    "attention map": lambda model, x: model.attention_maps(x),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="vits16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--path", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.path:
        print(json.dumps(measure(*args.path, args.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / args.variant, args.variant)
        result = {"environment": environment(), "variant": args.variant, "paths": {}}
        for path in PATHS:
            printed = in_a_child(__file__, "--rounds", args.rounds, "--path", path, checkpoint)
            result["paths"][path] = json.loads(printed)
    save("growth", result)
    print(headline(result), table(result), sep="\n\n")


@torch.inference_mode()
def measure(path: str, checkpoint: str, rounds: int) -> dict[str, list[list[float]]]:
    """[tokens or images, median seconds, peak MiB] for growing pictures and growing batches."""
    model, run = ours(Path(checkpoint)), PATHS[path]
    run(model, torch.zeros(1, 3, 224, 224))

    def point(count: int, images: torch.Tensor) -> list[float]:
        memory = peak_mib(lambda: run(model, images))
        return [count, statistics.median(once(lambda: run(model, images)) for _ in range(rounds)), memory]

    prefix = model.num_prefix_tokens
    return {
        "tokens": [point(prefix + (side // 16) ** 2, torch.zeros(1, 3, side, side)) for side in SIDES],
        "batch": [point(batch, torch.zeros(batch, 3, 224, 224)) for batch in BATCHES],
    }


def exponent(points: list[list[float]], column: int) -> float:
    """The slope of a straight line through the logarithms."""
    xs, ys = ([math.log(max(point[i], 1e-9)) for point in points] for i in (0, column))
    return statistics.linear_regression(xs, ys).slope


def table(result: dict) -> str:
    """A line a path: exponents over tokens and over the batch, and the largest picture's figures."""
    head = ["", "time ~ tokens^", "memory ~ tokens^", "time ~ batch^", "memory ~ batch^", "1024 px: ms", "MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for path, grown in result["paths"].items():
        cells = [f"{exponent(grown[over], column):.2f}" for over in ("tokens", "batch") for column in (1, 2)]
        _, seconds, memory = grown["tokens"][-1]
        lines.append(f"| {path} | " + " | ".join([*cells, f"{1e3 * seconds:.0f}", f"{memory:.0f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
