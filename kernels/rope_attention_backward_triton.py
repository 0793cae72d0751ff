"""The Triton kernels of attention's backward: one for dq, one for dk and dv. Letters as in `tiles_triton`.

    P = 2^(scale_log2 S - maximum) / total        delta = rowsum(dout * out)        dS = P (dout v^T - delta)
    dq = R^-1(scale dS k)                         dk = R^-1(scale dS^T q)           dv = P^T dout

q and k come rotated already; what they get is rotated back in registers before it is stored. Exponentials are taken as
the forward took them, step by step, so that P is the forward's however large the scores are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rope_attention_triton import TAIL
from .tiles_triton import dot_halves, load_angles, load_tile, locate_program, rotate_pairs, store_tile


@triton.jit
def add_grad_of_queries(
    dq1,  # (BLOCK_M, HALF) float32, total dS k so far
    dq2,  # (BLOCK_M, HALF) float32
    q1,  # (BLOCK_M, HALF)
    q2,  # (BLOCK_M, HALF)
    dout,  # (BLOCK_M, WIDTH)
    maximum,  # (BLOCK_M,) float32
    delta,  # (BLOCK_M,) float32
    k_ptr,  # (n, D) of this sequence and head
    v_ptr,  # (n, D)
    stride_kn,
    stride_vn,
    j,
    n,
    scale_log2,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dq what comes from keys and values j .. j + BLOCK: dS k, still to be divided by the row's total."""
    # (BLOCK,)
    cols = j + tl.arange(0, BLOCK)
    # (BLOCK, HALF)
    k1 = load_tile(k_ptr, cols, stride_kn, n, D // 2, HALF, MASKED)
    k2 = load_tile(k_ptr + D // 2, cols, stride_kn, n, D // 2, HALF, MASKED)
    # (BLOCK, WIDTH)
    v = load_tile(v_ptr, cols, stride_vn, n, D, WIDTH, MASKED)
    # (BLOCK_M, BLOCK)
    S = dot_halves(q1, q2, k1, k2, PRECISION)
    P = tl.exp2(tl.fma(S, scale_log2, -maximum[:, None]))
    if MASKED:
        # S is 0 beyond the edge, and 2^(0 - maximum) may be infinite
        P = tl.where(cols[None, :] < n, P, 0.0)
    dP = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dS = (P * (dP - delta[:, None])).to(k1.dtype)
    # (BLOCK_M, HALF)
    return tl.dot(dS, k1, dq1, input_precision=PRECISION), tl.dot(dS, k2, dq2, input_precision=PRECISION)


@triton.jit(do_not_specialize=["N", "prefix", "heads", "tiles"])
def rope_attention_backward_q_kernel(
    q_ptr,  # (B, N, heads, D) contiguous, rotated
    k_ptr,  # (B, N, heads, D) contiguous, rotated
    v_ptr,  # (B, N, heads, D), any strides but the last
    cos_ptr,  # (N - prefix, D/2) float32
    sin_ptr,  # (N - prefix, D/2) float32
    out_ptr,  # (B, N, heads, D) contiguous
    dout_ptr,  # (B, N, heads, D) contiguous
    maximum_ptr,  # (B, heads, N) float32
    total_ptr,  # (B, heads, N) float32
    delta_ptr,  # (B, heads, N) float32, written for the kernel of dk and dv
    dq_ptr,  # (B, N, heads, D) contiguous
    cu_seqlens_ptr,  # (S + 1,) int32, or None for images
    stride_vb,
    stride_vn,
    stride_vh,
    N,
    prefix,
    heads,
    tiles,
    scale,
    scale_log2,  # scale * log2(e)
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program stores dq and delta of BLOCK_M queries of one head."""
    tile, head, batch, start, n = locate_program(cu_seqlens_ptr, N, heads, tiles)
    if tile * BLOCK_M >= n:
        return
    # of contiguous tensors: the sequence's first element of this head, and the step from token to token
    first, stride = ((batch * N + start) * heads + head) * D, heads * D
    v_ptr += batch * stride_vb + start * stride_vn + head * stride_vh
    statistics = (batch * heads + head) * N + start

    # (BLOCK_M,)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # (BLOCK_M, WIDTH)
    out = load_tile(out_ptr + first, rows, stride, n, D, WIDTH, True)
    dout = load_tile(dout_ptr + first, rows, stride, n, D, WIDTH, True)
    # (BLOCK_M,)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + statistics + rows, delta, mask=rows < n)
    maximum = tl.load(maximum_ptr + statistics + rows, mask=rows < n, other=float("inf"))
    total = tl.load(total_ptr + statistics + rows, mask=rows < n, other=1.0)
    # (BLOCK_M, HALF)
    q1 = load_tile(q_ptr + first, rows, stride, n, D // 2, HALF, True)
    q2 = load_tile(q_ptr + first + D // 2, rows, stride, n, D // 2, HALF, True)
    dq1 = tl.zeros([BLOCK_M, HALF], tl.float32)
    dq2 = tl.zeros([BLOCK_M, HALF], tl.float32)

    # whole tiles need no mask; what is left goes in narrow ones
    whole = n // BLOCK_N * BLOCK_N
    for j in range(0, whole, BLOCK_N):
        dq1, dq2 = add_grad_of_queries(
            dq1=dq1,
            dq2=dq2,
            q1=q1,
            q2=q2,
            dout=dout,
            maximum=maximum,
            delta=delta,
            k_ptr=k_ptr + first,
            v_ptr=v_ptr,
            stride_kn=stride,
            stride_vn=stride_vn,
            j=j,
            n=n,
            scale_log2=scale_log2,
            D=D,
            HALF=HALF,
            WIDTH=WIDTH,
            BLOCK=BLOCK_N,
            MASKED=False,
            PRECISION=PRECISION,
        )
    for j in tl.range(whole, n, TAIL, num_stages=1):
        dq1, dq2 = add_grad_of_queries(
            dq1=dq1,
            dq2=dq2,
            q1=q1,
            q2=q2,
            dout=dout,
            maximum=maximum,
            delta=delta,
            k_ptr=k_ptr + first,
            v_ptr=v_ptr,
            stride_kn=stride,
            stride_vn=stride_vn,
            j=j,
            n=n,
            scale_log2=scale_log2,
            D=D,
            HALF=HALF,
            WIDTH=WIDTH,
            BLOCK=TAIL,
            MASKED=True,
            PRECISION=PRECISION,
        )
    angles = (start - prefix) * (D // 2)
    # (BLOCK_M, HALF)
    cos, sin = load_angles(cos_ptr + angles, sin_ptr + angles, rows, prefix, n, D, HALF)
    dq1, dq2 = rotate_pairs(dq1 * (scale / total)[:, None], dq2 * (scale / total)[:, None], cos, -sin)
    store_tile(dq_ptr + first, dq1, rows, stride, n, D // 2, HALF)
    store_tile(dq_ptr + first + D // 2, dq2, rows, stride, n, D // 2, HALF)


@triton.jit
def add_grad_of_keys(
    dk1,  # (BLOCK_N, HALF) float32, dS^T q so far
    dk2,  # (BLOCK_N, HALF) float32
    dv,  # (BLOCK_N, WIDTH) float32, P^T dout so far
    k1,  # (BLOCK_N, HALF)
    k2,  # (BLOCK_N, HALF)
    v,  # (BLOCK_N, WIDTH)
    q_ptr,  # (n, D) of this sequence and head
    dout_ptr,  # (n, D)
    maximum_ptr,  # (n,) float32
    total_ptr,  # (n,) float32
    delta_ptr,  # (n,) float32
    stride,
    j,
    n,
    scale_log2,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dk and dv what comes from queries j .. j + BLOCK: dS^T q and P^T dout.

    The products are transposed: P^T and dS^T come out as the next products take them.
    """
    # (BLOCK,)
    cols = j + tl.arange(0, BLOCK)
    # (BLOCK, HALF)
    q1 = load_tile(q_ptr, cols, stride, n, D // 2, HALF, True)
    q2 = load_tile(q_ptr + D // 2, cols, stride, n, D // 2, HALF, True)
    # (BLOCK, WIDTH)
    dout = load_tile(dout_ptr, cols, stride, n, D, WIDTH, True)
    # (BLOCK,); an infinite maximum makes the queries beyond the edge vanish
    maximum = tl.load(maximum_ptr + cols, mask=cols < n, other=float("inf"))
    total = tl.load(total_ptr + cols, mask=cols < n, other=1.0)
    delta = tl.load(delta_ptr + cols, mask=cols < n, other=0.0)
    # (BLOCK_N, BLOCK)
    St = dot_halves(k1, k2, q1, q2, PRECISION)
    Pt = tl.exp2(tl.fma(St, scale_log2, -maximum[None, :])) * (1 / total)[None, :]
    # (BLOCK_N, WIDTH)
    dv = tl.dot(Pt.to(dout.dtype), dout, dv, input_precision=PRECISION)
    # (BLOCK_N, BLOCK)
    dPt = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dSt = (Pt * (dPt - delta[None, :])).to(q1.dtype)
    # (BLOCK_N, HALF)
    dk1 = tl.dot(dSt, q1, dk1, input_precision=PRECISION)
    dk2 = tl.dot(dSt, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=["N", "prefix", "heads", "tiles"])
def rope_attention_backward_kv_kernel(
    q_ptr,  # (B, N, heads, D) contiguous, rotated
    k_ptr,  # (B, N, heads, D) contiguous, rotated
    v_ptr,  # (B, N, heads, D), any strides but the last
    cos_ptr,  # (N - prefix, D/2) float32
    sin_ptr,  # (N - prefix, D/2) float32
    dout_ptr,  # (B, N, heads, D) contiguous
    maximum_ptr,  # (B, heads, N) float32
    total_ptr,  # (B, heads, N) float32
    delta_ptr,  # (B, heads, N) float32, as the kernel of dq left it
    dk_ptr,  # (B, N, heads, D) contiguous
    dv_ptr,  # (B, N, heads, D) contiguous
    cu_seqlens_ptr,  # (S + 1,) int32, or None for images
    stride_vb,
    stride_vn,
    stride_vh,
    N,
    prefix,
    heads,
    tiles,
    scale,
    scale_log2,  # scale * log2(e)
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program stores dk and dv of BLOCK_N keys of one head."""
    tile, head, batch, start, n = locate_program(cu_seqlens_ptr, N, heads, tiles)
    if tile * BLOCK_N >= n:
        return
    # as in the kernel of dq
    first, stride = ((batch * N + start) * heads + head) * D, heads * D
    v_ptr += batch * stride_vb + start * stride_vn + head * stride_vh
    statistics = (batch * heads + head) * N + start

    # (BLOCK_N,)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # (BLOCK_N, HALF)
    k1 = load_tile(k_ptr + first, rows, stride, n, D // 2, HALF, True)
    k2 = load_tile(k_ptr + first + D // 2, rows, stride, n, D // 2, HALF, True)
    # (BLOCK_N, WIDTH)
    v = load_tile(v_ptr, rows, stride_vn, n, D, WIDTH, True)
    # (BLOCK_N, HALF)
    dk1 = tl.zeros([BLOCK_N, HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_N, HALF], tl.float32)
    # (BLOCK_N, WIDTH)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for j in range(0, n, BLOCK_M):
        dk1, dk2, dv = add_grad_of_keys(
            dk1=dk1,
            dk2=dk2,
            dv=dv,
            k1=k1,
            k2=k2,
            v=v,
            q_ptr=q_ptr + first,
            dout_ptr=dout_ptr + first,
            maximum_ptr=maximum_ptr + statistics,
            total_ptr=total_ptr + statistics,
            delta_ptr=delta_ptr + statistics,
            stride=stride,
            j=j,
            n=n,
            scale_log2=scale_log2,
            D=D,
            HALF=HALF,
            WIDTH=WIDTH,
            BLOCK=BLOCK_M,
            PRECISION=PRECISION,
        )
    angles = (start - prefix) * (D // 2)
    # (BLOCK_N, HALF)
    cos, sin = load_angles(cos_ptr + angles, sin_ptr + angles, rows, prefix, n, D, HALF)
    dk1, dk2 = rotate_pairs(dk1 * scale, dk2 * scale, cos, -sin)
    store_tile(dk_ptr + first, dk1, rows, stride, n, D // 2, HALF)
    store_tile(dk_ptr + first + D // 2, dk2, rows, stride, n, D // 2, HALF)
    store_tile(dv_ptr + first, dv, rows, stride, n, D, WIDTH)
