"""Patches projected by one matrix product, as on a GPU, and by the convolution that it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import TINY, relative_error

from dinov3_lite.layers import PatchEmbed, patches_of


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (40, 24), (43, 31)])
def test_patches_times_weights_is_the_convolution(channels, size):
    embed = PatchEmbed(replace(TINY, num_channels=channels)).double()
    images = torch.randn(2, channels, *size, dtype=torch.float64)
    assert embed._is_product()
    product = (
        patches_of(images, *embed.proj.stride).flatten(3).flatten(1, 2) @ embed.proj.weight.flatten(1).mT
        + embed.proj.bias
    )
    torch.testing.assert_close(product, embed(images), rtol=1e-12, atol=1e-12)


def test_what_is_no_plain_convolution_of_patches_is_no_product():
    for options in ({"padding": 1}, {"stride": 4}, {"dilation": 2}):
        embed = PatchEmbed(TINY)
        embed.proj = torch.nn.Conv2d(3, 8, 8, **{"stride": 8, **options})
        assert not embed._is_product()
    embed = PatchEmbed(TINY)
    embed.proj.register_forward_hook(lambda *_: None)
    assert not embed._is_product()


def test_a_traced_product_is_one_whole_program():
    embed, images = PatchEmbed(TINY), torch.randn(2, 3, 40, 24)

    @torch.compile(fullgraph=True, backend="eager")
    def project(images: torch.Tensor) -> torch.Tensor:
        assert embed._is_product()
        return (
            patches_of(images, *embed.proj.stride).flatten(3).flatten(1, 2) @ embed.proj.weight.flatten(1).mT
            + embed.proj.bias
        )

    assert relative_error(project(images), embed(images)) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_product_errs_no_more_than_the_convolution(dtype):
    embed, images = PatchEmbed(TINY).double(), torch.randn(2, 3, 40, 24).to(dtype)
    expected = embed(images.double())
    embed = embed.to("cuda", dtype)
    product, convolution = embed(images.cuda()), embed.proj(images.cuda()).flatten(2).mT
    least = torch.finfo(dtype).eps / 4
    assert relative_error(product.cpu(), expected) <= 1.1 * max(relative_error(convolution.cpu(), expected), least)
