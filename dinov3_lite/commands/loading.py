"""The model of a command, and how pictures are normalised for it."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import complain
from ..image import ImageProcessor
from ..model import DINOv3ViT
from ..weights import DTYPES


def load_model_and_processor(args: argparse.Namespace, dtype: Any = None) -> tuple[DINOv3ViT, ImageProcessor]:
    """What --model, --dtype and --device tell of. A checkpoint without preprocessing gets ImageNet's, and says so."""
    model = DINOv3ViT.from_pretrained(args.model, dtype=dtype or DTYPES.get(args.dtype), device=args.device)
    try:
        return model, ImageProcessor.from_pretrained(args.model)
    except FileNotFoundError:
        complain(f"dinov3_lite: {args.model}: no preprocessor_config.json with it: ImageNet's mean and std are taken")
        return model, ImageProcessor()
