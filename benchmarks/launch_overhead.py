"""What a call of each kernel costs the host: checks, dispatch, strides, launch; beside PyTorch's own operations.

    python benchmarks/launch_overhead.py [--no-save]

Without a GPU the kernels are stubs that do nothing, so what is counted is our Python and PyTorch's dispatch, on tensors
so small that PyTorch's own operations do next to nothing either. On a GPU the kernels are launched, and the GPU is not
waited for. Microseconds of a call, the least of many rounds. Writes benchmarks/results/launch_overhead_cpu.json or
.._cuda.json.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from unittest.mock import patch

import torch
import torch.nn.functional as F
from environment import environment, headline, save

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from dinov3_lite.kernels import add_layer_norm, rope_attention, swiglu, tuning  # noqa: E402

from dinov3_lite.attention import sdpa_attention  # noqa: E402

KERNELS = {
    "rotate_triton": ("rotate",),
    "rope_attention_triton": ("rope_attention_forward",),
    "rope_attention_backward_triton": ("rope_attention_backward_q", "rope_attention_backward_kv"),
    "layer_norm_triton": ("add_layer_norm_forward", "add_layer_norm_backward"),
    "swiglu_triton": ("swiglu_forward", "swiglu_backward"),
}
ROUNDS, CALLS = 200, 50


class Stub:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, **arguments: object) -> None:
        pass


@contextmanager
def stubs() -> Iterator[None]:
    """Every kernel a stub, and none checked at its first use: what they compute is no number."""
    with patch.object(tuning, "is_measured", lambda *use: True):
        patches = [
            patch.object(import_module(f"dinov3_lite.kernels.{file}"), f"{name}_kernel", Stub())
            for file, names in KERNELS.items()
            for name in names
        ]
        for each in patches:
            each.start()
        yield
        for each in patches:
            each.stop()


def microseconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The least of the rounds: whatever else the machine does only adds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return round(1e6 * best, 1)


def calls() -> dict[str, dict[str, Callable[[], object]]]:
    """By name of the row: our kernel, and what PyTorch has instead."""
    options = {"dtype": torch.bfloat16 if DEVICE == "cuda" else torch.float16, "device": DEVICE}
    qkv = torch.randn(1, 6, 3, 1, 16, **options)
    q, k, v = qkv.unbind(2)
    cos, sin = torch.ones(6, 8, device=DEVICE), torch.zeros(6, 8, device=DEVICE)
    x, vector = torch.randn(1, 6, 16, **options), torch.ones(16, **options)
    leaf = qkv.clone().requires_grad_()
    trained = leaf.unbind(2)

    def gradients(out: torch.Tensor) -> object:
        return torch.autograd.grad(out, leaf, out.detach())

    return {
        "attention, inference": {
            "kernels": lambda: rope_attention(q, k, v, cos, sin),
            "PyTorch, with the rotation": lambda: sdpa_attention(q, k, v, cos, sin),
            "PyTorch's attention alone": lambda: F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v))
            ),
        },
        "attention, training step": {
            "kernels": lambda: gradients(rope_attention(*trained, cos, sin)),
            "PyTorch, with the rotation": lambda: gradients(sdpa_attention(*trained, cos, sin)),
            "PyTorch's attention alone": lambda: gradients(
                F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in trained)).transpose(1, 2)
            ),
        },
        "add_layer_norm, inference": {
            "kernels": lambda: add_layer_norm(x, x, vector, vector, vector, 1e-5),
            "PyTorch": lambda: F.layer_norm(torch.addcmul(x, x, vector), (16,), vector, vector, 1e-5),
        },
        "swiglu, inference": {
            "kernels": lambda: swiglu(x),
            "PyTorch": lambda: F.silu(x[..., :8]) * x[..., 8:],
        },
    }


def measure(rounds: int = ROUNDS) -> list[dict]:
    rows = []
    for name, contenders in calls().items():
        with torch.set_grad_enabled("training" in name):
            rows.append({"call": name, **{who: microseconds(call, rounds) for who, call in contenders.items()}})
    return rows


def table(rows: list[dict]) -> str:
    """A line a call and contender, in microseconds, and its ratio to the kernels'."""
    lines = ["| call | who | microseconds | ratio to the kernels |", "|---|---|---|---|"]
    for row in rows:
        for who, time_ in row.items():
            if who != "call":
                lines.append(f"| {row['call']} | {who} | {time_} | {time_ / row['kernels']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if DEVICE == "cuda":
        rows = measure(args.rounds)
    else:
        with stubs():
            rows = measure(args.rounds)
    result = {"environment": environment("triton"), "rows": rows}
    print(headline(result), table(rows), sep="\n\n")
    if not args.no_save:
        save(f"launch_overhead_{DEVICE}", result)


if __name__ == "__main__":
    main()
