"""Kernels with one fault each, for the test that the compile gate finds it."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from dinov3_lite.kernels.builds import Build


@triton.jit
def spills(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """More live values than registers: every row meets every other, and one warp holds them all."""
    rows = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows)
    y = tl.load(x_ptr + rows + BLOCK * BLOCK)
    for _ in range(BLOCK):
        x, y = x * tl.sum(y) + y, y * tl.sum(x) + x
    tl.store(out_ptr + rows, x + y)


@triton.jit
def adds_atomically(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(out_ptr, tl.sum(x))


@triton.jit
def copies_from_the_second_element(x_ptr, out_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + 1 + columns))


@triton.jit
def multiplies(x_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr):
    """The product x x^T over tiles of K columns; rows fewer than the 64 of wgmma fall back to the older instruction."""
    rows, columns = tl.arange(0, M), tl.arange(0, K)
    acc = tl.zeros((M, M), tl.float32)
    for k in range(0, 8 * K, K):
        x = tl.load(x_ptr + rows[:, None] * 8 * K + k + columns[None, :])
        acc = tl.dot(x, x.T, acc)
    tl.store(out_ptr + rows[:, None] * M + rows[None, :], acc)


@triton.jit
def does_not_compile(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


def builds(target: int) -> Iterator[Build]:
    if target != 90:
        return
    for kernel, constexprs, num_stages in [
        (spills, {"BLOCK": 128}, 1),
        (adds_atomically, {"BLOCK": 1024}, 1),
        (copies_from_the_second_element, {"BLOCK": 1024}, 1),
        (multiplies, {"M": 32, "K": 64}, 1),
        (multiplies, {"M": 128, "K": 256}, 5),
        (does_not_compile, {"BLOCK": 1000}, 1),
    ]:
        types = {"x_ptr": "*fp16", "out_ptr": "*fp32"} | dict.fromkeys(constexprs, "constexpr")
        num_warps = 1 if kernel is spills else 4
        sizes = ", ".join(f"{name}={value}" for name, value in constexprs.items())
        yield Build(f"{kernel.__name__} {sizes}", kernel, types, constexprs, num_warps, num_stages)
