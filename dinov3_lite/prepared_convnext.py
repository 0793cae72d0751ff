"""What `optimize_for_inference` makes of a ConvNeXt."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .convnext import DINOv3ConvNeXt, Downsample, run_units
from .graphs import Graphs, Tensors
from .layers import untouched
from .prepared import PreparedBackbone, normal


class PreparedConvNeXt(PreparedBackbone, DINOv3ConvNeXt):
    """A prepared DINOv3ConvNeXt."""

    def _new_graphs(self) -> Graphs:
        return Graphs(_run_map, _example_map, self._dynamic)

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        return super().embed(pixel_values)

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        return self._embedded(self.stem, pixel_values, super().embed_patches)

    @torch.no_grad()
    def run_stages(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        if self._runs_as_loaded() or not untouched(*self.stages):
            return super().run_stages(x, taps)
        units: list[nn.Module] = []
        ends, stands_in = [], True
        stages: Any = self.stages
        for stage in stages:
            blocks = [self._stand_in(block) for block in stage.blocks]
            stands_in = stands_in and not any(map(operator.is_, blocks, stage.blocks))
            stands_in = stands_in and untouched(*stage.downsample.modules())
            is_prepacked = self._graphs is None and isinstance(stage.downsample, Downsample)
            units += [self._stand_in(stage.downsample) if is_prepacked else stage.downsample, *blocks]
            ends.append(len(units) - 1)
        unit_taps = tuple(ends[i] for i in taps)
        if self._graphs is None or not stands_in:
            return run_units(units, x, unit_taps)
        return self._graphs(tuple(units), (x,), unit_taps)


def _run_map(units: Sequence[nn.Module], tensors: Tensors, taps: Sequence[int], _: str) -> list[Tensor]:
    return run_units(units, tensors[0], taps)


def _example_map(tensors: Tensors, dynamic: bool) -> Tensors:
    B, h, w, C = tensors[0].shape
    if dynamic:
        B, h, w = (1 if B == 1 else 3), 50, 70  # unequal sides, like no width, near the usual 56
    return (normal((B, h, w, C), torch.Generator().manual_seed(0)).to(tensors[0]),)
