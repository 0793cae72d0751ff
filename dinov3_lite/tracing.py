"""Who else sees what runs: autograd, function transforms, modes, and programs that are recorded from it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils._device import DeviceContext


def traced() -> bool:
    """Whether what runs now becomes something else: a program, by torch.compile, torch.export or torch.jit.trace, or
    a function that torch.func transforms.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed()


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def writes_in_place(x: Tensor) -> bool:
    """Whether what is computed of x may be written in place: on a CPU, and nobody differentiates, traces or maps it."""
    return type(x) is Tensor and x.is_cpu and not (torch.is_grad_enabled() or traced())


def modes_watch() -> bool:
    """Whether a mode sees every function or operator called, but for those that only choose a device."""
    if torch._C._len_torch_dispatch_stack():
        return True
    modes = torch.overrides._get_current_function_mode_stack() if torch._C._is_torch_function_mode_enabled() else ()
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def unseen(function: Callable[[], object]) -> None:
    """Call what is a model's own business, such as unpacking a weight: no part of the program that is traced now, of
    the function that is transformed, or of what a mode watches. These are of a thread each, so that another one calls.
    """
    if not (traced() or modes_watch()):
        function()
        return
    with ThreadPoolExecutor(1) as another:
        another.submit(function).result()
