"""The Triton kernel of attention's forward: softmax(scale R(q) R(k)^T) v. Letters as in `tiles_triton`.

S = q k^T, P = softmax(scale S), maximum and total of a row: those of scale_log2 S and of 2^(scale_log2 S - maximum).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles_triton import dot_halves, load_angles, load_tile, locate_program, rotate_pairs, store_tile

# The narrowest tile of the tensor cores. With 5 prefix tokens, N is 5 or 9 (mod 64) at 224, 384, 512 and 1024 pixels.
TAIL = tl.constexpr(16)


@triton.jit
def attend(
    q1,  # (BLOCK_M, HALF), rotated
    q2,  # (BLOCK_M, HALF)
    m,  # (BLOCK_M,) float32, the maximum of each row of scale_log2 S so far
    total,  # (BLOCK_M,) float32, the sum of each row of P so far, relative to m
    acc,  # (BLOCK_M, WIDTH) float32, P v so far, relative to m
    k_ptr,  # (n, D) of this sequence and head
    v_ptr,  # (n, D)
    cos_ptr,  # (tokens, D/2) float32
    sin_ptr,  # (tokens, D/2) float32
    stride_kn,
    stride_vn,
    prefix,
    j,
    n,
    scale_log2,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: the queries meet the keys and values j .. j + BLOCK. Returns m, total, acc."""
    # (BLOCK,)
    cols = j + tl.arange(0, BLOCK)
    # (BLOCK, HALF)
    k1 = load_tile(k_ptr, cols, stride_kn, n, D // 2, HALF, MASKED)
    k2 = load_tile(k_ptr + D // 2, cols, stride_kn, n, D // 2, HALF, MASKED)
    if ROTATE:
        cos, sin = load_angles(cos_ptr, sin_ptr, cols, prefix, n, D, HALF)
        turned1, turned2 = rotate_pairs(k1, k2, cos, sin)
        # rounded as a rotated key in memory would be: both strategies multiply the same numbers
        k1, k2 = turned1.to(k1.dtype), turned2.to(k2.dtype)
    # (BLOCK_M, BLOCK)
    S = dot_halves(q1, q2, k1, k2, PRECISION)
    if MASKED:
        S = tl.where(cols[None, :] < n, S, float("-inf"))
    # (BLOCK_M,); rounded once, here: scores of thousands are then as exact as small ones
    m_new = tl.maximum(m, tl.max(S, 1) * scale_log2)
    # (BLOCK_M, BLOCK); the scale goes into the one multiply-add before each exponential
    P = tl.exp2(tl.fma(S, scale_log2, -m_new[:, None]))
    # (BLOCK_M,)
    decay = tl.exp2(m - m_new)
    # (BLOCK, WIDTH)
    v = load_tile(v_ptr, cols, stride_vn, n, D, WIDTH, MASKED)
    # (BLOCK_M, WIDTH)
    acc = tl.dot(P.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return m_new, total * decay + tl.sum(P, 1), acc


@triton.jit(do_not_specialize=["N", "prefix", "heads", "tiles"])
def rope_attention_forward_kernel(
    q_ptr,  # (B, N, heads, D), any strides but the last
    k_ptr,  # (B, N, heads, D), likewise
    v_ptr,  # (B, N, heads, D), likewise
    cos_ptr,  # (N - prefix, D/2) float32
    sin_ptr,  # (N - prefix, D/2) float32
    out_ptr,  # (B, N, heads, D) contiguous
    maximum_ptr,  # (B, heads, N) float32, or None where nobody will ask for gradients
    total_ptr,  # (B, heads, N) float32, or None likewise
    cu_seqlens_ptr,  # (S + 1,) int32, or None for images
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    N,
    prefix,
    heads,
    tiles,
    scale_log2,  # scale * log2(e): exponentials are powers of two
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program stores out, maximum and total of BLOCK_M queries of one head; R is the identity unless ROTATE."""
    tile, head, batch, start, n = locate_program(cu_seqlens_ptr, N, heads, tiles)
    if tile * BLOCK_M >= n:
        return
    # batch and start are 64-bit: offsets between images may be, those within a sequence are not
    q_ptr += batch * stride_qb + start * stride_qn + head * stride_qh
    k_ptr += batch * stride_kb + start * stride_kn + head * stride_kh
    v_ptr += batch * stride_vb + start * stride_vn + head * stride_vh
    cos_ptr += (start - prefix) * (D // 2)
    sin_ptr += (start - prefix) * (D // 2)
    out_ptr += ((batch * N + start) * heads + head) * D

    # (BLOCK_M,)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # (BLOCK_M, HALF)
    q1 = load_tile(q_ptr, rows, stride_qn, n, D // 2, HALF, True)
    q2 = load_tile(q_ptr + D // 2, rows, stride_qn, n, D // 2, HALF, True)
    if ROTATE:
        cos, sin = load_angles(cos_ptr, sin_ptr, rows, prefix, n, D, HALF)
        turned1, turned2 = rotate_pairs(q1, q2, cos, sin)
        q1, q2 = turned1.to(q1.dtype), turned2.to(q2.dtype)
    # (BLOCK_M,)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # (BLOCK_M, WIDTH)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)

    # whole tiles need no mask; what is left goes in narrow ones
    whole = n // BLOCK_N * BLOCK_N
    for j in range(0, whole, BLOCK_N):
        m, total, acc = attend(
            q1=q1,
            q2=q2,
            m=m,
            total=total,
            acc=acc,
            k_ptr=k_ptr,
            v_ptr=v_ptr,
            cos_ptr=cos_ptr,
            sin_ptr=sin_ptr,
            stride_kn=stride_kn,
            stride_vn=stride_vn,
            prefix=prefix,
            j=j,
            n=n,
            scale_log2=scale_log2,
            D=D,
            HALF=HALF,
            WIDTH=WIDTH,
            BLOCK=BLOCK_N,
            ROTATE=ROTATE,
            MASKED=False,
            PRECISION=PRECISION,
        )
    for j in tl.range(whole, n, TAIL, num_stages=1):
        m, total, acc = attend(
            q1=q1,
            q2=q2,
            m=m,
            total=total,
            acc=acc,
            k_ptr=k_ptr,
            v_ptr=v_ptr,
            cos_ptr=cos_ptr,
            sin_ptr=sin_ptr,
            stride_kn=stride_kn,
            stride_vn=stride_vn,
            prefix=prefix,
            j=j,
            n=n,
            scale_log2=scale_log2,
            D=D,
            HALF=HALF,
            WIDTH=WIDTH,
            BLOCK=TAIL,
            ROTATE=ROTATE,
            MASKED=True,
            PRECISION=PRECISION,
        )
    store_tile(out_ptr, acc / total[:, None], rows, heads * D, n, D, WIDTH)
    if maximum_ptr is not None:
        # apart: in the logarithm of the sum, scores of thousands would leave the sum few digits
        statistics = (batch * heads + head) * N + start
        tl.store(maximum_ptr + statistics + rows, m, mask=rows < n)
        tl.store(total_ptr + statistics + rows, total, mask=rows < n)
