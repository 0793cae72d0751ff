"""Every kernel at shapes that meet its edges, against float64: what a memory checker is to watch.

    python tools/odd_shapes.py [--small]
    compute-sanitizer python tools/odd_shapes.py

Tokens, head dims and channels that no tile divides, views of every stride, packs with empty and single-token sequences.
Exit status 1 if a result is wrong. Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
IMAGES = [
    (1, 1, 1, 16),
    (2, 5, 3, 64),
    (1, 17, 2, 80),
    (3, 65, 1, 64),
    (1, 133, 2, 128),
    (2, 201, 6, 64),
    (1, 581, 3, 64),
]
PACKS = [(1,), (5, 0, 1, 17), (6, 70), (201, 6, 581, 77)]
ROWS = [(1, 8), (3, 136), (7, 384), (5, 1280), (2, 4096), (33, 100)]


def cases(small: bool) -> Iterator[tuple[str, Callable[..., object], Callable[..., object], list[Tensor], tuple]]:
    """Name, kernel, definition, tensors that get gradients, other arguments."""
    from dinov3_lite.kernels import (
        add_layer_norm,
        add_layer_norm_reference,
        rope_attention,
        rope_attention_packed,
        rope_attention_packed_reference,
        rope_attention_reference,
        swiglu,
        swiglu_reference,
    )

    for B, N, heads, D in IMAGES[1:3] if small else IMAGES:
        qkv = torch.randn(B, N, 3, heads, D, device=DEVICE, dtype=DTYPE)
        angles = 6 * torch.rand(max(N - 5, 0), D // 2, device=DEVICE)
        tables = angles.cos(), angles.sin()
        yield (
            f"rope_attention {B}, {N}, {heads}, {D}",
            rope_attention,
            rope_attention_reference,
            [*qkv.unbind(2)],
            tables,
        )
        apart = torch.randn(3, B, heads, N, D, device=DEVICE, dtype=DTYPE).transpose(2, 3)
        yield f"heads first {B}, {N}, {heads}, {D}", rope_attention, rope_attention_reference, [*apart], tables
    for lengths in PACKS[1:2] if small else PACKS:
        T, borders = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
        qkv = torch.randn(T, 3, 2, 64, device=DEVICE, dtype=DTYPE)
        angles = 6 * torch.rand(T, 32, device=DEVICE)
        others = (angles.cos(), angles.sin(), borders, max(lengths))
        yield f"pack {lengths}", rope_attention_packed, rope_attention_packed_reference, [*qkv.unbind(1)], others
    for T, C in ROWS[1:2] if small else ROWS:
        x, branch = torch.randn(T, C, device=DEVICE), torch.randn(T, C, device=DEVICE, dtype=DTYPE)
        vectors = [torch.rand(C, device=DEVICE, dtype=DTYPE) for _ in range(3)]
        yield f"add_layer_norm {T}, {C}", add_layer_norm, add_layer_norm_reference, [x, branch, *vectors], (1e-5,)
        yield f"swiglu {T}, {C}", swiglu, swiglu_reference, [torch.randn(T, C, device=DEVICE, dtype=DTYPE)], ()


def with_gradients(function: Callable[..., object], tensors: list[Tensor], others: tuple) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, *others)
    outputs = out if isinstance(out, tuple) else (out,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few of each sort")
    args = parser.parse_args()
    torch.manual_seed(0)
    wrong = 0
    for name, kernel, definition, tensors, others in cases(args.small):
        found = with_gradients(kernel, tensors, others)
        wide = [x.double() for x in tensors]
        truth = with_gradients(
            definition,
            wide,
            tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in others),
        )
        errors = [
            ((a.double() - t).norm() / t.norm().clamp_min(1e-3)).item() for a, t in zip(found, truth, strict=True)
        ]
        right = max(errors) < 8 * torch.finfo(DTYPE).eps
        wrong += not right
        print(f"{name}: {max(errors):.1e}{'' if right else ', wrong'}", flush=True)
    print(f"{wrong} of these are wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
