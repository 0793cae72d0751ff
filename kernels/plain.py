"""What the kernels compute, in PyTorch's own operations and with the kernels' own arguments: see `first_use`.

`reference.py` holds the definitions that users read; these are their pieces, for any strides, packs and gradients.
Arithmetic is float32, or float64 for tensors that are. Letters: B images, N tokens, D head dim, S = q k^T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import rotate_reference

LOG2_E = math.log2(math.e)
# scores that are held at a time
SCORES = 2**26


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """R(q) and R(k), or R^-1 of both, as one (2, B, N, heads, D) in q's dtype."""
    sin = -sin if inverse else sin
    return torch.stack([rotate_reference(x, cos, sin).to(q.dtype) for x in (q, k)])


def attention(
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
    """The output (B, N, heads, D) and, in training, each row's maximum and total of the softmax, else empty.

    Those are of scale_log2 S and of 2^(scale_log2 S - maximum), (B, heads, N). q and k are rotated here if
    `fused`, else they come rotated.
    """
    if fused:
        q, k = rotated(q, k, cos, sin).unbind()
    B, N, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    maximum, total = (q.new_empty((B, heads, N) if training else 0, dtype=_wide(q)) for _ in range(2))
    for rows, S in _scores(q, k, cu_seqlens):
        m = S.amax(-1, keepdim=True)
        P = ((S - m) * scale).exp()
        if training:
            maximum[..., rows], total[..., rows] = m.squeeze(-1) * (scale * LOG2_E), P.sum(-1)
        P /= P.sum(-1, keepdim=True)
        out[:, rows] = torch.einsum("bhqk,bkhd->bqhd", P, v.to(P.dtype)).to(q.dtype)
    return out, maximum, total


def attention_gradients(
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
    """The gradients of q, k and v before the rotation, (B, N, heads, D) each; q and k come rotated."""
    wide = _wide(q)
    delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)  # (B, heads, N)
    dq, dk, dv = (torch.zeros(q.shape, dtype=wide, device=q.device) for _ in range(3))
    for rows, S in _scores(q, k, cu_seqlens):
        P = (S * (scale * LOG2_E) - maximum[..., rows, None]).exp2() / total[..., rows, None]
        dP = torch.einsum("bqhd,bkhd->bhqk", dout[:, rows].to(wide), v.to(wide))
        dS = scale * P * (dP - delta[..., rows, None])
        dq[:, rows] = torch.einsum("bhqk,bkhd->bqhd", dS, k.to(wide))
        dk += torch.einsum("bhqk,bqhd->bkhd", dS, q[:, rows].to(wide))
        dv += torch.einsum("bhqk,bqhd->bkhd", P, dout[:, rows].to(wide))
    dq, dk = rotated(dq, dk, cos, sin, inverse=True).unbind()
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _scores(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and their S (B, heads, rows, N): minus infinity between tokens of different sequences.

    Whose a token is stays on the device: nothing waits for it.
    """
    B, N, heads, _ = q.shape
    wide, step = _wide(q), max(1, SCORES // max(1, B * heads * N))
    tokens = torch.arange(N, dtype=torch.int32, device=q.device)
    sequence = None if cu_seqlens is None else torch.searchsorted(cu_seqlens, tokens, right=True)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        S = torch.einsum("bqhd,bkhd->bhqk", q[:, rows].to(wide), k.to(wide))
        if sequence is not None:
            S = S.masked_fill(sequence[rows, None] != sequence, -torch.inf)
        yield rows, S


def add_layer_norm_gradients(
    x_new: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, grad_x_new: Tensor, grad_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and branch, and those of gamma, weight and bias as one (3, C) tensor."""
    x, dout = x_new.to(_wide(x_new)), grad_normed.to(_wide(x_new))
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat, dxhat = centred * rstd, dout * weight
    dx = rstd * (dxhat - dxhat.mean(-1, keepdim=True) - xhat * (dxhat * xhat).mean(-1, keepdim=True)) + grad_x_new
    sums = torch.stack(
        [(dx * branch).flatten(0, -2).sum(0), (dout * xhat).flatten(0, -2).sum(0), dout.flatten(0, -2).sum(0)]
    )
    return dx.to(x_new.dtype), (dx * gamma).to(branch.dtype), sums


def swiglu_gradient(gate_value: Tensor, grad_out: Tensor) -> Tensor:
    """The gradient of [gate | value]: (..., 2F)."""
    gate, value = gate_value.to(_wide(gate_value)).chunk(2, dim=-1)
    dout, sigmoid = grad_out.to(gate.dtype), gate.sigmoid()
    return torch.cat((dout * value * sigmoid * (1 + gate * (1 - sigmoid)), dout * gate * sigmoid), dim=-1).to(
        gate_value.dtype
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
