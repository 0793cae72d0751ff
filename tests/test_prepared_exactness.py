"""A packed product may be faster than PyTorch's own, not much less exact: on some processors it is, and is not used."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from torch import nn

from dinov3_lite import prepacked
from dinov3_lite.prepacked import EXACT_ENOUGH, PRODUCTS, PackedByOneDNN, Plain, available, ways_of_products

if not available(torch.empty(0)):
    pytest.skip("oneDNN is not here", allow_module_level=True)


@pytest.fixture(autouse=True)
def asked_anew():
    prepacked.exact_enough.cache_clear()
    yield
    prepacked.exact_enough.cache_clear()


@pytest.mark.parametrize("terms", [48, 1024, 4096])
@torch.no_grad()
def test_every_way_errs_little_more_than_the_layer(terms):
    """Sums as long as a ViT-L's: no tiny model has them."""
    linear = nn.Linear(terms, 48)
    nn.init.normal_(linear.weight, std=terms**-0.5)
    x = torch.randn(66, terms)
    truth = x.double() @ linear.weight.double().t() + linear.bias
    for way in ways_of_products(torch.float32, False, terms):
        out = PRODUCTS[way](linear.weight.detach(), linear.bias.detach(), rows=66)(x)
        assert relative_error(out, truth) <= 1.1 * EXACT_ENOUGH * relative_error(linear(x), truth), way


def test_a_way_that_errs_more_is_none(monkeypatch):
    assert "onednn" in ways_of_products(torch.float32, True, 48)
    exact = PackedByOneDNN.forward
    monkeypatch.setattr(PackedByOneDNN, "forward", lambda self, x: exact(self, x) * (1 + 3e-6))
    prepacked.exact_enough.cache_clear()
    assert "onednn" not in ways_of_products(torch.float32, True, 48)
    if available(torch.empty(0, dtype=torch.bfloat16)):  # rounds far more coarsely itself
        assert "onednn" in ways_of_products(torch.bfloat16, True, 48)


@pytest.mark.parametrize(
    "flaw",
    ["", "product", "weight", "NaN", AttributeError("renamed"), RuntimeError(), TypeError("arguments"), ValueError()],
    ids=repr,
)
def test_a_way_that_computes_something_else_is_none(flaw, monkeypatch):
    """A later torch may rename an operator, give it other arguments, or compute other things by the same name."""

    class Flawed(Plain):
        def __init__(self, *arguments, **options):
            if isinstance(flaw, Exception):
                raise flaw
            super().__init__(*arguments, **options)

        def forward(self, x):
            return super().forward(x) + {"product": 1.0, "NaN": float("nan")}.get(flaw, 0.0)

        def unpack(self):
            return self.weight + float(flaw == "weight")

    monkeypatch.setitem(PRODUCTS, "plain", Flawed)
    assert prepacked.works.__wrapped__("plain", torch.float32) == (flaw == "")
    monkeypatch.setattr(prepacked, "works", prepacked.works.__wrapped__)
    assert ("plain" in ways_of_products(torch.float32, True)) == (flaw == "")
