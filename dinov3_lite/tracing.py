"""Who else sees what runs: autograd, function transforms, and programs that are recorded from it."""

from __future__ import annotations

import torch
from torch import Tensor


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace makes a program of what runs now."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def writes_in_place(x: Tensor) -> bool:
    """Whether what is computed of x may be written in place: on a CPU, and nobody differentiates, traces or maps it."""
    plain = type(x) is Tensor and x.is_cpu and torch._C._functorch.peek_interpreter_stack() is None
    return plain and not (torch.is_grad_enabled() or traced())
