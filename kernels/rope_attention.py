"""Attention with rotary position embedding as PyTorch ops: the Triton kernels, their gradients, and what they accept.

A pack of sequences is held as one long image, (1, T, heads, D), whose attention stops at the borders in cu_seqlens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .operators import define
from .rope_attention_launch import backward, forward, kind, outputs
from .rotate import check_like_q, check_rotation, check_tables_need_no_gradients, rotated


def rope_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale R(q) R(k)^T) v, where R rotates the last P of the N tokens and leaves the others.

    q, k, v: (B, N, heads, D) float16, bfloat16 or float32, D a multiple of 16 up to 256. The last dimension is
        contiguous; the others have any strides, so views of one fused projection are taken as they are.
    cos, sin: (P, D/2) float32, contiguous, P <= N: the pair (i, i + D/2) of every head turns by its token's i-th angle.
    scale: of the scores, positive; D ** -0.5 unless given.

    Returns (B, N, heads, D) in q's dtype. Rotation and softmax run in float32; products of float32 inputs are exact
    unless `torch.backends.cuda.matmul` allows tf32. Differentiable in q, k and v, once. The gradients of these kernels
    are the same bit for bit every time. Those of PyTorch's attention, which takes over at many tokens
    (`tuning.prefers_sdpa`), need not be: under `torch.use_deterministic_algorithms` it is kept out of training.

    Raises ValueError for any other input, RuntimeError where the kernels can't run (see `unavailable_reason`).
    """
    training = _needs_gradients(q, k, v)
    own = not training or q.ndim != 4 or torch.are_deterministic_algorithms_enabled()
    if not own and tuning.prefers_sdpa(q.shape[1], q.shape[3], q.device, training):
        check_like_q("v", v, q, q.shape[1])
        _check_scale(_scale(scale, q))
        return _sdpa(torch.ops.dinov3_lite.rotate.default(q, k, cos, sin), v, _scale(scale, q))
    out, _, _ = torch.ops.dinov3_lite.rope_attention.default(q, k, v, cos, sin, None, None, _scale(scale, q), training)
    return out


def rope_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
) -> Tensor:
    """`rope_attention` of several sequences, concatenated without padding; each attends only to itself.

    q, k, v: (T, heads, D), T the tokens of all sequences, otherwise as in `rope_attention`.
    cos, sin: (T, D/2) float32, contiguous, a row a token; prefix tokens have the identity, cos 1 and sin 0.
    cu_seqlens: (S + 1,) int32 on q's device, ascending from 0 to T: sequence s is the tokens cu_seqlens[s] up to
        cu_seqlens[s + 1]. The values stay on the device and are not checked.
    max_seqlen: the length of the longest sequence, or more. Tokens beyond it, or in no sequence, get undefined output.

    Returns (T, heads, D). Gradients are the same bit for bit every time. Raises as `rope_attention` does.
    """
    training = _needs_gradients(q, k, v)
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    scale = _scale(scale, q)
    out, _, _ = torch.ops.dinov3_lite.rope_attention.default(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale, training)
    return out.squeeze(0)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, N, heads, D) and, in training, each row's maximum and total (B, heads, N), else empty.

    Checks and the choice of strategy are in here, so that one traced program serves any number of tokens.
    """
    _check_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale)
    _, N, _, D = q.shape
    if cu_seqlens is None and not training and tuning.prefers_sdpa(N, D, q.device, training):
        return _sdpa(rotated(q, k, cos, sin), v, scale).contiguous(), *outputs(q, training)[1:]
    fused = (N if max_seqlen is None else max_seqlen) <= tuning.fused_up_to(q.device)
    if not fused:
        q, k = rotated(q, k, cos, sin).unbind()
    use = kind(q, fused, training, cu_seqlens is not None)
    return forward(use, q, k, v, cos, sin, cu_seqlens, max_seqlen, scale, training, fused)


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float,
    out: Tensor,
    maximum: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, (B, N, heads, D) each. q and k are rotated once more, so that nobody keeps them."""
    q, k = rotated(q, k, cos, sin).unbind()
    statistics = (out, maximum, total)
    use = kind(q, cu_seqlens is not None)
    return backward(use, dout.contiguous(), q, k, v, cos, sin, cu_seqlens, max_seqlen, scale, *statistics)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cos, sin, cu_seqlens, ctx.max_seqlen, ctx.scale, _ = inputs
    check_tables_need_no_gradients(ctx.needs_input_grad[3:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, cos, sin, cu_seqlens, *output)


def _attention_gradients(ctx: Any, dout: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out, maximum, total = ctx.saved_tensors
    gradients = torch.ops.dinov3_lite.rope_attention_backward.default(
        dout, *inputs, ctx.max_seqlen, ctx.scale, out, maximum, total
    )
    return (*gradients, None, None, None, None, None, None)


define(
    "rope_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? cu_seqlens, SymInt? max_seqlen, float scale, "
    "bool training) -> (Tensor, Tensor, Tensor)",
    _attention,
    fake=lambda q, *others: outputs(q, training=others[-1]),
    gradients=_attention_gradients,
    save=_save_attention,
)
define(
    "rope_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? cu_seqlens, SymInt? max_seqlen, "
    "float scale, Tensor out, Tensor maximum, Tensor total) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    fake=lambda dout, q, *others: tuple(q.new_empty(q.shape) for _ in range(3)),
)


def _sdpa(rotated: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k = rotated.transpose(2, 3).unbind()
    return F.scaled_dot_product_attention(q, k, v.transpose(1, 2), scale=scale).transpose(1, 2)


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float,
) -> None:
    """One sentence for whatever the attention kernels would read or write wrongly."""
    if q.ndim != 4 and cu_seqlens is None:
        raise ValueError(f"q has {q.ndim} dimensions: expected (B, N, heads, D)")
    if q.ndim != 4:
        raise ValueError(f"q has {q.ndim - 1} dimensions: expected (T, heads, D)")
    longest = q.shape[1] if max_seqlen is None else max_seqlen
    check_rotation(q, k, cos, sin, longest)
    check_like_q("v", v, q, longest)
    _check_scale(scale)
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens is {found}: expected torch.int32 of shape (S + 1,)")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"cu_seqlens has stride {cu_seqlens.stride(0)}: expected 1")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}: expected q's device, {q.device}")
    if cos.shape[0] != q.shape[1]:
        raise ValueError(f"cos has {cos.shape[0]} rows: expected one for each of the {q.shape[1]} tokens")
    if longest < 0:
        raise ValueError(f"max_seqlen is {longest}: expected the length of the longest sequence")


def _scale(scale: float | None, q: Tensor) -> float:
    """The default is a number of the head dim; the op refuses a head dim of none in its own words."""
    return max(q.shape[-1], 1) ** -0.5 if scale is None else scale


def _check_scale(scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}: expected a positive number")
