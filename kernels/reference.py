"""What the kernels compute, in plain torch: the definition that they are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float | None = None
) -> Tensor:
    """softmax(scale R(q) R(k)^T) v, where R rotates the last P of the N tokens and leaves the others.

    q, k, v: (B, N, heads, D), any floating dtype. cos, sin: (P, D/2), P <= N. scale: D ** -0.5 unless given.
    Computed in float32, or in float64 if an input is; returns (B, N, heads, D) in q's dtype.
    """
    wide = torch.promote_types(torch.promote_types(q.dtype, cos.dtype), torch.float32)
    scores = torch.einsum(
        "bqhd,bkhd->bhqk", rotate_reference(q.to(wide), cos, sin), rotate_reference(k.to(wide), cos, sin)
    )
    weights = (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.to(wide)).to(q.dtype)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(x) of (B, N, heads, D): the pairs (i, i + D/2) of the last P tokens turned by cos, sin (P, D/2).

    Computed and returned in float32, or in float64 if an input is.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    x, prefix = x.to(wide), x.shape[1] - cos.shape[0]
    c, s = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)  # (P, 1, D/2)
    x1, x2 = x[:, prefix:].chunk(2, dim=-1)
    return torch.cat((x[:, :prefix], torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)), dim=1)


def rope_attention_packed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
) -> Tensor:
    """`rope_attention_reference` of each sequence by itself.

    q, k, v: (T, heads, D); cos, sin: (T, D/2); cu_seqlens: (S + 1,) integers from 0 to T; max_seqlen is not needed.
    """
    lengths = cu_seqlens.diff().tolist()
    sequences = zip(*(x.split(lengths) for x in (q, k, v, cos, sin)), strict=True)
    return torch.cat(
        [
            rope_attention_reference(q[None], k[None], v[None], cos, sin, scale).squeeze(0)
            for q, k, v, cos, sin in sequences
        ]
    )


def add_layer_norm_reference(
    x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x_new = x + gamma * branch, and (x_new - mean) / sqrt(var + eps) * weight + bias over its channels.

    x, branch: (..., C); gamma, weight, bias: (C,), any floating dtypes. Computed in float32, or in float64 if x is;
    returns x_new (..., C) in x's dtype and the normalised rows (..., C) in weight's.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_new = (x.to(dtype) + gamma.to(dtype) * branch.to(dtype)).to(x.dtype)
    centred = x_new.to(dtype) - x_new.to(dtype).mean(dim=-1, keepdim=True)
    xhat = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return x_new, (xhat * weight.to(dtype) + bias.to(dtype)).to(weight.dtype)


def swiglu_reference(gate_value: Tensor) -> Tensor:
    """silu(gate) * value of [gate | value]: (..., 2F) -> (..., F), in float32, or in float64 if gate_value is."""
    gate, value = gate_value.to(torch.promote_types(gate_value.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * value).to(gate_value.dtype)
