"""A linear layer in the way that is fastest for its shape on this machine, its weight held packed alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choices import Choices
from .lent import Lent
from .pages import empty
from .prepacked import PRODUCTS, Product, ways_of_products
from .stopwatch import Calls, normal

ANY_ROWS = (200, 1000)
"""Where sizes are free, products are timed with as many rows as one image of 224 or of 512 pixels has tokens."""


class Projection(nn.Module):
    """act(W x + b), (.., in) -> (.., out), in the way that is fastest for its shape.

    dynamic: the way is for any number of rows, else for the number of the last call. order: of the rows of W and b.
    """

    def __init__(
        self, linear: nn.Linear, choices: Choices, dynamic: bool, act: str = "", order: Tensor | None = None
    ) -> None:
        super().__init__()
        self.choices, self.dynamic, self.act, self.order = choices, dynamic, act, order
        self.out_features = linear.out_features
        self.lent = Lent.of(linear)
        bias = linear.bias
        self.bias = None if bias is None else bias.detach() if order is None else bias.detach()[order]
        self.held: tuple[int | None, Any] = (-1, None)  # number of rows, product: replaced as one, for threads
        self.lock = threading.RLock()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if not rows:
            return x.new_empty(*x.shape[:-1], self.out_features)
        product = self.packed_for(rows)
        planned = self.choices.planned_rows(rows) if product.plans_rows else rows
        if planned == rows:
            return product(x)
        padded = F.pad(x.reshape(rows, -1), (0, 0, 0, planned - rows))
        return product(padded)[:rows].unflatten(0, x.shape[:-1])

    def packed_for(self, rows: int) -> Product:
        """The product for so many rows, whose weight is packed now if it is not yet."""
        wanted = None if self.dynamic else rows
        held_for, product = self.held
        return product if product is not None and held_for == wanted else self._hold(wanted)

    def _hold(self, rows: int | None) -> Product:
        """Pack the weight for so many rows, or for any, and let go of the plain one."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            held_for, product = self.held
            if product is None or held_for != rows:
                version, weight = self.lent.version(), self.lent.plain()
                made = PRODUCTS[way_of_product(self.choices, weight, self.act, rows)]
                ordered = weight if self.order is None else _ordered(weight, self.order)
                product = made(ordered, self.bias, self.act, rows)
                product.to_huge_pages()
                self.held = rows, product
                self.lent.lend(partial(_in_order, product.unpack, self.order), version)
            return product


def _ordered(weight: Tensor, order: Tensor) -> Tensor:
    return torch.index_select(weight, 0, order, out=empty(weight.shape, weight.dtype))


def _in_order(unpack: Callable[[], Tensor], order: Tensor | None) -> Tensor:
    weight = unpack()
    return weight if order is None else torch.empty_like(weight).index_copy_(0, order, weight)


def way_of_product(choices: Choices, weight: Tensor, act: str, rows: int | None) -> str:
    """The fastest way of multiplying so many rows, or any number, by a weight of this shape and dtype."""
    n_out, n_in = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    count = "any" if rows is None else rows
    question = f"product {n_in} to {n_out}{f', {act}' if act else ''}, {count} rows, {dtype}"

    def prepare(way: str) -> Calls:
        product = PRODUCTS[way](weight, normal(weight.dtype, n_out), act, rows)
        sizes = ANY_ROWS if rows is None else (rows,)
        return [partial(product, normal(weight.dtype, 1, size, n_in)) for size in sizes]

    return choices.way(question, ways_of_products(weight.dtype, rows is None, n_in), prepare)
