"""The rotation pass, q and k turned in one launch: an op of its own, for it comes before PyTorch's attention too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import plain, tuning
from .availability import interpreted, interpreter_knows_bfloat16, require
from .first_use import Checked, sample
from .operators import define


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """R(q) and R(k), or R^-1 of both, as one (2, B, N, heads, D): q and k themselves belong to the caller.

    q, k: (B, N, heads, D), any strides but the last. cos, sin: (P, D/2) of the last P tokens. Nothing is validated.
    """
    return _checked((q.device, q.dtype, q.shape[-1], inverse), q, k, cos, sin, inverse)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    from .rotate_triton import rotate_kernel

    B, N, heads, D = q.shape
    out = q.new_empty((2, *q.shape))
    launch, rows = tuning.rotate_launch(D), B * N * heads
    stride_q, stride_k = q.stride(), k.stride()
    with torch.cuda.device_of(q):
        rotate_kernel[(-(-rows // launch["BLOCK"]),)](
            q_ptr=q,
            k_ptr=k,
            cos_ptr=cos,
            sin_ptr=sin,
            out_ptr=out,
            stride_qb=stride_q[0],
            stride_qn=stride_q[1],
            stride_qh=stride_q[2],
            stride_kb=stride_k[0],
            stride_kn=stride_k[1],
            stride_kh=stride_k[2],
            N=N,
            prefix=N - cos.shape[0],
            heads=heads,
            n=rows,
            **launch,
            INVERSE=inverse,
        )
    return out


def _sample(device: torch.device, dtype: torch.dtype, D: int, inverse: bool) -> tuple[Any, ...]:
    """Two images of 70 tokens, 5 of them not rotated: more rows than a program takes."""
    q, k, _ = sample(device, dtype, 2, 70, 3, 2, D).unbind(2)
    angles = 6 * sample(device, torch.float32, 65, D // 2, seed=1)
    return q, k, angles.cos(), angles.sin(), inverse


_checked = Checked("rotate", _launch, plain.rotated, _sample)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """What `rotated` returns, once its arguments are right."""
    check_rotation(q, k, cos, sin, q.shape[1])
    return rotated(q, k, cos, sin, inverse)


def _save_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    check_tables_need_no_gradients(ctx.needs_input_grad[2:4])
    ctx.save_for_backward(cos, sin)


def _rotation_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = grad.contiguous().unbind()
    return (
        *torch.ops.dinov3_lite.rotate.default(dq, dk, *ctx.saved_tensors, not ctx.inverse).unbind(),
        None,
        None,
        None,
    )


define(
    "rotate",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse=False) -> Tensor",
    _rotate,
    fake=lambda q, *others: q.new_empty((2, *q.shape)),
    gradients=_rotation_gradients,
    save=_save_rotation,
)


def check_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, longest: int) -> None:
    """Raise RuntimeError where the kernels can't run, ValueError for queries, keys or tables that they don't take."""
    require("rope_attention", "q", q)
    B, N, heads, D = q.shape
    if B * N * heads >= 2**31:
        raise ValueError(f"q has {B} x {N} x {heads} heads of tokens: expected fewer than 2^31")
    if D % 16 or not 16 <= D <= 256:
        raise ValueError(f"q has head dim {D}: expected a multiple of 16 from 16 to 256")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q is {q.dtype}: expected torch.float16, torch.bfloat16 or torch.float32")
    if q.dtype == torch.bfloat16 and not q.is_cuda and interpreted() and not interpreter_knows_bfloat16():
        raise ValueError("q is torch.bfloat16: expected torch.float16 or torch.float32 under triton's interpreter")
    check_like_q("q", q, q, longest)
    check_like_q("k", k, q, longest)
    if cos.ndim != 2 or cos.shape[1] != D // 2 or cos.shape[0] > N:
        raise ValueError(f"cos has shape {tuple(cos.shape)}: expected (P, {D // 2}) with P at most {N} tokens")
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}: expected cos's, {tuple(cos.shape)}")
    for name, table in {"cos": cos, "sin": sin}.items():
        if table.dtype != torch.float32:
            raise ValueError(f"{name} is {table.dtype}: expected torch.float32")
        if not table.is_contiguous():
            raise ValueError(f"{name} has strides {table.stride()}: expected a contiguous table")
        if table.device != q.device:
            raise ValueError(f"{name} is on {table.device}: expected q's device, {q.device}")


def check_like_q(name: str, x: Tensor, q: Tensor, longest: int) -> None:
    """Raise ValueError unless x is like q in all but strides, and a sequence has fewer elements than int32 counts."""
    if x.shape != q.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected q's, {tuple(q.shape)}")
    if x.dtype != q.dtype:
        raise ValueError(f"{name} is {x.dtype}: expected q's dtype, {q.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}: expected q's device, {q.device}")
    _, stride_n, stride_h, stride_d = x.stride()
    if stride_d != 1:
        raise ValueError(f"{name} has stride {stride_d} in its last dimension: expected 1")
    _, _, heads, D = q.shape
    if longest * max(stride_n, heads * D) + heads * max(stride_h, D) >= 2**31:
        raise ValueError(f"{name} spans 2^31 elements or more in a sequence of {longest} tokens: expected fewer")


def check_tables_need_no_gradients(needed: tuple[bool, ...]) -> None:
    """Raise ValueError if cos or sin need gradients, of which the kernels have none: better than a silent None."""
    if any(needed):
        raise ValueError("cos or sin requires a gradient: expected tables without, the kernels have none for them")
