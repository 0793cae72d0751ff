"""How the kernels become PyTorch operators, and what those over rows accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    gradients: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    """Register `torch.ops.dinov3_lite.<name>`, which autograd, torch.compile and torch.export see through.

    fake: its outputs' shapes and dtypes. gradients and save: its backward, as in `torch.library.register_autograd`;
    without them, differentiating it is an error. `torch.library.custom_op` would do the same, but imports torch's
    compiler at its first call: seconds.
    """

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name} has no gradient: the kernels are differentiable once")

    operator = f"dinov3_lite::{name}"
    # inputs must come as strided as they were traced, whatever the compiler would prefer
    torch.library.define(operator, schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.impl(operator, "default", implementation)
    torch.library.register_fake(operator, fake)
    torch.library.register_autograd(operator, gradients or refuse, setup_context=save)


def check_rows(name: str, x: Tensor) -> None:
    """Raise a ValueError that names x, unless it is contiguous rows of at least one channel in a dtype of DTYPES."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected at least one channel")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}: expected torch.float32, float16 or bfloat16")
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()} for shape {tuple(x.shape)}: expected it contiguous")
