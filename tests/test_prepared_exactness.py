"""A packed product may be faster than PyTorch's own, not much less exact: on some processors it is, and is not used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn

from dinov3_lite import prepacked
from dinov3_lite.prepacked import EXACT_ENOUGH, PRODUCTS, PackedByOneDNN, Plain, available, ways_of_products

if not available(torch.empty(0)):
    pytest.skip("oneDNN is not here", allow_module_level=True)


@pytest.fixture(autouse=True)
def asked_anew():
    forget()
    yield
    forget()


def forget() -> None:
    """What was found out of this processor."""
    prepacked.parts_of_sums.cache_clear()
    prepacked.error_of_sums.cache_clear()


@pytest.mark.parametrize("first", [1.0, prepacked.MASSIVE], ids=["alike", "massive first"])
@pytest.mark.parametrize("terms", [48, 768, 1024, 3072, 4096])
@torch.no_grad()
def test_every_way_errs_little_more_than_the_layer(terms, first):
    """Sums as long as a ViT-L's: no tiny model has them."""
    linear = nn.Linear(terms, 48)
    nn.init.normal_(linear.weight, std=terms**-0.5)
    x = torch.randn(66, terms)
    x[:, 0] *= first
    truth = x.double() @ linear.weight.double().t() + linear.bias
    for way in ways_of_products(torch.float32, for_any_rows=False, terms=terms):
        out = PRODUCTS[way](linear.weight.detach(), linear.bias.detach(), rows=66)(x)
        assert relative_error(out, truth) <= 1.1 * EXACT_ENOUGH * relative_error(linear(x), truth), way


def test_a_way_that_errs_more_is_none(monkeypatch):
    assert "onednn" in ways_of_products(torch.float32, True, 48)
    exact = PackedByOneDNN.forward
    monkeypatch.setattr(PackedByOneDNN, "forward", lambda self, x: exact(self, x) * (1 + 3e-6))
    forget()
    assert prepacked.parts_of_sums(48) == 0 and "onednn" not in ways_of_products(torch.float32, True, 48)
    if available(torch.empty(0, dtype=torch.bfloat16)):  # rounds far more coarsely itself
        assert "onednn" in ways_of_products(torch.bfloat16, True, 48)


def test_sums_that_are_too_long_are_added_up_in_parts(monkeypatch):
    """As on an AMD processor, where oneDNN errs 2.2 times as much as MKL in 3072 terms, and 1.6 times in 768 behind a
    massive one.
    """

    def longer_errs_more(self, x):
        exact = F.linear(x.double(), self.unpack().double()).float()
        terms = self.in_features // len(self.packed) * (2 if x[:, 0].norm() > 100 * x[:, 1].norm() else 1)
        return exact * (1 + 3e-6 * (terms > 800))

    monkeypatch.setattr(PackedByOneDNN, "forward", longer_errs_more)
    assert [prepacked.parts_of_sums(terms) for terms in (384, 768, 1536, 3072)] == [1, 2, 4, 8]
    weight, bias = torch.randn(48, 3072), torch.randn(48)
    product = PackedByOneDNN(weight, bias)
    assert len(product.packed) == 8 and torch.equal(product.unpack(), weight)
    assert len(PackedByOneDNN(weight[:, :384], bias).packed) == 1
    if available(torch.empty(0, dtype=torch.bfloat16)):
        assert len(PackedByOneDNN(weight.bfloat16(), bias.bfloat16()).packed) == 1


@pytest.mark.parametrize("terms", [48, 41])  # 41: parts of 6 and a last one of 5
@pytest.mark.parametrize("act", ["", "gelu", "silu"])
@torch.no_grad()
def test_a_product_in_parts_is_the_product(act, terms):
    """Of rows that lie apart in a wider tensor, too. Bias and activation count once, and x stays."""
    weight, bias, wide = torch.randn(32, terms), torch.randn(32), torch.randn(2, 33, 2 * terms)
    before = wide.clone()
    for given in (bias, None):
        product = PackedByOneDNN(weight, given, act, parts=8)
        assert torch.equal(product.unpack(), weight)
        for x in (wide[..., :terms], wide[0, :, terms:], wide[..., terms:].contiguous()):
            truth = F.linear(x.double(), weight.double(), None if given is None else bias.double())
            assert relative_error(product(x), getattr(F, act)(truth) if act else truth) < 5e-7
    assert torch.equal(wide, before)


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
