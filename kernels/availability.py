"""Where the kernels can run, and why not. Imports neither torch nor triton by itself."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def is_available() -> bool:
    """Whether the kernels can run here; `unavailable_reason` says why not."""
    return unavailable_reason() is None


@cache
def unavailable_reason() -> str | None:
    """What keeps the kernels from running, or None: they need triton and a GPU of capability 8.0, or the interpreter.

    Triton's interpreter runs them on the CPU, slowly, where TRITON_INTERPRET=1 is set before triton is first imported.
    """
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if interpreted():
        return None
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{torch.cuda.get_device_name()} has capability {major}.{minor}: the kernels need 8.0 or more"
    return None


def interpreted() -> bool:
    """Whether triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def interpreter_knows_bfloat16() -> bool:
    """Whether triton's interpreter multiplies bfloat16, rather than its bits as integers (3.6 and 3.9 do)."""
    import torch

    from .tiles_triton import square_kernel

    two = torch.full((16, 16), 2.0, dtype=torch.bfloat16)
    out = torch.empty(16, 16)
    square_kernel[(1,)](x_ptr=two, out_ptr=out, BLOCK=16)
    return out[0, 0].item() == 16 * 2.0 * 2.0


def require(op: str, name: str, x: Tensor) -> None:
    """Raise a RuntimeError that says why, if `op` can't run here or not on the device of its argument `name`, x."""
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"{op} can't run: {reason}")
    if not x.is_cuda and not interpreted():
        raise RuntimeError(f"{name} is on {x.device}: expected a CUDA device, or the CPU under TRITON_INTERPRET=1")
