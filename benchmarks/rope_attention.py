"""RoPE attention beside PyTorch's: the error of output and gradients against float64 and, on a GPU, the time.

    python benchmarks/rope_attention.py [--no-save] [--small]

Without a GPU the kernels run in Triton's interpreter: errors only, of float32 and float16, and no time means anything.
Writes benchmarks/results/rope_attention_cpu.json or .._cuda.json, of which the tables of kernels/README.md are made.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from environment import environment, headline, save
from timing import interleaved, relative_difference
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from dinov3_lite.kernels import rope_attention, rope_attention_reference, tuning  # noqa: E402

from dinov3_lite.attention import sdpa_attention  # noqa: E402

TENSORS = ("out", "dq", "dk", "dv")
PREFIX = 5
ERRORS = [(6, 64), (133, 64), (201, 64), (201, 128)]  # tokens, head dim
TIMES = [  # batch, pixels a side, heads, head dim
    *((B, pixels, 16, 64) for pixels in (224, 384, 512, 1024) for B in (1, 32)),
    *((B, pixels, 32, 128) for pixels in (224, 512) for B in (1, 16)),
]
CONTENDERS = ("fused", "separate", "rotation, then sdpa", "sdpa")
ROUNDS, CALLS = 20, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--small", action="store_true", help="a rehearsal: one small shape, every timed call made once")
    args = parser.parse_args()
    torch.manual_seed(0)
    result: dict = {"environment": environment("triton"), "errors": list(errors([(6, 16)] if args.small else ERRORS))}
    print(headline(result), error_table(result["errors"]), sep="\n\n", end="\n\n")
    if args.small:
        rehearse()
    elif DEVICE == "cuda":
        result["times"] = list(times())
        print(time_table(result["times"]))
    if DEVICE == "cpu":
        print("No GPU: the kernels ran in triton's interpreter, and nothing was timed.")
    if not (args.no_save or args.small):
        save(f"rope_attention_{DEVICE}", result)


@contextmanager
def strategy(name: str) -> Iterator[None]:
    """Have every number of tokens go one way: the rotation inside, apart, or apart and then PyTorch's attention."""
    before = tuning.fused_up_to, tuning.prefers_sdpa
    tuning.fused_up_to = lambda device: sys.maxsize if name == "fused" else 0
    tuning.prefers_sdpa = lambda tokens, head_dim, device, training: name == "rotation, then sdpa"
    try:
        yield
    finally:
        tuning.fused_up_to, tuning.prefers_sdpa = before


def inputs(B: int, N: int, heads: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection (B, N, 3, heads, D), and tables with identity rows for the prefix."""
    angles = 6 * torch.rand(N, D // 2)
    angles[:PREFIX] = 0
    qkv = torch.randn(B, N, 3, heads, D, device=DEVICE).to(dtype)
    return qkv, angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def with_gradients(attention: Callable[..., Tensor], qkv: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Output and gradients of q, k, v, for the same gradient of the output in every dtype, one that float16 holds."""
    leaf = qkv.detach().requires_grad_()
    out = attention(*leaf.unbind(-3), cos, sin)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half().bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad)[0].unbind(-3)]


def rehearse() -> None:
    """Make every call that is timed on a GPU, once."""
    qkv, cos, sin = inputs(1, 6, 2, 16, torch.float16)
    for name in CONTENDERS:
        for training in (False, True):
            contender(name, qkv, cos, sin, training)()


def errors(shapes: list[tuple[int, int]]) -> Iterator[dict]:
    """Relative errors ||x - truth|| / ||truth|| of each strategy and of PyTorch's attention, on the same inputs."""
    for N, D in shapes:
        for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])):
            qkv, cos, sin = inputs(1, N, 2, D, dtype)
            truth = with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
            row: dict = {"tokens": N, "head_dim": D, "dtype": str(dtype).removeprefix("torch.")}
            for name in ("fused", "separate"):
                with strategy(name):
                    row[name] = relative_errors(with_gradients(rope_attention, qkv, cos, sin), truth)
            row["sdpa"] = relative_errors(with_gradients(sdpa_attention, qkv, cos, sin), truth)
            yield row


def relative_errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    return dict(zip(TENSORS, map(relative_difference, found, truth), strict=True))


def error_table(rows: list[dict]) -> str:
    """A line a shape and dtype; each cell: ours with the rotation inside | ours with it apart | PyTorch's."""
    lines = ["| tokens, head dim, dtype | " + " | ".join(f"{t}: fused, separate, sdpa" for t in TENSORS) + " |"]
    lines.append("|---" * (len(TENSORS) + 1) + "|")
    for row in rows:
        cells = [", ".join(f"{row[who][tensor]:.1e}" for who in ("fused", "separate", "sdpa")) for tensor in TENSORS]
        lines.append(f"| {row['tokens']}, {row['head_dim']}, {row['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def times() -> Iterator[dict]:
    """Median microseconds of a call in bfloat16, and of a call and its gradients, with the quartiles."""
    for B, pixels, heads, D in TIMES:
        N = PREFIX + (pixels // 16) ** 2
        qkv, cos, sin = inputs(B, N, heads, D, torch.bfloat16)
        row: dict = {"batch": B, "tokens": N, "heads": heads, "head_dim": D}
        for training in (False, True):
            calls = {name: contender(name, qkv, cos, sin, training) for name in CONTENDERS}
            seconds = interleaved(calls, ROUNDS, CALLS)
            quartiles = {
                name: [round(1e6 * q, 1) for q in statistics.quantiles(seconds[name], n=4)] for name in CONTENDERS
            }
            row["training" if training else "inference"] = quartiles
        yield row


def contender(name: str, qkv: Tensor, cos: Tensor, sin: Tensor, training: bool) -> Callable[[], None]:
    attention = sdpa_attention if name == "sdpa" else rope_attention
    grad = torch.randn_like(qkv[:, :, 0])
    leaf = qkv.detach().requires_grad_(training)

    def call() -> None:
        with strategy(name):
            out = attention(*leaf.unbind(2), cos, sin)
        if training:
            torch.autograd.grad(out, leaf, grad)

    return call


def time_table(rows: list[dict]) -> str:
    """A line a shape, a column a contender: median microseconds, inference / training."""
    names = list(rows[0]["inference"])
    lines = ["| batch, tokens, heads, head dim | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row['inference'][name][1]} / {row['training'][name][1]}" for name in names]
        shape = ", ".join(str(row[key]) for key in ("batch", "tokens", "heads", "head_dim"))
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
