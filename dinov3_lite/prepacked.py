"""Linear layers whose weights lie in a library's own layout: oneDNN's or MKL's, both of which PyTorch brings along.

A matrix product by such a weight packs nothing anew. Every operator of torch that is not public is called here and
nowhere else; `available` tries them, since a later torch may rename or drop them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS_AS_THEY_ARE = 16  # how many different numbers of rows are planned for, in a process, before they are rounded up
MANY_ROWS = 300  # of a float32 product: beside more, packing a weight costs nothing to speak of
EXACT_ENOUGH = 1.8  # times the error of PyTorch's own float32 product


def available(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by weights of this tensor's dtype, on the CPU it lies on: found out by trying."""
    return weight.device.type == "cpu" and _onednn_works(weight.dtype)


@cache
def _onednn_works(dtype: torch.dtype) -> bool:
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        if dtype in supported and not getattr(torch.ops.mkldnn, supported[dtype])():
            return False
        return torch.backends.mkldnn.is_available() and _works(PackedByOneDNN, dtype)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


@cache
def _mkl_works() -> bool:
    try:
        return torch.backends.mkl.is_available() and _works(PackedByMKL, torch.float32)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


@torch.no_grad()
def _works(layout: type[PackedLinear], dtype: torch.dtype) -> bool:
    """Whether a packed layer of 16 x 16 whole numbers gives what nn.Linear gives, exactly."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    numbers = (torch.arange(256) % 5 - 2).to(dtype).view(16, 16)
    linear = nn.Linear(16, 16, device="meta", dtype=dtype)
    linear.weight, linear.bias = nn.Parameter(numbers), nn.Parameter(numbers[0].clone())
    return torch.equal(
        layout(linear)(numbers.t()), (numbers.double().t() @ numbers.double().t() + numbers[0]).to(dtype)
    )


def prepack(linear: nn.Linear, dynamic: bool) -> nn.Module:
    """Return a layer that computes what `linear` does, for any number of rows; itself, where packed it would err more.

    dynamic: False is for rows whose number seldom changes, and packs a float32 weight by MKL for the number it meets.
    """
    if linear.weight.dtype != torch.float32:
        return PackedByOneDNN(linear)
    if not dynamic and _mkl_works():
        return PackedByMKL(linear)
    return PackedByOneDNN(linear) if _exact_enough(linear.in_features) else linear


@cache
@torch.no_grad()
def _exact_enough(terms: int) -> bool:
    """Whether oneDNN's float32 product, of sums of so many terms, errs little more than PyTorch's own.

    With AVX2 alone it adds up to 1024 terms one after the other: 2.3 times MKL's error, with AVX-512 1.2 to 1.6 times.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, terms, generator=generator) for _ in range(2))
    linear = nn.Linear(terms, 64, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    truth = x.double() @ weight.double().t()
    packed, plain = (
        (product.double() - truth).norm() for product in (PackedByOneDNN(linear)._product(x), F.linear(x, weight))
    )
    return bool(packed <= EXACT_ENOUGH * plain)


class PackedLinear(nn.Module):
    """W x + b, (.., in) -> (.., out), with W in a library's own layout, which can be neither moved nor saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedByOneDNN(PackedLinear):
    """In oneDNN's layout, which holds for any number of rows; float32 products of many rows take W as it is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = weight if weight.dtype == torch.float32 else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if self.weight is not None and rows > MANY_ROWS:
            return F.linear(x, self.weight, self.bias)
        planned = planned_rows(rows)
        if planned == rows:
            return self._product(x)
        padded = F.pad(x.reshape(rows, -1), (0, 0, 0, planned - rows))
        return self._product(padded)[:rows].unflatten(0, x.shape[:-1])

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def planned_rows(rows: int) -> int:
    """`rows`, or some more where many numbers of rows were seen already: of the same number always the same.

    oneDNN plans a product anew for each number of rows, and each thread keeps the plans of 1024 products, half a MiB
    each: hundreds of MiB where images come in every size. So but for the first few, numbers are rounded up, to one of
    16 between two powers of two.
    """
    if rows in _as_they_are:
        return rows
    if len(_as_they_are) < ROWS_AS_THEY_ARE:
        _as_they_are.add(rows)
        return rows
    step = max(16, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


_as_they_are: set[int] = set()


class PackedByMKL(PackedLinear):
    """In MKL's layout, float32 alone, which holds for the number of rows of the last call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = linear.weight.detach()
        self.packed: tuple[int, Any] = (0, self.weight)  # number of rows, layout: replaced as one, for threads

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        packed_for, packed = self.packed
        if rows and packed_for != rows:  # MKL divides by zero where there is no row
            packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
            self.packed = (rows, packed)
        return torch.ops.mkl._mkl_linear(x, packed, self.weight, self.bias, rows)
