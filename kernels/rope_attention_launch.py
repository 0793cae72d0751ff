"""How attention's kernels are launched: the forward, and the two of the backward, each checked at its first use.

Nothing is validated here: `rope_attention` has done so. A pack is one long image, B = 1, with its cu_seqlens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import plain, tuning
from .first_use import Checked, sample

LOG2_E = math.log2(math.e)


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float,
    training: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `plain.attention`."""
    from .rope_attention_triton import rope_attention_forward_kernel

    _, N, heads, D = q.shape
    out, maximum, total = outputs(q, training)
    stride_q, stride_k, stride_v = q.stride(), k.stride(), v.stride()
    launch = tuning.attention_launch("forward", tuning.architecture(q.device), D, q.itemsize)
    tiles = -(-(N if max_seqlen is None else max_seqlen) // launch["BLOCK_M"])
    with torch.cuda.device_of(q):
        rope_attention_forward_kernel[_programs(tiles, q, cu_seqlens)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            cos_ptr=cos,
            sin_ptr=sin,
            out_ptr=out,
            maximum_ptr=maximum if training else None,
            total_ptr=total if training else None,
            cu_seqlens_ptr=cu_seqlens,
            stride_qb=stride_q[0],
            stride_qn=stride_q[1],
            stride_qh=stride_q[2],
            stride_kb=stride_k[0],
            stride_kn=stride_k[1],
            stride_kh=stride_k[2],
            stride_vb=stride_v[0],
            stride_vn=stride_v[1],
            stride_vh=stride_v[2],
            N=N,
            prefix=N - cos.shape[0],
            heads=heads,
            tiles=tiles,
            scale_log2=scale * LOG2_E,
            **launch,
            ROTATE=fused,
            PRECISION=tuning.precision(q.dtype),
        )
    return out, maximum, total


def _launch_backward(
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
    """See `plain.attention_gradients`. dout, q and k are contiguous."""
    from .rope_attention_backward_triton import rope_attention_backward_kv_kernel, rope_attention_backward_q_kernel

    _, N, heads, D = q.shape
    longest = N if max_seqlen is None else max_seqlen
    arch = tuning.architecture(q.device)
    dq, dk, dv = (torch.empty_like(dout) for _ in range(3))
    delta, stride_v = torch.empty_like(total), v.stride()
    with torch.cuda.device_of(q):
        launch = tuning.attention_launch("backward_q", arch, D, q.itemsize)
        tiles = -(-longest // launch["BLOCK_M"])
        rope_attention_backward_q_kernel[_programs(tiles, q, cu_seqlens)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            cos_ptr=cos,
            sin_ptr=sin,
            out_ptr=out,
            dout_ptr=dout,
            maximum_ptr=maximum,
            total_ptr=total,
            delta_ptr=delta,
            dq_ptr=dq,
            cu_seqlens_ptr=cu_seqlens,
            stride_vb=stride_v[0],
            stride_vn=stride_v[1],
            stride_vh=stride_v[2],
            N=N,
            prefix=N - cos.shape[0],
            heads=heads,
            tiles=tiles,
            scale=scale,
            scale_log2=scale * LOG2_E,
            **launch,
            PRECISION=tuning.precision(q.dtype),
        )
        launch = tuning.attention_launch("backward_kv", arch, D, q.itemsize)
        tiles = -(-longest // launch["BLOCK_N"])
        rope_attention_backward_kv_kernel[_programs(tiles, q, cu_seqlens)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            cos_ptr=cos,
            sin_ptr=sin,
            dout_ptr=dout,
            maximum_ptr=maximum,
            total_ptr=total,
            delta_ptr=delta,
            dk_ptr=dk,
            dv_ptr=dv,
            cu_seqlens_ptr=cu_seqlens,
            stride_vb=stride_v[0],
            stride_vn=stride_v[1],
            stride_vh=stride_v[2],
            N=N,
            prefix=N - cos.shape[0],
            heads=heads,
            tiles=tiles,
            scale=scale,
            scale_log2=scale * LOG2_E,
            **launch,
            PRECISION=tuning.precision(q.dtype),
        )
    return dq, dk, dv


def outputs(q: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for out (B, N, heads, D), and for maximum and total (B, heads, N), which are empty unless training."""
    B, N, heads, _ = q.shape
    maximum, total = (q.new_empty((B, heads, N) if training else 0, dtype=torch.float32) for _ in range(2))
    return q.new_empty(q.shape), maximum, total


def _programs(tiles: int, q: Tensor, cu_seqlens: Tensor | None) -> tuple[int]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (tiles * q.shape[2] * sequences,)


def kind(q: Tensor, *flags: object) -> tuple[Any, ...]:
    """What a kernel is compiled for, and so checked for."""
    return (q.device, q.dtype, q.shape[-1], tuning.precision(q.dtype), *flags)


def _forward_sample(
    device: torch.device, dtype: torch.dtype, D: int, precision: str, fused: bool, training: bool, packed: bool
) -> tuple[Any, ...]:
    """Two images of 133 tokens, or sequences of 133, none, 5 and 128: whole tiles and tails of each kernel."""
    B, N, heads = (1, 266, 2) if packed else (2, 133, 2)
    q, k, v = sample(device, dtype, B, N, 3, heads, D).unbind(2)  # views of one projection, as the model has them
    angles = 6 * sample(device, torch.float32, N if packed else N - 5, D // 2, seed=1)
    cos, sin = angles.cos(), angles.sin()
    if not fused:
        q, k = plain.rotated(q, k, cos, sin).unbind()
    cu_seqlens = torch.tensor([0, 133, 133, 138, 266], dtype=torch.int32, device=device) if packed else None
    return q, k, v, cos, sin, cu_seqlens, 133 if packed else None, D**-0.5, training, fused


def _backward_sample(device: torch.device, dtype: torch.dtype, D: int, precision: str, packed: bool) -> tuple[Any, ...]:
    arguments = _forward_sample(device, dtype, D, precision, False, True, packed)
    q, k, v, cos, sin, cu_seqlens, longest, scale, *_ = arguments
    dout = sample(device, dtype, *q.shape, seed=2)
    return dout, q, k, v, cos, sin, cu_seqlens, longest, scale, *plain.attention(*arguments)


forward = Checked("rope_attention", _launch_forward, plain.attention, _forward_sample)
backward = Checked("rope_attention_backward", _launch_backward, plain.attention_gradients, _backward_sample)
