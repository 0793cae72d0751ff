"""The encoder in use: an E2Net-like decoder learns to find objects that only their texture gives away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, trained_like, write_checkpoint
from torch import Tensor, nn

from dinov3_lite import build_dinov3_encoder

CONFIG = replace(
    TINY, patch_size=16, hidden_size=768, intermediate_size=768, num_hidden_layers=4, num_attention_heads=12
)
NARROW = replace(CONFIG, hidden_size=192, intermediate_size=384, num_attention_heads=3)


class Decoder(nn.Module):
    """Align the channels of four maps, fuse from coarse to fine, predict a mask at full resolution."""

    def __init__(self, channels: tuple[int, ...], width: int = 32) -> None:
        super().__init__()
        self.align = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1), nn.GroupNorm(8, width), nn.ReLU()) for c in channels
        )
        self.fuse = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU())
            for _ in channels[1:]
        )
        self.predict = nn.Conv2d(width, 1, 1)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        fine_to_coarse = [align(m) for align, m in zip(self.align, maps, strict=True)]
        x = fine_to_coarse.pop()
        for fuse in self.fuse:
            finer = fine_to_coarse.pop()
            x = F.interpolate(x, finer.shape[2:], mode="bilinear", align_corners=False)
            x = fuse(torch.cat((finer, x), dim=1))
        return F.interpolate(self.predict(x), size, mode="bilinear", align_corners=False)


def camouflage(count: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, H, W) of stripes, and masks (count, 1, H, W) of an ellipse in which they run the other way.

    Colours and their distribution are the same inside and outside.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    y = torch.arange(height).view(1, 1, -1, 1).expand(count, 1, height, width)
    x = torch.arange(width).view(1, 1, 1, -1).expand(count, 1, height, width)
    frequency, phases = uniform(0.7, 1.1), (uniform(0, 6.3), uniform(0, 6.3))
    across, along = torch.sin(frequency * y + phases[0]), torch.sin(frequency * x + phases[1])
    dy = (y - height * uniform(0.35, 0.65)) / (height * uniform(0.2, 0.35))
    dx = (x - width * uniform(0.35, 0.65)) / (width * uniform(0.2, 0.35))
    masks = (dy.square() + dx.square() < 1).float()
    colours = torch.randn(count, 3, 1, 1, generator=generator)
    pictures = colours * torch.where(masks.bool(), along, across)
    return pictures + 0.3 * torch.randn(pictures.shape, generator=generator), masks


def iou(predicted: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of each picture."""
    predicted, masks = predicted.flatten(1), masks.flatten(1).bool()
    return (predicted & masks).sum(1) / (predicted | masks).sum(1)


def colour_threshold(pictures: Tensor, masks: Tensor) -> float:
    """Mean IoU of the best threshold on smoothed brightness, chosen for each picture by looking at its mask."""
    grey = F.avg_pool2d(pictures.mean(1, keepdim=True), 5, stride=1, padding=2)
    candidates = [
        iou(sign * grey > sign * torch.quantile(grey.flatten(1), q, dim=1).view(-1, 1, 1, 1), masks)
        for q in torch.linspace(0.02, 0.98, 25)
        for sign in (1, -1)
    ]
    return torch.stack(candidates).amax(0).mean().item()


@pytest.mark.parametrize(("freeze", "config"), [(True, CONFIG), (False, NARROW)], ids=["frozen", "fine-tuned"])
def test_a_decoder_learns_to_see_camouflage(freeze, config, tmp_path):
    encoder = build_dinov3_encoder(
        pretrained_path=write_checkpoint(tmp_path, config, trained_like(config)), freeze=freeze
    )
    assert encoder.channels == (config.hidden_size,) * 4
    decoder = Decoder(encoder.channels)
    network = nn.ModuleList([encoder, decoder]).train()
    before = encoder.backbone.blocks[0].attn.qkv.weight.clone()
    rates = [{"params": decoder.parameters(), "lr": 3e-3}]
    if not freeze:
        rates.append({"params": encoder.parameters(), "lr": 3e-5})
    optimizer = torch.optim.AdamW(rates)
    generator = torch.Generator().manual_seed(0)
    size = (96, 128)
    for _ in range(50):
        pictures, masks = camouflage(4, *size, generator)
        loss = F.binary_cross_entropy_with_logits(decoder(encoder(pictures), size), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    network.eval()
    pictures, masks = camouflage(16, *size, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = iou(decoder(encoder(pictures), size) > 0, masks).mean().item()
    baseline = colour_threshold(pictures, masks)
    assert found > baseline + 0.2, f"IoU {found:.2f}, the colour threshold {baseline:.2f}"
    assert torch.equal(encoder.backbone.blocks[0].attn.qkv.weight, before) == freeze


def test_a_frozen_encoder_keeps_no_activation(tmp_path):
    """What autograd saves in a training step is the decoder's alone."""
    folder = write_checkpoint(tmp_path, NARROW)

    def saved(freeze: bool) -> int:
        encoder = build_dinov3_encoder(pretrained_path=folder, freeze=freeze)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            encoder(torch.randn(1, 3, 64, 64))
        return sum(sizes)

    assert saved(freeze=True) == 0 < saved(freeze=False)
