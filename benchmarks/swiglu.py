"""swiglu beside PyTorch's own operations: errors of output and gradient against float64, and times.

    python benchmarks/swiglu.py [--no-save] [--small]

Without a GPU the kernels run in Triton's interpreter, in float32 and float16. Writes
benchmarks/results/swiglu_cpu.json or .._cuda.json, of which a table of kernels/README.md is made.
"""

from __future__ import annotations

from collections.abc import Callable

import row_errors  # says where triton is to run before it is imported
import torch
import torch.nn.functional as F
from dinov3_lite.kernels import swiglu, swiglu_reference
from row_errors import DEVICE, dtype_name
from torch import Tensor

TENSORS = ["out", "dgate_value"]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def eager_swiglu(gate_value: Tensor) -> Tensor:
    """What the model does without the kernel."""
    gate, value = gate_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def measure(widths: list[int], T: int, what: Callable) -> list[dict]:
    """What is measured of the kernel and of PyTorch's operations, on the same T rows."""
    rows = []
    for hidden in widths:
        for dtype in DTYPES:
            gate_value = (2 * torch.randn(T, 2 * hidden, device=DEVICE)).to(dtype)
            grads = [torch.randn(T, hidden, device=DEVICE).to(dtype)]
            functions = {"kernel": swiglu, "eager": eager_swiglu}
            found = what(functions, swiglu_reference, [gate_value], grads, TENSORS)
            rows.append({"width": hidden, "dtype": dtype_name(dtype), **found})
    return rows


def error_table(rows: list[dict]) -> str:
    return row_errors.table("swiglu", TENSORS, rows)


if __name__ == "__main__":
    row_errors.run("swiglu", __doc__, measure, [1536], error_table)
