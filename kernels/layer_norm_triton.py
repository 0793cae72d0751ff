"""The Triton kernels of residual + LayerScale + LayerNorm. Letters as in `tiles_triton`.

C is the model's, so it is constexpr: one compilation a model, and a compiler that knows how rows are aligned. Row
offsets are 64-bit. Arithmetic is float32 whatever the tensors are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles_triton import load_float32


@triton.jit
def normalise(
    x,  # (BLOCK_C,) float32, zero where not mask
    mask,  # (BLOCK_C,)
    eps,
    C: tl.constexpr,
):
    """One row as xhat = (x - mean) / sqrt(var + eps), (BLOCK_C,), and rstd = 1 / sqrt(var + eps)."""
    # (BLOCK_C,)
    centred = tl.where(mask, x - tl.sum(x) / C, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / C + eps)
    return centred * rstd, rstd


@triton.jit
def add_layer_norm_forward_kernel(
    x_ptr,  # (T, C)
    branch_ptr,  # (T, C)
    gamma_ptr,  # (C,)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    x_new_ptr,  # (T, C)
    normed_ptr,  # (T, C)
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program a row: x_new = x + gamma branch, normed = xhat weight + bias."""
    # (BLOCK_C,)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    row = tl.program_id(0).to(tl.int64) * C + cols

    # (BLOCK_C,)
    gamma = load_float32(gamma_ptr + cols, mask)
    x_new = load_float32(x_ptr + row, mask) + gamma * load_float32(branch_ptr + row, mask)
    x_new = x_new.to(x_new_ptr.dtype.element_ty)
    tl.store(x_new_ptr + row, x_new, mask=mask)
    # what is normalised is what is stored: the backward, which reads it, finds the same statistics
    xhat, _ = normalise(x_new.to(tl.float32), mask, eps, C)
    normed = xhat * load_float32(weight_ptr + cols, mask) + load_float32(bias_ptr + cols, mask)
    tl.store(normed_ptr + row, normed, mask=mask)


@triton.jit(do_not_specialize=["T"])
def add_layer_norm_backward_kernel(
    x_new_ptr,  # (T, C)
    branch_ptr,  # (T, C)
    gamma_ptr,  # (C,)
    weight_ptr,  # (C,)
    grad_x_new_ptr,  # (T, C)
    grad_normed_ptr,  # (T, C)
    grad_x_ptr,  # (T, C)
    grad_branch_ptr,  # (T, C)
    partials_ptr,  # (programs, 3, C) float32: each program's sums for the gradients of gamma, weight and bias
    T,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes every num_programs-th row and keeps its sums over rows in registers: no atomics.

    gamma and weight are read again for every row: they stay in the L1 cache, and in registers they made others spill.
    """
    program = tl.program_id(0)
    # (BLOCK_C,)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    grad_gamma = tl.zeros((BLOCK_C,), tl.float32)
    grad_weight = tl.zeros((BLOCK_C,), tl.float32)
    grad_bias = tl.zeros((BLOCK_C,), tl.float32)

    for t in range(program, T, tl.num_programs(0)):
        # (BLOCK_C,)
        row = tl.cast(t, tl.int64) * C + cols
        xhat, rstd = normalise(load_float32(x_new_ptr + row, mask), mask, eps, C)
        grad_normed = load_float32(grad_normed_ptr + row, mask)
        grad_weight += grad_normed * xhat
        grad_bias += grad_normed
        grad_xhat = grad_normed * load_float32(weight_ptr + cols, mask)
        grad_x = rstd * (grad_xhat - tl.sum(grad_xhat) / C - xhat * (tl.sum(grad_xhat * xhat) / C))
        grad_x += load_float32(grad_x_new_ptr + row, mask)
        tl.store(grad_x_ptr + row, grad_x, mask=mask)
        tl.store(grad_branch_ptr + row, grad_x * load_float32(gamma_ptr + cols, mask), mask=mask)
        grad_gamma += grad_x * load_float32(branch_ptr + row, mask)

    # (BLOCK_C,)
    sums_ptr = partials_ptr + program * 3 * C + cols
    tl.store(sums_ptr, grad_gamma, mask=mask)
    tl.store(sums_ptr + C, grad_weight, mask=mask)
    tl.store(sums_ptr + 2 * C, grad_bias, mask=mask)
