"""The model of a command, and how pictures are normalised for it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import DTYPES
from ..console import complain
from ..image import ImageProcessor
from ..loading import Backbone, load


def load_model_and_processor(args: argparse.Namespace, dtype: Any = None) -> tuple[Backbone, ImageProcessor]:
    """What --model, --dtype and --device tell of. A checkpoint without preprocessing gets ImageNet's, and says so."""
    model = load(args.model, dtype=dtype or DTYPES.get(args.dtype), device=args.device)
    try:
        return model, ImageProcessor.from_pretrained(args.model)
    except FileNotFoundError:
        complain(f"dinov3_lite: {args.model}: no preprocessor_config.json with it: ImageNet's mean and std are taken")
        return model, ImageProcessor()


def feature_map(model: Backbone, processor: ImageProcessor, pixels: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """The patch features (C, h, w) of a picture (H, W, 3) resized to a grid of patches, after the final norm."""
    size = (grid[0] * model.stride, grid[1] * model.stride)
    pixel_values = replace(processor, size=size)(pixels)["pixel_values"]
    with torch.no_grad():
        return model(pixel_values.to(model.device)).feature_map[0]
