"""What the Triton kernels share: how tiles are read, turned, multiplied and written. Each function is one equation.

Letters, in all kernels: B images, N tokens of an image or of a whole pack, n tokens of one sequence, D head dim,
T rows, C channels, F half the width of a gated projection.

Rotation pairs element i of a head with element i + D/2, so queries and keys are held as two halves (tokens, D/2): to
turn them is elementwise, their product the sum of two. WIDTH and HALF are D and D/2 padded to the powers of two that
`tl.arange` takes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_float32(pointers, mask):
    """What the pointers hold as float32, zero where the mask is false."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_tile(
    ptr,  # (n, D), rows `stride` elements apart
    rows,  # (BLOCK,)
    stride,
    n,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """These rows of a matrix as a tile (BLOCK, WIDTH), zero beyond its edges."""
    # (WIDTH,)
    cols = tl.arange(0, WIDTH)
    # (BLOCK, WIDTH)
    pointers = ptr + rows[:, None] * stride + cols[None, :]
    if MASKED or D != WIDTH:
        tile = tl.load(pointers, mask=(rows[:, None] < n) & (cols[None, :] < D), other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    ptr,  # (n, D), rows `stride` elements apart
    tile,  # (BLOCK, WIDTH)
    rows,  # (BLOCK,)
    stride,
    n,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store what of a tile lies within the matrix."""
    # (WIDTH,)
    cols = tl.arange(0, WIDTH)
    # (BLOCK, WIDTH)
    pointers = ptr + rows[:, None] * stride + cols[None, :]
    tl.store(pointers, tile, mask=(rows[:, None] < n) & (cols[None, :] < D))


@triton.jit
def load_angles(
    cos_ptr,  # (tokens, D/2) float32, shifted so that row 0 is the sequence's first token
    sin_ptr,  # like cos
    rows,  # (BLOCK,)
    prefix,
    n,
    D: tl.constexpr,
    HALF: tl.constexpr,
):
    """The cos and sin of these tokens, (BLOCK, HALF) each: the identity for prefix tokens and beyond the edges."""
    # (HALF,)
    cols = tl.arange(0, HALF)
    # (BLOCK, HALF)
    offsets = rows[:, None] * (D // 2) + cols[None, :]
    mask = (rows[:, None] >= prefix) & (rows[:, None] < n) & (cols[None, :] < D // 2)
    return tl.load(cos_ptr + offsets, mask=mask, other=1.0), tl.load(sin_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def rotate_pairs(x1, x2, cos, sin):
    """The pairs (x1, x2) turned by their angles, in float32."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def dot_halves(x1, x2, y1, y2, PRECISION: tl.constexpr):
    """The product x y^T of two matrices held as halves: (rows of x, rows of y) float32."""
    return tl.dot(x2, tl.trans(y2), tl.dot(x1, tl.trans(y1), input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def locate_program(
    cu_seqlens_ptr,  # (S + 1,) int32, or None for images
    N,
    heads,
    tiles,
):
    """Tile, head and batch row of this program, and its sequence's first token and length."""
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    sequence = program // (tiles * heads)
    if cu_seqlens_ptr is None:
        batch, start, n = sequence.to(tl.int64), tl.full([], 0, tl.int64), N
    else:
        # a pack is one long image whose attention stops at the borders in cu_seqlens
        batch, start = tl.full([], 0, tl.int64), tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        n = tl.load(cu_seqlens_ptr + sequence + 1) - start.to(tl.int32)
    return tile, head, batch, start, n


@triton.jit
def square_kernel(
    x_ptr,  # (BLOCK, BLOCK)
    out_ptr,  # (BLOCK, BLOCK) float32
    BLOCK: tl.constexpr,
):
    """Store x x: the interpreter is asked by it whether it can multiply a dtype."""
    # (BLOCK,)
    cols = tl.arange(0, BLOCK)
    # (BLOCK, BLOCK)
    x = load_tile(x_ptr, cols, BLOCK, BLOCK, BLOCK, BLOCK, False)
    store_tile(out_ptr, tl.dot(x, x), cols, BLOCK, BLOCK, BLOCK, BLOCK)
