"""The row kernels beside PyTorch's own operations: errors of outputs and gradients against float64.

    python benchmarks/row_kernels.py [--no-save]

Without a GPU the kernels run in Triton's interpreter, in float32 and float16. Writes
benchmarks/results/row_kernels_cpu.json or .._cuda.json, of which the tables of kernels/README.md are made.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from environment import environment, headline, save
from timing import relative_difference
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from dinov3_lite.kernels import add_layer_norm, add_layer_norm_reference, swiglu, swiglu_reference  # noqa: E402

EPS = 1e-5
TENSORS = {
    "add_layer_norm": ("x_new", "normed", "dx", "dbranch", "dgamma", "dweight", "dbias"),
    "swiglu": ("out", "dgate_value"),
}
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16)]
if DEVICE == "cuda":
    DTYPES += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {"environment": environment("triton"), "errors": list(errors())}
    print(headline(result), error_table(result["errors"]), sep="\n\n")
    if not args.no_save:
        save(f"row_kernels_{DEVICE}", result)


def eager_add_layer_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """What the model does without the kernel, in the same dtypes."""
    x_new = torch.addcmul(x, branch, gamma).to(x.dtype)
    normed = F.layer_norm(x_new, gamma.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)
    return x_new, normed.to(weight.dtype)


def eager_swiglu(gate_value: Tensor) -> Tensor:
    gate, value = gate_value.chunk(2, dim=-1)
    return F.silu(gate) * value


# kernel, PyTorch's own, definition
FUNCTIONS: dict[str, tuple[Callable, Callable, Callable]] = {
    "add_layer_norm": (
        lambda *tensors: add_layer_norm(*tensors, EPS),
        eager_add_layer_norm,
        lambda *tensors: add_layer_norm_reference(*tensors, EPS),
    ),
    "swiglu": (swiglu, eager_swiglu, swiglu_reference),
}


def inputs(operation: str, rows: int, C: int, stream: torch.dtype, half: torch.dtype) -> list[Tensor]:
    """Trained-like: rows with a mean and one channel far from it, gains over a decade, LayerScale over two."""
    if operation == "swiglu":
        return [(2 * torch.randn(rows, 2 * C, device=DEVICE)).to(half)]
    x = 3 * torch.randn(rows, C, device=DEVICE) + torch.randn(rows, 1, device=DEVICE)
    x[:, C // 3] += 300
    u, z = torch.rand(C, device=DEVICE), torch.randn(2, C, device=DEVICE)
    others = torch.randn(rows, C, device=DEVICE), 10 ** (-2 * u), torch.exp(0.7 * z[0]), 0.2 * z[1]
    return [x.to(stream), *(t.to(half) for t in others)]


def with_gradients(function: Callable, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def errors() -> Iterator[dict]:
    """Relative errors ||x - truth|| / ||truth|| of the kernel and of PyTorch's operations, on the same inputs."""
    for operation, C in [("add_layer_norm", 384), ("add_layer_norm", 1280), ("add_layer_norm", 4096), ("swiglu", 1536)]:
        for stream, half in DTYPES if operation == "add_layer_norm" else [(d, d) for d in dict(DTYPES)]:
            tensors = inputs(operation, 15, C, stream, half)
            output_dtypes = (stream, half) if operation == "add_layer_norm" else (half,)
            grads = [torch.randn(15, C, device=DEVICE).to(dtype) for dtype in output_dtypes]
            kernel, eager, definition = FUNCTIONS[operation]
            truth = with_gradients(definition, [t.double() for t in tensors], [g.double() for g in grads])
            dtypes = name(half) if stream == half else f"{name(half)} on {name(stream)}"
            row: dict = {"operation": operation, "width": C, "dtype": dtypes}
            for who, function in (("kernel", kernel), ("eager", eager)):
                found = map(relative_difference, with_gradients(function, tensors, grads), truth)
                row[who] = dict(zip(TENSORS[operation], found, strict=True))
            yield row


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error_table(rows: list[dict]) -> str:
    """A line an operation, width and dtype; each cell: the kernel's error, PyTorch's."""
    lines = []
    for operation, tensors in TENSORS.items():
        lines.append(f"| {operation}: kernel, eager | " + " | ".join(tensors) + " |")
        lines.append("|---" * (len(tensors) + 1) + "|")
        for row in (row for row in rows if row["operation"] == operation):
            cells = [f"{row['kernel'][t]:.1e}, {row['eager'][t]:.1e}" for t in tensors]
            lines.append(f"| {row['width']}, {row['dtype']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
