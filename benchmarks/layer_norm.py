"""add_layer_norm beside PyTorch's own operations: errors of outputs and gradients against float64, and times.

    python benchmarks/layer_norm.py [--no-save] [--small]

Without a GPU the kernels run in Triton's interpreter, in float32 and float16. Writes
benchmarks/results/layer_norm_cpu.json or .._cuda.json, of which a table of kernels/README.md is made.
"""

from __future__ import annotations

from collections.abc import Callable

import row_errors  # says where triton is to run before it is imported
import torch
import torch.nn.functional as F
from dinov3_lite.kernels import add_layer_norm, add_layer_norm_reference
from row_errors import DEVICE, dtype_name
from torch import Tensor

EPS = 1e-5
TENSORS = ["x_new", "normed", "dx", "dbranch", "dgamma", "dweight", "dbias"]
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16)]
if DEVICE == "cuda":
    DTYPES += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
FUNCTIONS = {
    "kernel": lambda *tensors: add_layer_norm(*tensors, EPS),
    "eager": lambda *tensors: eager_add_layer_norm(*tensors),
}


def eager_add_layer_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """What the model does without the kernel, in the same dtypes."""
    x_new = torch.addcmul(x, branch, gamma).to(x.dtype)
    normed = F.layer_norm(x_new, gamma.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)
    return x_new, normed.to(weight.dtype)


def inputs(T: int, C: int, stream: torch.dtype, half: torch.dtype) -> list[Tensor]:
    """Trained-like: rows with a mean and one channel far from it, gains over a decade, LayerScale over two."""
    x = 3 * torch.randn(T, C, device=DEVICE) + torch.randn(T, 1, device=DEVICE)
    x[:, C // 3] += 300
    u, z = torch.rand(C, device=DEVICE), torch.randn(2, C, device=DEVICE)
    others = torch.randn(T, C, device=DEVICE), 10 ** (-2 * u), torch.exp(0.7 * z[0]), 0.2 * z[1]
    return [x.to(stream), *(t.to(half) for t in others)]


def measure(widths: list[int], T: int, what: Callable) -> list[dict]:
    """What is measured of the kernel and of PyTorch's operations, on the same T rows."""
    rows = []
    for C in widths:
        for stream, half in DTYPES:
            tensors = inputs(T, C, stream, half)
            grads = [torch.randn(T, C, device=DEVICE).to(dtype) for dtype in (stream, half)]
            dtypes = dtype_name(half) if stream == half else f"{dtype_name(half)} on {dtype_name(stream)}"
            found = what(FUNCTIONS, lambda *t: add_layer_norm_reference(*t, EPS), tensors, grads, TENSORS)
            rows.append({"width": C, "dtype": dtypes, **found})
    return rows


def error_table(rows: list[dict]) -> str:
    return row_errors.table("add_layer_norm", TENSORS, rows)


if __name__ == "__main__":
    row_errors.run("layer_norm", __doc__, measure, [384, 1280, 4096], error_table)
