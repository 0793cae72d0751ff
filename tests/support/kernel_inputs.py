"""Inputs of the kernels' tests, and how their results are judged: against float64, beside PyTorch's own."""

from __future__ import annotations

import torch
from dinov3_lite.kernels import rope_attention, rope_attention_reference
from dinov3_lite.kernels.availability import TRITON_INSTALLED
from helpers import relative_error
from interpreter import mend_bfloat16
from torch import Tensor

from dinov3_lite.attention import sdpa_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
if DEVICE == "cpu" and TRITON_INSTALLED:
    mend_bfloat16()
EPS = 1e-5


def attention_inputs(B: int, N: int, heads: int, D: int, P: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The fused projection (B, N, 3, heads, D) and the tables of its last P tokens."""
    angles = 6 * torch.rand(P, D // 2)
    qkv = torch.randn(B, N, 3, heads, D).to(DEVICE, dtype)
    return qkv, angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def whole_table(cos: Tensor, sin: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """The tables with identity rows for the prefix, as the model has them."""
    prefix = N - cos.shape[0], cos.shape[1]
    return torch.cat((cos.new_ones(prefix), cos)), torch.cat((sin.new_zeros(prefix), sin))


def attention_with_gradients(attention, qkv: Tensor, *arguments, **options) -> list[Tensor]:
    """The output, then the gradients of q, k and v, for the same gradient of the output whatever the dtype."""
    leaf = qkv.detach().requires_grad_()
    out = attention(*leaf.unbind(-3), *arguments, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad)[0].unbind(-3)]


def check_attention(B: int, N: int, heads: int, D: int, P: int, dtype: torch.dtype, scale: float | None = None) -> None:
    """Output and gradients against float64, beside PyTorch's attention after a rotation of its own."""
    qkv, cos, sin = attention_inputs(B, N, heads, D, P, dtype)
    truth = attention_with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double(), scale)
    yardstick = attention_with_gradients(sdpa_attention, qkv, *whole_table(cos, sin, N), scale)
    ours = attention_with_gradients(rope_attention, qkv, cos, sin, scale)
    assert_no_worse_than(yardstick, ours, truth, "out dq dk dv")


def row_inputs(shape: tuple[int, ...], stream: torch.dtype, half: torch.dtype) -> list[Tensor]:
    """x, branch, gamma, weight, bias like a trained model's: rows with a mean, an outlier, gains over a decade."""
    C = shape[-1]
    x = 3 * torch.randn(shape) + torch.randn(*shape[:-1], 1)
    x[..., C // 3] += 300
    vectors = 10 ** (-2 * torch.rand(C)), torch.exp(0.7 * torch.randn(C)), 0.2 * torch.randn(C)
    tensors = [x.to(stream), *(t.to(half) for t in (torch.randn(shape), *vectors))]
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def rows_with_gradients(function, inputs: list[Tensor], *constants: float, grads: list[Tensor]) -> list[Tensor]:
    """The outputs of a function, then its gradients by every input."""
    outputs = function(*inputs, *constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def float64(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def assert_no_worse_than(
    yardstick: list[Tensor], ours: list[Tensor], truth: list[Tensor], names: str, factor: float = 1.1
) -> None:
    """Each of ours has its counterpart's dtype, and at most `factor` times its error or that of a few float32 roundings."""
    for name, a, y, t in zip(names.split(), ours, yardstick, truth, strict=True):
        assert (a.dtype, a.shape) == (y.dtype, y.shape), name
        bound = max(factor * relative_error(y, t), 4 * torch.finfo(torch.float32).eps)
        assert relative_error(a, t) <= bound, (name, relative_error(a, t), bound)
