"""The mended interpreter rounds to bfloat16 as PyTorch does: kernels are then tested in the dtype that GPUs use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter import narrow, widen


def test_bfloat16_is_pytorchs():
    bits = torch.randint(-(2**31), 2**31, (100_000,)).int()
    ties = torch.arange(0, 2**16, 257).int() << 16 | 0x8000
    numbers = torch.cat((bits, ties, ties + 1, ties - 1)).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45])
    numbers = torch.cat((numbers, special))
    expected = numbers.to(torch.bfloat16).float()
    ours = torch.from_numpy(widen(narrow(numbers.numpy())))
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert narrow(np.float32(1.0)).shape == ()


def test_a_kernel_in_bfloat16():
    """Loads, products, sums, casts and stores of one kernel of each sort, on numbers that bfloat16 holds exactly."""
    pytest.importorskip("triton")
    import kernel_inputs  # noqa: F401  which mends the interpreter
    from dinov3_lite.kernels import availability, swiglu

    assert availability.interpreter_knows_bfloat16() or torch.cuda.is_available()
    gate_value = torch.tensor([[0.0, 200.0, 3.0, 257.0 / 256]], dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.equal(swiglu(gate_value.to(device)).cpu(), torch.tensor([[0.0, 200.0]], dtype=torch.bfloat16))
