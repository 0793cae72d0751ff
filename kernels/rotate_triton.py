"""The Triton kernel of the rotation pass: R(q) and R(k), or R^-1 of both. Letters as in `tiles_triton`."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles_triton import rotate_pairs


@triton.jit(do_not_specialize=["N", "prefix", "heads", "n"])
def rotate_kernel(
    q_ptr,  # (B, N, heads, D), any strides but the last
    k_ptr,  # (B, N, heads, D), likewise
    cos_ptr,  # (N - prefix, D/2) float32
    sin_ptr,  # (N - prefix, D/2) float32
    out_ptr,  # (2, B, N, heads, D) contiguous
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    N,
    prefix,
    heads,
    n,  # B N heads, the rows of D elements in q and in k
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One program turns BLOCK rows of q and the same of k."""
    # (BLOCK,)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # (1, HALF)
    cols = tl.arange(0, HALF)[None, :]
    # (BLOCK, HALF)
    inside = (rows < n)[:, None] & (cols < D // 2)
    # (BLOCK,)
    head, token, batch = rows % heads, rows // heads % N, (rows // heads // N).to(tl.int64)
    # (BLOCK, HALF)
    turned = inside & (token >= prefix)[:, None]
    angles = (token - prefix)[:, None] * (D // 2) + cols
    # prefix tokens get the identity
    cos = tl.load(cos_ptr + angles, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + angles, mask=turned, other=0.0)
    sin = -sin if INVERSE else sin

    # (BLOCK, HALF)
    q_ptr += (batch * stride_qb + token * stride_qn + head * stride_qh)[:, None] + cols
    k_ptr += (batch * stride_kb + token * stride_kn + head * stride_kh)[:, None] + cols
    out_ptr += rows.to(tl.int64)[:, None] * D + cols
    q1, q2 = tl.load(q_ptr, mask=inside, other=0.0), tl.load(q_ptr + D // 2, mask=inside, other=0.0)
    k1, k2 = tl.load(k_ptr, mask=inside, other=0.0), tl.load(k_ptr + D // 2, mask=inside, other=0.0)
    q1, q2 = rotate_pairs(q1, q2, cos, sin)
    k1, k2 = rotate_pairs(k1, k2, cos, sin)
    tl.store(out_ptr, q1, mask=inside)
    tl.store(out_ptr + D // 2, q2, mask=inside)
    # R(k) lies behind the whole of R(q)
    out_ptr += n.to(tl.int64) * D
    tl.store(out_ptr, k1, mask=inside)
    tl.store(out_ptr + D // 2, k2, mask=inside)
