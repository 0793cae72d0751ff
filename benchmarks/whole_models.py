"""Whole models on our kernels beside PyTorch's: error, forwards, CUDA graphs at batch 1, training steps, packed images.

    python benchmarks/whole_models.py [parity forward graphs training packed] [--variants vits16 vitb16] [--small]

The weights are made. Errors are those of last_hidden_state against the same model in float64, relative. Times are in
bfloat16, of interleaved rounds. Without a GPU a tiny model is run once, in Triton's interpreter: a rehearsal, whose
errors count and which times nothing. Writes benchmarks/results/whole_models_cuda.json, rows of other parts are kept.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from environment import RESULTS, environment, headline, save
from timing import interleaved, relative_difference, spread
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from dinov3_lite import DINOv3Config, DINOv3ViT  # noqa: E402
from dinov3_lite.sample import made_weights  # noqa: E402

TINY = DINOv3Config(hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3)
ATTENTION = ("triton", "sdpa")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # which the interpreter multiplies
ROUNDS, REPEATS = 10, 5
PACK = [(224, 224), (512, 512), (384, 256), (96, 96), (224, 448)]


def made(variant: str, dtype: torch.dtype, attention: str) -> DINOv3ViT:
    config = TINY if variant == "tiny" else DINOv3Config.from_name(variant)
    model = DINOv3ViT(config, attention=attention)
    model.load_state_dict(made_weights(config))
    return model.to(DEVICE, dtype).eval()


def pictures(batch: int, pixels: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, pixels, pixels, generator=generator).to(DEVICE, dtype)


@torch.no_grad()
def parity(variant: str) -> Iterator[dict]:
    """Each attention and dtype against float64, eager."""
    pixels = 32 if variant == "tiny" else 224
    truth = made(variant, torch.float64, "eager")(pictures(2, pixels, torch.float64)).last_hidden_state
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
    for dtype in dtypes:
        errors = {}
        for attention in ATTENTION:
            out = made(variant, dtype, attention)(pictures(2, pixels, dtype)).last_hidden_state
            errors[attention] = relative_difference(out, truth)
        yield {"dtype": str(dtype).removeprefix("torch."), "error": errors}


@torch.no_grad()
def forward(variant: str) -> Iterator[dict]:
    """Images a forward: one, and as many as keep the GPU busy; our kernels, PyTorch's, and each compiled."""
    models = {name: made(variant, HALF, name) for name in ATTENTION}
    calls = models | {f"{name}, compiled": torch.compile(model, dynamic=False) for name, model in models.items()}
    for pixels, batch in ((224, 1), (224, 64), (512, 1), (512, 16)) if variant != "tiny" else ((32, 2),):
        images = pictures(batch, pixels, HALF)
        yield {"pixels": pixels, "batch": batch, **times({name: partial(call, images) for name, call in calls.items()})}


@torch.no_grad()
def graphs(variant: str) -> Iterator[dict]:
    """One image, launched by the host each time, and replayed from a CUDA graph."""
    for pixels in (224, 512):
        images, calls = pictures(1, pixels, HALF), {}
        for name in ATTENTION:
            model = made(variant, HALF, name)
            calls[name] = partial(model, images)
            calls[f"{name}, graph"] = captured(calls[name]).replay
        yield {"pixels": pixels, "batch": 1, **times(calls)}


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of a call that ran before: kernels are compiled, and checked, outside of it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def training(variant: str) -> Iterator[dict]:
    """Forward and gradients of all weights, under bfloat16 autocast."""
    batch, pixels = (32, 224) if variant != "tiny" else (2, 32)
    images, calls = pictures(batch, pixels, torch.float32), {}
    for name in ATTENTION:
        model = made(variant, torch.float32, name).train()
        for label, run in ((name, model), (f"{name}, compiled", torch.compile(model, dynamic=False))):
            calls[label] = partial(step, run, model, images)
    yield {"pixels": pixels, "batch": batch, **times(calls)}


def step(run: Callable[[Tensor], object], model: DINOv3ViT, images: Tensor) -> None:
    model.zero_grad()
    with torch.autocast(DEVICE, HALF):
        loss = run(images).last_hidden_state.float().square().mean()
    loss.backward()


@torch.no_grad()
def packed(variant: str) -> Iterator[dict]:
    """Images of many sizes in one pack."""
    sizes = 4 * PACK if variant != "tiny" else [(16, 16), (32, 48)]
    images = [pictures(1, max(size), HALF)[0, :, : size[0], : size[1]] for size in sizes]
    models = {name: made(variant, HALF, name) for name in ATTENTION}
    yield {
        "images": len(images),
        **times({name: partial(model.forward_packed, images) for name, model in models.items()}),
    }


def times(calls: dict[str, Callable[[], object]]) -> dict[str, dict]:
    """Seconds of every call that runs; the reason for one that doesn't. Without a GPU, a single run."""
    if DEVICE == "cpu":
        ran = [name for name in calls if "compiled" not in name]
        for name in ran:
            calls[name]()
        return {"rehearsed": dict.fromkeys(ran, "ran, not timed")}
    running, missing = {}, {}
    for name, call in calls.items():
        try:
            call()
            running[name] = call
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return {"seconds": interleaved(running, ROUNDS, REPEATS), "missing": missing}


PARTS: dict[str, Callable[[str], Iterator[dict]]] = {
    "parity": parity,
    "forward": forward,
    "graphs": graphs,
    "training": training,
    "packed": packed,
}


def table(rows: list[dict]) -> str:
    """A line a row and contender."""
    lines = ["| part, variant | what | who | error, or ms (quartiles) |", "|---" * 4 + "|"]
    for row in rows:
        words = ", ".join(f"{key} {row[key]}" for key in ("dtype", "pixels", "batch", "images") if key in row)
        cells = {name: f"{error:.2e}" for name, error in row.get("error", {}).items()}
        cells |= {name: spread(seconds) for name, seconds in row.get("seconds", {}).items()}
        cells |= row.get("missing", {}) | row.get("rehearsed", {})
        lines += [f"| {row['part']}, {row['variant']} | {words} | {name} | {cell} |" for name, cell in cells.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--variants", nargs="+", default=["vits16", "vitb16", "vitl16"])
    parser.add_argument("--small", action="store_true", help="a tiny model instead")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"part {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    variants = ["tiny"] if args.small or DEVICE == "cpu" else args.variants
    rows: list[dict] = []
    for part in args.parts:
        if part == "graphs" and DEVICE == "cpu":
            print("graphs: skipped, there is no GPU to capture one")
            continue
        for variant in variants:
            rows += [{"part": part, "variant": variant, **row} for row in PARTS[part](variant)]
            print(table(rows[-1:]), flush=True)
    result = {"environment": environment("triton"), "rows": rows}
    if DEVICE == "cuda":
        file = RESULTS / "whole_models_cuda.json"
        before = json.loads(file.read_text())["rows"] if file.exists() else []
        result["rows"] = [row for row in before if row["part"] not in args.parts] + rows
        save("whole_models_cuda", result)
    print(headline(result), table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
