"""Where the kernels can run, and what one compiled build of a kernel is. Imports neither torch nor triton by itself."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class Build(NamedTuple):
    """One kernel with one launch configuration, as `triton.compile` takes it: what can be compiled without a GPU.

    At run time every pointer, and every argument called stride_.., is a multiple of 16: `attrs` are to say so.
    """

    name: str
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # of every argument: "*fp16", "i32", "fp32", .. or "constexpr"
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int


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
def architecture(device: torch.device) -> int:
    """The newest architecture of the tables that this device can run; the interpreter takes the tiles of sm_90."""
    import torch

    from .tuning import ARCHITECTURES

    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max(arch for arch in ARCHITECTURES if arch <= 10 * major + minor)
