"""The row operations around a block's matrix products: residual + LayerScale + LayerNorm, and SwiGLU.

Each is one kernel forward and one backward. Both are `torch.library` ops: autograd, torch.compile and torch.export see
them as they see PyTorch's own. Letters: T rows, C channels, F half the width of a gated projection.

Autocast changes nothing here: arithmetic is float32 in any case, and results have the dtypes that the docstrings say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .launch import Build, interpreted, unavailable_reason
from .operators import define

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 4096
# 8 channels a thread, 16 bytes in half precision, here and in `_row_launch`
SWIGLU_LAUNCH = {"BLOCK_F": 1024, "num_warps": 4, "enable_fp_fusion": True}


def add_layer_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x_new = x + gamma * branch and normed = LayerNorm(x_new) * weight + bias, in one pass.

    x: (..., C), the residual stream. branch: the same shape, of the same or another dtype: the stream may be float32
    under half precision. gamma (LayerScale), weight, bias: (C,). x and branch are contiguous; C is at most 4096.

    Returns x_new (..., C) in x's dtype and normed (..., C) in weight's. Statistics are float32, of x_new as it is
    returned. Differentiable in all five; gradients are deterministic.

    Raises ValueError for shapes, dtypes, devices or strides that contradict this, RuntimeError where no kernel can run.
    """
    _check_rows("x", x)
    _check_rows("branch", branch)
    if branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}: expected {tuple(x.shape)}, the shape of x")
    if x.shape[-1] > MAX_CHANNELS:
        raise ValueError(f"x has {x.shape[-1]} channels: expected at most {MAX_CHANNELS}")
    for name, vector in (("gamma", gamma), ("weight", weight), ("bias", bias)):
        _check_rows(name, vector)
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}: expected {tuple(x.shape[-1:])}, x's channels")
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype}: expected {weight.dtype}, the dtype of weight")
    for name, tensor in (("branch", branch), ("gamma", gamma), ("weight", weight), ("bias", bias)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {x.device}, the device of x")
    x_new, normed = torch.ops.dinov3_lite.add_layer_norm(x, branch, gamma, weight, bias, eps)
    return x_new, normed


def swiglu(gate_value: Tensor) -> Tensor:
    """silu(gate) * value of a fused projection [gate | value], in one pass.

    gate_value: (..., 2F), contiguous. Returns (..., F) in its dtype, rounded once. Differentiable.

    Raises ValueError for an odd width, another dtype or strides, RuntimeError where no kernel can run.
    """
    _check_rows("gate_value", gate_value)
    if gate_value.shape[-1] % 2:
        raise ValueError(f"gate_value has {gate_value.shape[-1]} channels: expected an even number, gates and values")
    return torch.ops.dinov3_lite.swiglu(gate_value)


def _check_rows(name: str, x: Tensor) -> None:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected at least one channel")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}: expected torch.float32, float16 or bfloat16")
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()} for shape {tuple(x.shape)}: expected it contiguous")


def _check_can_run(operation: str, name: str, x: Tensor) -> None:
    if (reason := unavailable_reason()) is not None:
        raise RuntimeError(f"{operation} can't run: {reason}")
    if not x.is_cuda and not interpreted():
        raise RuntimeError(f"{name} is on {x.device}: expected a CUDA device, or the CPU under TRITON_INTERPRET=1")


