"""The Triton kernels of attention and rotation: the only file that needs triton to be read at all.

Letters, as in the formulas: B images, N tokens of an image or of a whole pack, n tokens of one sequence, D head dim,
S = q k^T, P = softmax(scale S), lse = log2 of the sum of 2^S over a row, S in units of log2.

Rotation pairs element i of a head with element i + D/2, so queries and keys are held as two halves (tokens, D/2): to
turn them is elementwise, their product the sum of two. WIDTH and HALF are D and D/2 padded to the powers of two that
`tl.arange` takes. A pack of sequences is one long image (B = 1) whose attention stops at the borders in cu_seqlens.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The narrowest tile of the tensor cores. With 5 prefix tokens, N is 5 or 9 (mod 64) at 224, 384, 512 and 1024 pixels.
TAIL = tl.constexpr(16)


@triton.jit
def _locate(cu_seqlens_ptr, N, heads, tiles):
    """Tile, head and batch row of this program, and its sequence's first token and length."""
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    sequence = program // (tiles * heads)
    if cu_seqlens_ptr is None:
        batch, start, n = sequence.to(tl.int64), tl.full([], 0, tl.int64), N
    else:
        batch, start = tl.full([], 0, tl.int64), tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        n = tl.load(cu_seqlens_ptr + sequence + 1) - start.to(tl.int32)
    return tile, head, batch, start, n


