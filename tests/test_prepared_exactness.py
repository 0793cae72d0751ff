"""A packed product may be faster than PyTorch's own, not much less exact: on some processors it is, and is not used."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from torch import nn

from dinov3_lite import prepacked
from dinov3_lite.prepacked import EXACT_ENOUGH, PackedByOneDNN, available, prepack

if not available(torch.empty(0)):
    pytest.skip("oneDNN is not here", allow_module_level=True)


@pytest.fixture(autouse=True)
def asked_anew():
    prepacked._exact_enough.cache_clear()
    yield
    prepacked._exact_enough.cache_clear()


@pytest.mark.parametrize("terms", [48, 1024, 4096])
@torch.no_grad()
def test_prepacked_layers_err_little_more_than_the_layers(terms):
    """Sums as long as a ViT-L's: no tiny model has them."""
    linear = nn.Linear(terms, 48)
    nn.init.normal_(linear.weight, std=terms**-0.5)
    packed, x = prepack(linear, dynamic=True), torch.randn(66, terms)
    truth = x.double() @ linear.weight.double().t() + linear.bias
    assert relative_error(packed(x), truth) <= 1.1 * EXACT_ENOUGH * relative_error(linear(x), truth)


@torch.no_grad()
def test_a_product_that_errs_more_is_left_to_pytorch(monkeypatch):
    linear = nn.Linear(48, 32)
    assert type(prepack(linear, dynamic=True)) is PackedByOneDNN
    exact = PackedByOneDNN._product
    monkeypatch.setattr(PackedByOneDNN, "_product", lambda self, x: exact(self, x) * (1 + 3e-6))
    prepacked._exact_enough.cache_clear()
    assert prepack(linear, dynamic=True) is linear
    if available(torch.empty(0, dtype=torch.bfloat16)):  # rounds far more coarsely itself
        assert type(prepack(linear.bfloat16(), dynamic=True)) is PackedByOneDNN