def _row_launch(C: int) -> dict[str, int]:
    """A whole row a program."""
    block = 1 << (C - 1).bit_length()
    return {"BLOCK_C": block, "num_warps": max(1, block // 256), "enable_fp_fusion": True}


def _num_programs(T: int, num_warps: int, device: torch.device) -> int:
    """Programs of the backward: those that are resident at a time, 16 warps of its 100 registers a thread.

    It depends on shapes and device alone, so sums over rows are always taken in the same order.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(T, processors * 16 // num_warps)


def _add_layer_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check_can_run("add_layer_norm", "x", x)
    from .rows_triton import add_layer_norm_forward_kernel

    C = x.shape[-1]
    x_new, normed = torch.empty_like(x), torch.empty_like(x, dtype=weight.dtype)
    with torch.cuda.device_of(x):
        add_layer_norm_forward_kernel[(x.numel() // C,)](
            x, branch, gamma, weight, bias, x_new, normed, eps, C=C, **_row_launch(C)
        )
    return x_new, normed


def _add_layer_norm_backward(
    x_new: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, grad_x_new: Tensor, grad_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and branch, and those of gamma, weight and bias as one (3, C) float32 tensor."""
    from .rows_triton import add_layer_norm_backward_kernel

    C = x_new.shape[-1]
    T = x_new.numel() // C
    launch = _row_launch(C)
    grad_x, grad_branch = torch.empty_like(x_new), torch.empty_like(branch)
    partials = x_new.new_empty((_num_programs(T, launch["num_warps"], x_new.device), 3, C), dtype=torch.float32)
    with torch.cuda.device_of(x_new):
        add_layer_norm_backward_kernel[(partials.shape[0],)](
            *(x_new, branch, gamma, weight, grad_x_new.contiguous(), grad_normed.contiguous()),
            *(grad_x, grad_branch, partials, T, eps),
            C=C,
            **launch,
        )
    return grad_x, grad_branch, partials.sum(dim=0)


def _save_add_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, gamma, weight, _, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch, gamma, weight)


def _add_layer_norm_gradients(ctx: Any, grad_x_new: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    x_new, branch, gamma, weight = ctx.saved_tensors
    grad_x, grad_branch, vectors = torch.ops.dinov3_lite.add_layer_norm_backward(
        x_new, branch, gamma, weight, grad_x_new, grad_normed, ctx.eps
    )
    grad_gamma, (grad_weight, grad_bias) = vectors[0].to(gamma.dtype), vectors[1:].to(weight.dtype)
    return grad_x, grad_branch, grad_gamma, grad_weight, grad_bias, None


def _swiglu(gate_value: Tensor) -> Tensor:
    _check_can_run("swiglu", "gate_value", gate_value)
    from .rows_triton import swiglu_forward_kernel

    out = _half(gate_value)
    with torch.cuda.device_of(gate_value):
        swiglu_forward_kernel[_swiglu_grid(out)](gate_value, out, F=out.shape[-1], **SWIGLU_LAUNCH)
    return out


def _swiglu_backward(gate_value: Tensor, grad_out: Tensor) -> Tensor:
    from .rows_triton import swiglu_backward_kernel

    grad_gate_value = torch.empty_like(gate_value)
    with torch.cuda.device_of(gate_value):
        swiglu_backward_kernel[_swiglu_grid(grad_out)](
            gate_value, grad_out.contiguous(), grad_gate_value, F=grad_out.shape[-1], **SWIGLU_LAUNCH
        )
    return grad_gate_value


def _half(gate_value: Tensor) -> Tensor:
    return gate_value.new_empty((*gate_value.shape[:-1], gate_value.shape[-1] // 2))


def _swiglu_grid(out: Tensor) -> tuple[int, int]:
    """A program for each row and block of its channels."""
    F = out.shape[-1]
    return out.numel() // F, -(-F // SWIGLU_LAUNCH["BLOCK_F"])


def _save_swiglu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad_out: Tensor) -> Tensor:
    return torch.ops.dinov3_lite.swiglu_backward(*ctx.saved_tensors, grad_out)


define(
    "add_layer_norm",
    "(Tensor x, Tensor branch, Tensor gamma, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    _add_layer_norm,
    fake=lambda x, branch, gamma, weight, bias, eps: (torch.empty_like(x), torch.empty_like(x, dtype=weight.dtype)),
    gradients=_add_layer_norm_gradients,
    save=_save_add_layer_norm,
)
define(
    "add_layer_norm_backward",
    "(Tensor x_new, Tensor branch, Tensor gamma, Tensor weight, Tensor grad_x_new, Tensor grad_normed, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _add_layer_norm_backward,
    fake=lambda x_new, branch, gamma, *others: (
        torch.empty_like(x_new),
        torch.empty_like(branch),
        gamma.new_empty((3, *gamma.shape), dtype=torch.float32),
    ),
)
define(
    "swiglu",
    "(Tensor gate_value) -> Tensor",
    _swiglu,
    fake=_half,
    gradients=_swiglu_gradient,
    save=_save_swiglu,
)
define(
    "swiglu_backward",
    "(Tensor gate_value, Tensor grad_out) -> Tensor",
    _swiglu_backward,
    fake=lambda gate_value, grad_out: torch.empty_like(gate_value),
)


def builds(arch: int) -> Iterator[Build]:
    """Every kernel of the rows, at a released width for each way to launch it; architectures do not differ."""
    from . import rows_triton as kernels

    for stream, half in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")):
        for C in (384, 1024, 1280, 4096):
            for kernel in (kernels.add_layer_norm_forward_kernel, kernels.add_layer_norm_backward_kernel):
                yield _build(kernel, stream, half, {"C": C, **_row_launch(C)})
    for dtype in ("bf16", "fp32"):
        for kernel in (kernels.swiglu_forward_kernel, kernels.swiglu_backward_kernel):
            yield _build(kernel, dtype, dtype, {"F": 5120, **SWIGLU_LAUNCH})


def _build(kernel: Any, stream: str, half: str, launch: dict[str, int]) -> Build:
    constexprs: dict[str, object] = {name: value for name, value in launch.items() if name in kernel.arg_names}
    types = dict.fromkeys(("x_ptr", "x_new_ptr", "grad_x_ptr", "grad_x_new_ptr"), f"*{stream}")
    types |= {"partials_ptr": "*fp32", "T": "i32", "eps": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    signature = {name: types.get(name, f"*{half}") for name in kernel.arg_names}
    width = next(f"{letter} {launch[letter]}" for letter in "CF" if letter in launch)
    dtypes = half if half == stream else f"{half} on {stream}"
    name = f"{kernel.__name__.removesuffix('_kernel')}, {width}, {dtypes}"
    return Build(name, kernel, signature, constexprs, launch["num_warps"], num_stages=1)