@triton.jit
def _load(ptr, rows, stride, n, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows of an (n, D) matrix as a (rows, WIDTH) tile, zero beyond its edges."""
    columns = tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    if MASKED or D != WIDTH:
        tile = tl.load(pointers, mask=(rows[:, None] < n) & (columns[None, :] < D), other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store(ptr, tile, rows, stride, n, D: tl.constexpr, WIDTH: tl.constexpr):
    """Store what of a (rows, WIDTH) tile lies within an (n, D) matrix."""
    columns = tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, tile, mask=(rows[:, None] < n) & (columns[None, :] < D))


@triton.jit
def _load_angles(cos_ptr, sin_ptr, rows, prefix, n, D: tl.constexpr, HALF: tl.constexpr):
    """Load cos and sin of the tokens `rows`, (rows, HALF) each: the identity for prefix tokens and beyond the edges."""
    columns = tl.arange(0, HALF)
    offsets = rows[:, None] * (D // 2) + columns[None, :]
    mask = (rows[:, None] >= prefix) & (rows[:, None] < n) & (columns[None, :] < D // 2)
    return tl.load(cos_ptr + offsets, mask=mask, other=1.0), tl.load(sin_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _rotate(x1, x2, cos, sin):
    """The pairs (x1, x2) turned by their angles, in float32."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def _dot_halves(x1, x2, y1, y2, PRECISION: tl.constexpr):
    """The product x y^T of two matrices held as halves: (rows of x, rows of y) float32."""
    return tl.dot(x2, tl.trans(y2), tl.dot(x1, tl.trans(y1), input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def _attend(
    q1, q2, m, total, acc, k_ptr, v_ptr, cos_ptr, sin_ptr, stride_k, stride_v, prefix, j, n, scale_log2,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROTATE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the queries meet the keys and values j .. j + BLOCK."""
    columns = j + tl.arange(0, BLOCK)
    k1 = _load(k_ptr, columns, stride_k, n, D // 2, HALF, MASKED)
    k2 = _load(k_ptr + D // 2, columns, stride_k, n, D // 2, HALF, MASKED)
    if ROTATE:
        cos, sin = _load_angles(cos_ptr, sin_ptr, columns, prefix, n, D, HALF)
        turned1, turned2 = _rotate(k1, k2, cos, sin)
        k1, k2 = turned1.to(k1.dtype), turned2.to(k2.dtype)
    S = _dot_halves(q1, q2, k1, k2, PRECISION)
    if MASKED:
        S = tl.where(columns[None, :] < n, S, float("-inf"))
    m_new = tl.maximum(m, tl.max(S, 1))
    P = tl.exp2(tl.fma(S, scale_log2, (-m_new * scale_log2)[:, None]))
    decay = tl.exp2((m - m_new) * scale_log2)
    v = _load(v_ptr, columns, stride_v, n, D, WIDTH, MASKED)
    acc = tl.dot(P.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return m_new, total * decay + tl.sum(P, 1), acc


@triton.jit(do_not_specialize=["N", "prefix", "heads", "tiles"])
def attention_forward(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr, cu_seqlens_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    N, prefix, heads, tiles, scale_log2,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store out = softmax(scale R(q) R(k)^T) v of BLOCK_M queries of one head, R the identity unless ROTATE.

    q, k, v: (B, N, heads, D), any strides but the last. cos, sin: (N - prefix, D/2) float32. out: (B, N, heads, D) and
    lse: (B, heads, N) float32, contiguous. scale_log2 is scale * log2(e): exponentials are powers of two.
    """
    tile, head, batch, start, n = _locate(cu_seqlens_ptr, N, heads, tiles)
    if tile * BLOCK_M >= n:
        return
    q_ptr += batch * stride_qb + start * stride_qn + head * stride_qh
    k_ptr += batch * stride_kb + start * stride_kn + head * stride_kh
    v_ptr += batch * stride_vb + start * stride_vn + head * stride_vh
    cos_ptr += (start - prefix) * (D // 2)
    sin_ptr += (start - prefix) * (D // 2)
    out_ptr += ((batch * N + start) * heads + head) * D

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q1 = _load(q_ptr, rows, stride_qn, n, D // 2, HALF, True)
    q2 = _load(q_ptr + D // 2, rows, stride_qn, n, D // 2, HALF, True)
    if ROTATE:
        cos, sin = _load_angles(cos_ptr, sin_ptr, rows, prefix, n, D, HALF)
        turned1, turned2 = _rotate(q1, q2, cos, sin)
        q1, q2 = turned1.to(q1.dtype), turned2.to(q2.dtype)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    whole = n // BLOCK_N * BLOCK_N
    for j in range(0, whole, BLOCK_N):
        m, total, acc = _attend(
            q1, q2, m, total, acc, k_ptr, v_ptr, cos_ptr, sin_ptr, stride_kn, stride_vn, prefix, j, n, scale_log2,
            D, HALF, WIDTH, BLOCK_N, ROTATE, False, PRECISION,
        )  # fmt: skip
    for j in tl.range(whole, n, TAIL, num_stages=1):
        m, total, acc = _attend(
            q1, q2, m, total, acc, k_ptr, v_ptr, cos_ptr, sin_ptr, stride_kn, stride_vn, prefix, j, n, scale_log2,
            D, HALF, WIDTH, TAIL, ROTATE, True, PRECISION,
        )  # fmt: skip
    _store(out_ptr, acc / total[:, None], rows, heads * D, n, D, WIDTH)
    if lse_ptr is not None:
        lse_ptr += (batch * heads + head) * N + start
        tl.store(lse_ptr + rows, m * scale_log2 + tl.log2(total), mask=rows < n)


@triton.jit
def _grad_of_queries(
    q1, q2, dout, lse, delta, dq1, dq2, k_ptr, v_ptr, stride_k, stride_v, j, n, scale_log2,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq what comes from keys and values j .. j + BLOCK: dS k with dS = P (dout v^T - delta)."""
    columns = j + tl.arange(0, BLOCK)
    k1 = _load(k_ptr, columns, stride_k, n, D // 2, HALF, MASKED)
    k2 = _load(k_ptr + D // 2, columns, stride_k, n, D // 2, HALF, MASKED)
    v = _load(v_ptr, columns, stride_v, n, D, WIDTH, MASKED)
    S = _dot_halves(q1, q2, k1, k2, PRECISION)
    P = tl.exp2(tl.fma(S, scale_log2, -lse[:, None]))
    if MASKED:
        P = tl.where(columns[None, :] < n, P, 0.0)
    dP = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dS = (P * (dP - delta[:, None])).to(k1.dtype)
    return tl.dot(dS, k1, dq1, input_precision=PRECISION), tl.dot(dS, k2, dq2, input_precision=PRECISION)


@triton.jit(do_not_specialize=["N", "prefix", "heads", "tiles"])
def attention_backward_q(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_seqlens_ptr,
    stride_vb, stride_vn, stride_vh, N, prefix, heads, tiles, scale, scale_log2,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dq = R^-1(scale dS k) of BLOCK_M queries of one head, and delta = rowsum(dout * out), for dk to come.

    q, k, out, dout, dq: (B, N, heads, D) contiguous, q and k rotated already; v: any strides but the last.
    lse, delta: (B, heads, N) float32.
    """
    tile, head, batch, start, n = _locate(cu_seqlens_ptr, N, heads, tiles)
    if tile * BLOCK_M >= n:
        return
    first, stride = ((batch * N + start) * heads + head) * D, heads * D
    v_ptr += batch * stride_vb + start * stride_vn + head * stride_vh
    statistics = (batch * heads + head) * N + start

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    out = _load(out_ptr + first, rows, stride, n, D, WIDTH, True)
    dout = _load(dout_ptr + first, rows, stride, n, D, WIDTH, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + statistics + rows, delta, mask=rows < n)
    lse = tl.load(lse_ptr + statistics + rows, mask=rows < n, other=float("inf"))
    q1 = _load(q_ptr + first, rows, stride, n, D // 2, HALF, True)
    q2 = _load(q_ptr + first + D // 2, rows, stride, n, D // 2, HALF, True)
    dq1 = tl.zeros([BLOCK_M, HALF], tl.float32)
    dq2 = tl.zeros([BLOCK_M, HALF], tl.float32)
    whole = n // BLOCK_N * BLOCK_N
    for j in range(0, whole, BLOCK_N):
        dq1, dq2 = _grad_of_queries(
            q1, q2, dout, lse, delta, dq1, dq2, k_ptr + first, v_ptr, stride, stride_vn, j, n, scale_log2,
            D, HALF, WIDTH, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    for j in tl.range(whole, n, TAIL, num_stages=1):
        dq1, dq2 = _grad_of_queries(
            q1, q2, dout, lse, delta, dq1, dq2, k_ptr + first, v_ptr, stride, stride_vn, j, n, scale_log2,
            D, HALF, WIDTH, TAIL, True, PRECISION,
        )  # fmt: skip
    angles = (start - prefix) * (D // 2)
    cos, sin = _load_angles(cos_ptr + angles, sin_ptr + angles, rows, prefix, n, D, HALF)
    dq1, dq2 = _rotate(dq1 * scale, dq2 * scale, cos, -sin)
    _store(dq_ptr + first, dq1, rows, stride, n, D // 2, HALF)
    _store(dq_ptr + first + D // 2, dq2, rows, stride, n, D // 2, HALF)


@triton.jit
def _grad_of_keys(
    k1, k2, v, dk1, dk2, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride, j, n, scale_log2,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what comes from queries j .. j + BLOCK: dS^T q and P^T dout, all products transposed."""
    columns = j + tl.arange(0, BLOCK)
    q1 = _load(q_ptr, columns, stride, n, D // 2, HALF, True)
    q2 = _load(q_ptr + D // 2, columns, stride, n, D // 2, HALF, True)
    dout = _load(dout_ptr, columns, stride, n, D, WIDTH, True)
    # an infinite lse makes the queries beyond the edge vanish
    lse = tl.load(lse_ptr + columns, mask=columns < n, other=float("inf"))
    delta = tl.load(delta_ptr + columns, mask=columns < n, other=0.0)
    St = _dot_halves(k1, k2, q1, q2, PRECISION)
    Pt = tl.exp2(tl.fma(St, scale_log2, -lse[None, :]))
    dv = tl.dot(Pt.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dPt = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dSt = (Pt * (dPt - delta[None, :])).to(q1.dtype)
    dk1 = tl.dot(dSt, q1, dk1, input_precision=PRECISION)
    dk2 = tl.dot(dSt, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=["N", "prefix", "heads", "tiles"])
def attention_backward_kv(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr,
    stride_vb, stride_vn, stride_vh, N, prefix, heads, tiles, scale, scale_log2,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dk = R^-1(scale dS^T q) and dv = P^T dout of BLOCK_N keys of one head.

    Tensors as in `attention_backward_q`.
    """
    tile, head, batch, start, n = _locate(cu_seqlens_ptr, N, heads, tiles)
    if tile * BLOCK_N >= n:
        return
    first, stride = ((batch * N + start) * heads + head) * D, heads * D
    v_ptr += batch * stride_vb + start * stride_vn + head * stride_vh
    statistics = (batch * heads + head) * N + start

    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k1 = _load(k_ptr + first, rows, stride, n, D // 2, HALF, True)
    k2 = _load(k_ptr + first + D // 2, rows, stride, n, D // 2, HALF, True)
    v = _load(v_ptr, rows, stride_vn, n, D, WIDTH, True)
    dk1 = tl.zeros([BLOCK_N, HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_N, HALF], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for j in range(0, n, BLOCK_M):
        dk1, dk2, dv = _grad_of_keys(
            k1, k2, v, dk1, dk2, dv, q_ptr + first, dout_ptr + first, lse_ptr + statistics, delta_ptr + statistics,
            stride, j, n, scale_log2, D, HALF, WIDTH, BLOCK_M, PRECISION,
        )  # fmt: skip
    angles = (start - prefix) * (D // 2)
    cos, sin = _load_angles(cos_ptr + angles, sin_ptr + angles, rows, prefix, n, D, HALF)
    dk1, dk2 = _rotate(dk1 * scale, dk2 * scale, cos, -sin)
    _store(dk_ptr + first, dk1, rows, stride, n, D // 2, HALF)
    _store(dk_ptr + first + D // 2, dk2, rows, stride, n, D // 2, HALF)
    _store(dv_ptr + first, dv, rows, stride, n, D, WIDTH)


@triton.jit(do_not_specialize=["N", "prefix", "heads", "n"])
def rotate(
    q_ptr, k_ptr, cos_ptr, sin_ptr, out_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, N, prefix, heads, n,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Store out = (R(q), R(k)), or with R^-1, of BLOCK of the n = B N heads rows of D elements.

    q, k: (B, N, heads, D), any strides but the last. cos, sin: (N - prefix, D/2) float32. out: (2, B, N, heads, D)
    contiguous.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, HALF)[None, :]
    inside = (rows < n)[:, None] & (columns < D // 2)
    head, token, batch = rows % heads, rows // heads % N, (rows // heads // N).to(tl.int64)
    turned = inside & (token >= prefix)[:, None]
    angles = (token - prefix)[:, None] * (D // 2) + columns
    cos = tl.load(cos_ptr + angles, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + angles, mask=turned, other=0.0)
    sin = -sin if INVERSE else sin

    q_ptr += (batch * stride_qb + token * stride_qn + head * stride_qh)[:, None] + columns
    k_ptr += (batch * stride_kb + token * stride_kn + head * stride_kh)[:, None] + columns
    out_ptr += rows.to(tl.int64)[:, None] * D + columns
    q1, q2 = tl.load(q_ptr, mask=inside, other=0.0), tl.load(q_ptr + D // 2, mask=inside, other=0.0)
    k1, k2 = tl.load(k_ptr, mask=inside, other=0.0), tl.load(k_ptr + D // 2, mask=inside, other=0.0)
    q1, q2 = _rotate(q1, q2, cos, sin)
    k1, k2 = _rotate(k1, k2, cos, sin)
    tl.store(out_ptr, q1, mask=inside)
    tl.store(out_ptr + D // 2, q2, mask=inside)
    out_ptr += n.to(tl.int64) * D
    tl.store(out_ptr, k1, mask=inside)
    tl.store(out_ptr + D // 2, k2, mask=inside)
