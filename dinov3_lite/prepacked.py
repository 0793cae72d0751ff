"""The ways in which a CPU multiplies by a weight: as it lies, in oneDNN's own layout, or in MKL's.

A product by a weight in a library's own layout packs nothing anew. Which way is fastest differs from processor to
processor: `choices` measures it. Every operator of torch that is not public is called here and nowhere else; `works`
tries them, since a later torch may rename or drop them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pages import empty, to_huge_pages

EXACT_ENOUGH = 1.5  # times the error of PyTorch's own float32 product, as hidden states may have of the reference's
MASSIVE = 1000.0  # times the others: a massive activation
PARTS = (1, 2, 4, 8, 16)  # into which a weight's columns may be divided


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
        if hasattr(torch.ops.mkldnn, "data_ptr"):
            for packed in vars(self).get("packed", ()):
                to_huge_pages(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))

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

    parts: of the sums, each added up by itself and then to the others, W x = W1 x1 + W2 x2 + ..; None for as many as
        make them exact enough.
    """

    plans_rows = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        act: str = "",
        rows: int | None = None,
        parts: int | None = None,
    ) -> None:
        super().__init__(weight, bias, act)
        self.dtype = weight.dtype
        if parts is None:
            parts = parts_of_sums(self.in_features) or 1 if self.dtype == torch.float32 else 1
        self.packed = [packed_by_onednn(part) for part in columns(weight, parts)]
        self.within = act if act == "gelu" and len(self.packed) == 1 else ""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.chunk(len(self.packed), dim=-1)
        out = linear_by_onednn(first, self.packed[0], self.bias, self.within)
        for part, packed in zip(others, self.packed[1:], strict=True):
            out += linear_by_onednn(part, packed)
        return out if self.within == self.act else activated(self.act, out)

    def unpack(self) -> Tensor:
        first, *others = (packed.to_dense(self.dtype) for packed in self.packed)
        return torch.cat((first, *others), dim=1) if others else first


def packed_by_onednn(weight: Tensor) -> Tensor:
    """The weight (out, in) in oneDNN's own layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "") -> Tensor:
    """act(W x + b) by oneDNN, of a weight in its layout or as it lies; act is "" or "gelu"."""
    within: tuple[str, list[Any], str] = (act, [], "none") if act else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *within)


def columns(weight: Tensor, parts: int) -> Iterator[Tensor]:
    """The columns of a weight in so many parts, each in memory of its own that goes back to the system."""
    for part in weight.chunk(parts, dim=1):
        yield part if part.is_contiguous() else empty(part.shape, part.dtype).copy_(part)


class PackedByMKL(Product):
    """The product with the weight packed in MKL's layout: float32 alone, and for one number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, act: str = "", rows: int | None = None) -> None:
        super().__init__(weight, bias, act)
        assert rows, "MKL divides by zero where there is no row"
        self.rows = rows
        self.packed = [torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)]
        self.shape = weight.new_zeros(()).expand(weight.shape)  # of the weight, which MKL asks for and does not read
        self.odd = weight.sum(dim=1).isfinite().logical_not().nonzero().flatten()  # rows with what 0 times is not 0
        self.rows_as_they_are = weight[self.odd]

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.act, torch.ops.mkl._mkl_linear(x, *self.packed, self.shape, self.bias, self.rows))

    def unpack(self) -> Tensor:
        """W = (I W^T)^T, `rows` rows of the identity at a time: each sum has one term that is not zero. Rows of W with
        infinities or NaN, whose sums have others, were kept.
        """
        weight = self.shape.new_empty(self.shape.shape)
        for start in range(0, self.in_features, self.rows):
            identity = weight.new_zeros(self.rows, self.in_features)
            identity.diagonal(start).fill_(1.0)
            columns = torch.ops.mkl._mkl_linear(identity, *self.packed, self.shape, None, self.rows)
            weight[:, start : start + self.rows] = columns[: self.in_features - start].t()
        return weight.index_copy_(0, self.odd, self.rows_as_they_are)


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
        and not (dtype == torch.float32 and way == "onednn" and not parts_of_sums(terms))
    ]


@cache
def parts_of_sums(terms: int) -> int:
    """The least number of parts in which oneDNN's float32 sums of so many terms err little more than PyTorch's own, or
    0 if none of `PARTS` does. That a massive activation comes first is the worst case: to it all others are added.
    """
    for parts in PARTS:
        if parts <= terms and all(error_of_sums(terms, parts, first) <= EXACT_ENOUGH for first in (1.0, MASSIVE)):
            return parts
    return 0


@cache
@torch.no_grad()
def error_of_sums(terms: int, parts: int = 1, first: float = 1.0) -> float:
    """The error of oneDNN's float32 sums of so many terms, of which the first is so much larger, in units of PyTorch's.

    oneDNN adds up to 1024 terms one after the other, which errs 1.2 to 1.7 times as much as MKL with AVX-512; longer
    sums up to 2.3 times beside MKL's on an AMD processor, and all of them with AVX2.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, terms, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    x[:, 0] *= first
    truth = x.double() @ weight.double().t()
    ours, own = (p(x).double() - truth for p in (PackedByOneDNN(weight, None, parts=parts), Plain(weight, None)))
    return (ours.norm() / own.norm()).item()


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
