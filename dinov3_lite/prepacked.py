"""The ways in which a CPU multiplies by a weight: as it lies, in oneDNN's own layout, or in MKL's.

A product by a weight in a library's own layout packs nothing anew. Which way is fastest differs from processor to
processor: `choices` measures it. Every operator of torch that is not public is called here and nowhere else; `works`
tries them, since a later torch may rename or drop them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pages import to_huge_pages

EXACT_ENOUGH = 1.8  # times the error of PyTorch's own float32 product


class Product(nn.Module):
    """act(W x + b), (.., in) -> (.., out), with at least one row; act is "", "gelu" (the exact one, by erf) or "silu".

    rows: the number of rows that it is for, None for any.
    """

    plans_rows = False
    """Whether the library plans anew, and remembers, for each number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, act: str = "", rows: int | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias, self.act = bias, act

    def unpack(self) -> Tensor:
        """The weight, exactly."""
        raise NotImplementedError

    def to_huge_pages(self) -> None:
        """Move what is packed into pages of 2 MiB, where the system and torch can."""
        if "packed" in vars(self) and hasattr(torch.ops.mkldnn, "data_ptr"):
            to_huge_pages(torch.ops.mkldnn.data_ptr(self.packed), torch.ops.mkldnn._nbytes(self.packed))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def activated(act: str, x: Tensor) -> Tensor:
    """act(x), in place."""
    return getattr(torch.ops.aten, f"{act}_")(x) if act else x


class Plain(Product):
    """The product with the weight as it lies: PyTorch chooses the library, which packs the weight in every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, act: str = "", rows: int | None = None) -> None:
        super().__init__(weight, bias, act)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.act, F.linear(x, self.weight, self.bias))

    def unpack(self) -> Tensor:
        return self.weight


class PackedByOneDNN(Product):
    """The product with the weight packed in oneDNN's layout, for any number of rows x has. GELU is applied within the
    product, before its result is rounded.
    """

    plans_rows = True

    def __init__(self, weight: Tensor, bias: Tensor | None, act: str = "", rows: int | None = None) -> None:
        super().__init__(weight, bias, act)
        self.dtype = weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.within: tuple[str, list[Any], str] = (act, [], "none") if act == "gelu" else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        out = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.within)
        return out if self.within[0] == self.act else activated(self.act, out)

    def unpack(self) -> Tensor:
        return self.packed.to_dense(self.dtype)


class PackedByMKL(Product):
    """The product with the weight packed in MKL's layout: float32 alone, and for one number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, act: str = "", rows: int | None = None) -> None:
        super().__init__(weight, bias, act)
        assert rows, "MKL divides by zero where there is no row"
        self.rows = rows
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        self.shape = weight.new_zeros(()).expand(weight.shape)  # of the weight, which MKL asks for and does not read

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.act, torch.ops.mkl._mkl_linear(x, self.packed, self.shape, self.bias, self.rows))

    def unpack(self) -> Tensor:
        """W = (I W^T)^T, `rows` rows of the identity at a time: each sum has one term that is not zero."""
        weight = self.shape.new_empty(self.shape.shape)
        for start in range(0, self.in_features, self.rows):
            identity = weight.new_zeros(self.rows, self.in_features)
            identity.diagonal(start).fill_(1.0)
            columns = torch.ops.mkl._mkl_linear(identity, self.packed, self.shape, None, self.rows)
            weight[:, start : start + self.rows] = columns[: self.in_features - start].t()
        return weight


PRODUCTS: dict[str, type[Product]] = {"onednn": PackedByOneDNN, "mkl": PackedByMKL, "plain": Plain}


def ways_of_products(dtype: torch.dtype, for_any_rows: bool, terms: int = 16) -> list[str]:
    """The names of those ways that work on this CPU for weights of this dtype; the first wins where they are level.

    terms: of the sums, the channels that come in. A way that would err more than PyTorch's own is not among them.
    """
    return [
        way
        for way in PRODUCTS
        if works(way, dtype)
        and not (for_any_rows and way == "mkl")
        and not (dtype == torch.float32 and way == "onednn" and not exact_enough(terms))
    ]


@cache
@torch.no_grad()
def exact_enough(terms: int) -> bool:
    """Whether oneDNN's float32 product, of sums of so many terms, errs little more than PyTorch's own.

    With AVX2 alone it adds up to 1024 terms one after the other: 2.3 times MKL's error, with AVX-512 1.2 to 1.6 times.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, terms, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    truth = x.double() @ weight.double().t()
    packed, plain = (way(weight, None)(x) for way in (PackedByOneDNN, Plain))
    return bool((packed.double() - truth).norm() <= EXACT_ENOUGH * (plain.double() - truth).norm())


def available(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by weights of this tensor's dtype, on the CPU it lies on: found out by trying."""
    return weight.device.type == "cpu" and works("onednn", weight.dtype)


@cache
@torch.no_grad()
def works(way: str, dtype: torch.dtype) -> bool:
    """Whether a product by 16 x 16 whole numbers is what it should be, exactly, and unpacks to them."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in (torch.float32, *supported):
        return False
    try:
        if way == "onednn" and not torch.backends.mkldnn.is_available():
            return False
        if way == "onednn" and dtype in supported and not getattr(torch.ops.mkldnn, supported[dtype])():
            return False
        if way == "mkl" and not (torch.backends.mkl.is_available() and dtype == torch.float32):
            return False
        weight = (torch.arange(256, device="cpu") % 5 - 2).to(dtype).view(16, 16)
        made = PRODUCTS[way](weight, weight[0].clone(), rows=16)
        expected = (weight.double().t() @ weight.double().t() + weight[0]).to(dtype)
        return torch.equal(made(weight.t()), expected) and torch.equal(made.unpack(), weight)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
