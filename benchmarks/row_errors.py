"""A kernel over rows beside PyTorch's own operations, for layer_norm.py and swiglu.py: errors and times."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from environment import environment, headline, save
from timing import interleaved, relative_difference, spread
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
ROWS = 15
MANY_ROWS = 32 * 201  # what is timed: tokens that fill a GPU
ROUNDS, REPEATS = 20, 10


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_gradients(function: Callable, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def errors(
    functions: dict[str, Callable], definition: Callable, tensors: list[Tensor], grads: list[Tensor], names: list[str]
) -> dict[str, dict[str, float]]:
    """Relative errors ||x - truth|| / ||truth|| of each function, for outputs and gradients of these names."""
    truth = with_gradients(definition, [t.double() for t in tensors], [g.double() for g in grads])
    return {
        who: dict(zip(names, map(relative_difference, with_gradients(f, tensors, grads), truth), strict=True))
        for who, f in functions.items()
    }


def table(title: str, names: list[str], rows: list[dict]) -> str:
    """A line a width and dtype; each cell: the kernel's error, PyTorch's."""
    lines = [f"| {title}: kernel, eager | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row['kernel'][name]:.1e}, {row['eager'][name]:.1e}" for name in names]
        lines.append(f"| {row['width']}, {row['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def times(functions: dict[str, Callable], tensors: list[Tensor], grads: list[Tensor]) -> dict[str, list[float]]:
    """Seconds of a call and its gradients, in each round."""
    calls = {who: lambda function=f: with_gradients(function, tensors, grads) for who, f in functions.items()}
    return interleaved(calls, ROUNDS, REPEATS)


def time_table(rows: list[dict]) -> str:
    """A line a width and dtype: milliseconds of a call and its gradients, median (quartiles)."""
    lines = ["| width, dtype | kernel | eager |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['width']}, {row['dtype']} | {spread(row['kernel'])} | {spread(row['eager'])} |")
    return "\n".join(lines)


def run(
    script: str,
    description: str | None,
    measure: Callable[[list[int], int, Callable], list[dict]],
    widths: list[int],
    error_table: Callable[[list[dict]], str],
) -> None:
    """The command line of a script: measure, print, and write benchmarks/results/SCRIPT_cpu.json or .._cuda.json.

    measure(widths, number of rows, what is measured of functions, definition, tensors, gradients and names) -> rows
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--small", action="store_true", help="a rehearsal: the first width, nothing saved")
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "environment": environment("triton"),
        "errors": measure(widths[:1] if args.small else widths, ROWS, errors),
    }
    print(headline(result), error_table(result["errors"]), sep="\n\n")
    if DEVICE == "cuda" and not args.small:
        result["times"] = measure(
            widths, MANY_ROWS, lambda f, definition, tensors, grads, names: times(f, tensors, grads)
        )
        print(time_table(result["times"]))
    if not (args.no_save or args.small):
        save(f"{script}_{DEVICE}", result)
