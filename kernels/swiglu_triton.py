"""The Triton kernels of SwiGLU, silu(gate) value of a fused projection [gate | value]. Letters as in `tiles_triton`.

F is the model's, so it is constexpr. Row offsets are 64-bit. Arithmetic is float32 whatever the tensors are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles_triton import load_float32


@triton.jit
def swiglu_forward_kernel(
    gate_value_ptr,  # (T, 2F)
    out_ptr,  # (T, F)
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program writes BLOCK_F channels of one row of silu(gate) value."""
    row = tl.program_id(0).to(tl.int64)
    # (BLOCK_F,)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < F
    gate_ptr = gate_value_ptr + row * 2 * F + cols
    gate = load_float32(gate_ptr, mask)
    value = load_float32(gate_ptr + F, mask)
    tl.store(out_ptr + row * F + cols, gate * tl.sigmoid(gate) * value, mask=mask)


@triton.jit
def swiglu_backward_kernel(
    gate_value_ptr,  # (T, 2F)
    grad_out_ptr,  # (T, F)
    grad_gate_value_ptr,  # (T, 2F)
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program writes the gradients of BLOCK_F gates and values of one row."""
    row = tl.program_id(0).to(tl.int64)
    # (BLOCK_F,)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < F
    gate_ptr = gate_value_ptr + row * 2 * F + cols
    gate = load_float32(gate_ptr, mask)
    value = load_float32(gate_ptr + F, mask)
    grad_out = load_float32(grad_out_ptr + row * F + cols, mask)

    # (BLOCK_F,)
    sigmoid = tl.sigmoid(gate)
    grad_gate_ptr = grad_gate_value_ptr + row * 2 * F + cols
    tl.store(grad_gate_ptr, grad_out * value * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)
    tl.store(grad_gate_ptr + F, grad_out * gate * sigmoid, mask=mask)
