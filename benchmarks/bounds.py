"""What bounds a prepared model on a CPU: its products and its attention, within a forward and alone, beside OpenVINO's.

    python benchmarks/bounds.py [--rows vitb16:bfloat16:224x1 ...] [--rounds 15] [--folder FOLDER] [--save NAME]

"Within" is what the products (the first layer's too, with the activation that is in a product's own call) and the
attention of a forward take of it, PyTorch's dispatching included; "alone" the same calls, in the same order, with
nothing between them. The rest are LayerNorm, RoPE, residuals, casts and Python. OpenVINO's parts are its own counters':
whatever is no fully connected layer, convolution or attention is its rest. Rounds are interleaved, in rotated order.

Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compare import made_images
from environment import environment, headline, save
from peers import PRECISIONS, compiled_by_openvino, ours, write_checkpoint
from timing import once, spread, turns
from torch import Tensor

from dinov3_lite import optimize_for_inference
from dinov3_lite.projection import Projection
from dinov3_lite.stand_ins import PreparedAttention

ROWS = [f"{variant}:{dtype}:224x1" for dtype in ("bfloat16", "float32") for variant in ("vits16", "vitb16")]
ROWS += [f"vitb16:{dtype}:{shape}" for dtype in ("bfloat16", "float32") for shape in ("224x8", "512x1")]
PARTS = ("products", "attention")
Seconds = dict[str, list[float]]  # of each round, by what they are of


def measure(folder: Path, row: str, rounds: int) -> dict[str, Any]:
    variant, dtype, shape = row.split(":")
    pixels, batch = map(int, shape.split("x"))
    checkpoint, images = write_checkpoint(folder / variant, variant), made_images(pixels, batch)
    fast = optimize_for_inference(ours(checkpoint, getattr(torch, dtype)), dynamic=False)
    fast(images)
    request = openvino_request(checkpoint, images, PRECISIONS[getattr(torch, dtype)])
    attends = attending(request)
    calls: dict[str, list[Callable[[], object]]] = {part: [] for part in PARTS}

    def record(part: str, function: Callable[..., object], *args: Any) -> object:
        calls[part].append(partial(function, *args))
        return function(*args)

    with watched(record):
        fast(images)

    def alone(part: str) -> None:
        for call in calls[part]:
            call()

    def within() -> None:
        fast(images)
        taken = dict.fromkeys(PARTS, 0.0)

        def add(part: str, function: Callable[..., object], *args: Any) -> object:
            start = time.perf_counter()
            result = function(*args)
            taken[part] += time.perf_counter() - start
            return result

        with watched(add):
            fast(images)
        note(seconds, {f"ours, {part} within": took for part, took in taken.items()})

    def theirs() -> None:
        request.infer()
        note(seconds, {"OpenVINO": once(request.infer)})
        note(seconds, {f"OpenVINO, {part}": took for part, took in counted(request, attends).items()})

    def timed(name: str, call: Callable[[], object]) -> None:
        call()
        note(seconds, {name: once(call)})

    seconds: Seconds = {}
    steps = {"ours": partial(timed, "ours", partial(fast, images)), "within": within, "OpenVINO": theirs}
    steps |= {part: partial(timed, f"ours, {part} alone", partial(alone, part)) for part in PARTS}
    for _, name in turns(steps, rounds):
        steps[name]()
    return {"row": row, "seconds": seconds}


def note(seconds: Seconds, of_a_round: dict[str, float]) -> None:
    for name, took in of_a_round.items():
        seconds.setdefault(name, []).append(took)


@contextmanager
def watched(see: Callable[..., object]) -> Iterator[None]:
    """Have `see(part, function, *args)` called for every product and every attention of a prepared model."""
    with ExitStack() as stack:
        for part, owner, name in zip(PARTS, (Projection, PreparedAttention), ("forward", "_one_size"), strict=True):
            function = getattr(owner, name)

            def seen(*args: Any, part: str = part, function: Callable[..., object] = function) -> object:
                return see(part, function, *args)

            stack.enter_context(patch.object(owner, name, seen))
        yield


def openvino_request(checkpoint: Path, images: Tensor, precision: str) -> Any:
    """A request of OpenVINO's with counters, that holds its images."""
    import openvino

    config = {"INFERENCE_PRECISION_HINT": precision, "PERF_COUNT": True}
    request = compiled_by_openvino(checkpoint, images.shape, **config).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images.numpy().copy()))
    return request


def counted(request: Any, attends: set[str]) -> dict[str, float]:
    """Seconds of each part of the last run, by OpenVINO's counters."""
    taken = dict.fromkeys(PARTS, 0.0)
    for node in request.profiling_info:
        if node.node_type in ("FullyConnected", "Convolution"):
            taken["products"] += node.real_time.total_seconds()
        elif node.node_name in attends:
            taken["attention"] += node.real_time.total_seconds()
    return taken


def attending(request: Any) -> set[str]:
    """The names of the nodes that attend: what was fused keeps the names of what it is made of."""
    nodes = request.get_compiled_model().get_runtime_model().get_ops()
    made_of = {node.get_friendly_name(): str(node.get_rt_info()["originalLayersNames"].value) for node in nodes}
    return {name for name, parts in made_of.items() if "attention" in parts}


def table(result: dict[str, Any]) -> str:
    """Milliseconds; and how many times as long as OpenVINO's whole forward takes, if ours were its products and
    attention alone.
    """
    head = ("", "ours", "products within", "alone", "attention within", "alone", "rest")
    head += ("OpenVINO", "products", "attention", "rest", "OpenVINO over ours", "over ours without the rest")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        ms = {name: 1e3 * statistics.median(times) for name, times in row["seconds"].items()}
        products, attention = (ms[f"ours, {part} within"] for part in PARTS)
        their_products, their_attention = (ms[f"OpenVINO, {part}"] for part in PARTS)
        cells = [products, ms["ours, products alone"], attention, ms["ours, attention alone"]]
        cells += [ms["ours"] - products - attention]
        theirs = [their_products, their_attention, ms["OpenVINO"] - their_products - their_attention]
        ratios = [ms["OpenVINO"] / ms["ours"], ms["OpenVINO"] / (products + attention)]
        lines.append(
            f"| {row['row']} | {spread(row['seconds']['ours'])} | {' | '.join(f'{cell:.1f}' for cell in cells)} "
            f"| {spread(row['seconds']['OpenVINO'])} | {' | '.join(f'{cell:.1f}' for cell in theirs)} "
            f"| {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where checkpoints and ONNX files are kept (default: nowhere)")
    parser.add_argument("--save", default="bounds", metavar="NAME")
    args = parser.parse_args()
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        result: dict[str, Any] = {"rows": [measure(folder, row, args.rounds) for row in args.rows]}
    result = {"environment": environment("openvino"), **result}
    save(args.save, result)
    print(headline(result), table(result), sep="\n\n")


if __name__ == "__main__":
    main()
