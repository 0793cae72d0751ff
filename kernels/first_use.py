"""Each kernel is compared with plain torch when it is first used: nobody's data is the first to meet a wrong build.

A compiler may get a kernel wrong on a GPU that nobody tried. So each kernel has a plain form, the same function in
PyTorch's own operations, and small arguments to compare the two on: once a process for each device, dtype, width and
way of launching. Where they disagree, or where the kernel can't be compiled, the plain form takes over for good, with
one warning. What `tuning` knows to be measured on this architecture with this release of triton is taken as it is.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import tuning

LOGGER = logging.getLogger("dinov3_lite.kernels")
# (operation, device, dtype, width) of kernels that were found wrong
FAILED: set[tuple[str, torch.device, torch.dtype, int]] = set()
# one check at a time: threads that come meanwhile wait for its verdict
LOCK = threading.RLock()


class Checked:
    """A function that launches a kernel, if its first use showed it to be right, and else its plain form.

        out = checked((device, dtype, width, *flags), *arguments)

    launch, plain: from the same arguments to a tensor or a tuple of them. sample: from what stands in the first
    argument, the kind of use, to small arguments of that kind. width: the head dim, or the channels of a row.
    """

    def __init__(
        self,
        operation: str,
        launch: Callable[..., Any],
        plain: Callable[..., Any],
        sample: Callable[..., tuple[Any, ...]],
    ) -> None:
        self.operation, self.launch, self.plain, self.sample = operation, launch, plain, sample
        self.verdicts: dict[tuple[Any, ...], bool] = {}

    def __call__(self, kind: tuple[Any, ...], *arguments: Any) -> Any:
        right = self.verdicts.get(kind)
        if right is None:
            right = self._first_use(kind)
        return (self.launch if right else self.plain)(*arguments)

    def _first_use(self, kind: tuple[Any, ...]) -> bool:
        device, dtype, width, *_ = kind
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return (
                True  # a graph being captured can't wait for a verdict, and would replay the check; the next use does
            )
        with LOCK:
            if kind not in self.verdicts:
                measured = tuning.is_measured(self.operation, device, dtype, width)
                problem = None if measured else self.problem(kind)
                if problem is not None:
                    self._warn(problem, device, dtype, width)
                elif not measured:
                    LOGGER.info(
                        "%s in %s at width %d was never timed on %s; its results agree with PyTorch's there",
                        *(self.operation, dtype, width, _name(device)),
                    )
                self.verdicts[kind] = problem is None
            return self.verdicts[kind]

    def _warn(self, problem: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
        """Warn, but once for an operation that is wrong in several ways to launch it."""
        failed = (self.operation, device, dtype, width)
        if failed not in FAILED:
            FAILED.add(failed)
            warnings.warn(
                f"{self.operation} is wrong on {_name(device)} in {dtype} at width {width}: {problem}. PyTorch's own "
                "operations take over in this process, slower and right; please report this with your versions of "
                "triton and torch",
                RuntimeWarning,
                stacklevel=2,
            )

    def problem(self, kind: tuple[Any, ...]) -> str | None:
        """What is wrong with the kernel on small arguments, or None."""
        device = kind[0]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            arguments = self.sample(*kind)
            truth = self.plain(*(_wide(x) for x in arguments))
            try:
                found = self.launch(*arguments)
                bound = max(_bound(part) for part in kind if isinstance(part, torch.dtype))
                outputs = zip(_tuple(found), _tuple(truth), strict=True)
                return next(filter(None, (_disagreement(*output, bound) for output in outputs)), None)
            except torch.OutOfMemoryError:
                raise  # says nothing of the kernel
            except Exception as error:
                return f"{type(error).__name__}: {error}"


def has_failed(x: Tensor, *operations: str) -> bool:
    """Whether the first use showed one of these operations to be wrong for tensors like x, (.., width).

    For callers that have a better substitute than the plain form.
    """
    return bool(FAILED) and any((operation, x.device, x.dtype, x.shape[-1]) in FAILED for operation in operations)


def sample(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that are the same in every process; the global generators are left alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(device, dtype)


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _bound(dtype: torch.dtype) -> float:
    """What roundings can explain, relative to the largest element: a wrong row, tile or head is far beyond."""
    if tuning.precision(dtype) == "tf32":
        return 2**-7
    return (64 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps


def _disagreement(found: Tensor, truth: Tensor, bound: float) -> str | None:
    """A sentence if an element is further off than the bound, relative to the largest, else None."""
    if not found.numel():
        return None
    error = ((found.double() - truth).abs().max() / truth.abs().max()).item()
    if error <= bound:
        return None
    return f"an element is off by {error:.1e} of the largest one, expected at most {bound:.1e}"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "triton's interpreter"
