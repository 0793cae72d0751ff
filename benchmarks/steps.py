"""What each optimisation is worth by itself: a forward with one of them undone, or with one that was not taken.

    python benchmarks/steps.py [--variant vitb16] [--rows 224x1 512x1 224x8] [--rounds 7]

One process, interleaved rounds in rotated order, no gradients, float32 on a CPU. Page faults are those of one forward:
memory that the allocator gave back and had to fetch anew. Writes benchmarks/results/steps.json.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
import torch.nn.functional as F
from environment import environment, headline, save
from timing import interleaved, median_ratio, relative_difference, spread
from torch import Tensor, nn

from dinov3_lite import DINOv3Config, DINOv3ViT, attention, compile, layers
from dinov3_lite.inference import fold
from dinov3_lite.sample import made_weights

NOW = "eager"


def activate_apart(name: str, hidden: Tensor, projection: nn.Module) -> Tensor:
    return getattr(F, name)(hidden)


def rope_in_seven_passes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class PackedByMKL(nn.Module):
    """A Linear whose weight MKL holds in its own layout, for one number of rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight, self.bias, self.rows = linear.weight, linear.bias, rows
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(linear.weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, self.rows)


def packed_by_mkl(model: DINOv3ViT, rows: int) -> nn.Module:
    folded = fold(model)
    for block in folded.blocks:
        block.attn.proj = PackedByMKL(block.attn.proj, rows)
        block.mlp.fc1, block.mlp.fc2 = PackedByMKL(block.mlp.fc1, rows), PackedByMKL(block.mlp.fc2, rows)
    return folded


class Frozen:
    """A static graph with inductor's freezing, a switch of the process: on while this compiles."""

    def __init__(self, model: DINOv3ViT) -> None:
        self.run = torch.compile(fold(model), fullgraph=True, dynamic=False)

    def __call__(self, images: Tensor):
        import torch._inductor.config

        with torch._inductor.config.patch(freezing=True):
            return self.run(images)


def contenders(model: DINOv3ViT, images: Tensor) -> dict[str, Callable[[Tensor], object]]:
    def undone(module: object, name: str, before: object) -> Callable[[Tensor], object]:
        def run(images: Tensor) -> object:
            with patch.object(module, name, before):
                return model(images)

        return run

    tokens = model.num_prefix_tokens + (images.shape[-1] // model.patch_size) ** 2
    return {
        NOW: model,
        "eager, activations not in place": undone(layers, "activate", activate_apart),
        "eager, RoPE in seven passes": undone(attention, "apply_rope", rope_in_seven_passes),
        "eager, LayerScale folded": fold(model),
        "eager, folded, packed by MKL for these rows": packed_by_mkl(model, len(images) * tokens),
        "eager, folded, prepacked by oneDNN": compile(model, backend="onednn"),
        "compiled for this shape": compile(model, backend="inductor", dynamic=False),
        "compiled for this shape, frozen": Frozen(model),
        "compiled for all sizes": compile(model, backend="inductor"),
    }


@contextlib.contextmanager
def faults_counted(into: list[int]) -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    yield
    into.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def measure(model: DINOv3ViT, pixels: int, batch: int, rounds: int) -> dict:
    torch._dynamo.reset()
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    models = contenders(model, images)
    reference = model(images).last_hidden_state
    faults: dict[str, list[int]] = {name: [] for name in models}
    for name, run in models.items():
        assert relative_difference(run(images).last_hidden_state, reference) < 1e-5, name

    def counted(name: str) -> Callable[[], object]:
        def call() -> object:
            with faults_counted(faults[name]):
                return models[name](images)

        return call

    seconds = interleaved({name: counted(name) for name in models}, rounds)
    return {
        "pixels": pixels,
        "batch": batch,
        "seconds": seconds,
        "faults": {name: sorted(n)[len(n) // 2] for name, n in faults.items()},
    }


def table(result: dict) -> str:
    """A row a contender and shape: times, the time's ratio to the eager forward as it is, and page faults."""
    lines = ["| | ms (quartiles) | time, ratio to eager | page faults |", "|---" * 4 + "|"]
    for row in result["rows"]:
        for name, times in row["seconds"].items():
            label = f"{row['pixels']} px, batch {row['batch']}: {name}"
            ratio = median_ratio(times, row["seconds"][NOW])
            lines.append(f"| {label} | {spread(times)} | {ratio:.2f} | {row['faults'][name]:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="vitb16")
    parser.add_argument("--rows", nargs="+", default=["224x1", "512x1", "224x8"], metavar="PIXELSxBATCH")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    config = DINOv3Config.from_name(args.variant)
    model = DINOv3ViT(config).eval()
    model.load_state_dict(made_weights(config))
    with torch.no_grad():
        rows = [measure(model, *map(int, row.split("x")), args.rounds) for row in args.rows]
    result = {"environment": environment(), "variant": args.variant, "rows": rows}
    save("steps", result)
    print(headline(result), table(result), sep="\n\n")


if __name__ == "__main__":
    main()
