"""transformers' DINOv3ConvNextModel as the reference, whatever release is installed, and Meta's code where it is at hand."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import Tensor

transformers.utils.logging.disable_progress_bar()


def load(folder: Path, dtype: torch.dtype = torch.float32):
    """transformers' model in evaluation mode; its float64 self is the truth."""
    return transformers.DINOv3ConvNextModel.from_pretrained(folder, dtype=torch.float32).to(dtype).eval()


def states(model, images: Tensor) -> list[Tensor]:
    """All that a forward returns: the images and the four maps, then last_hidden_state, of either library."""
    out = model(images, output_hidden_states=True)
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])
    return [*out.hidden_states, out.last_hidden_state]


def metas_module() -> ModuleType:
    """Meta's models/convnext.py, of the clone that the environment variable DINOV3_REPO names; else the test is skipped."""
    if "DINOV3_REPO" not in os.environ:
        pytest.skip("needs Meta's repository: set DINOV3_REPO to a clone of facebookresearch/dinov3")
    file = Path(os.environ["DINOV3_REPO"]) / "dinov3" / "models" / "convnext.py"
    spec = importlib.util.spec_from_file_location("metas_convnext", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Names by substitution, apart from the library's tables: what a user would write who renames by hand.
OURS_TO_TRANSFORMERS = [
    (r"^stem\.conv", "stages.0.downsample_layers.0"),
    (r"^stem\.norm", "stages.0.downsample_layers.1"),
    (r"^norm\.", "layer_norm."),
    (r"downsample\.norm", "downsample_layers.0"),
    (r"downsample\.conv", "downsample_layers.1"),
    (r"\.blocks\.(\d+)\.norm", r".layers.\1.layer_norm"),
    (r"\.blocks\.", ".layers."),
    (r"dwconv", "depthwise_conv"),
    (r"mlp\.fc", "pointwise_conv"),
    (r"ls\.gamma", "gamma"),
]
OURS_TO_META = [
    (r"^stem\.conv", "downsample_layers.0.0"),
    (r"^stem\.norm", "downsample_layers.0.1"),
    (r"stages\.(\d)\.downsample\.norm", r"downsample_layers.\1.0"),
    (r"stages\.(\d)\.downsample\.conv", r"downsample_layers.\1.1"),
    (r"\.blocks\.", "."),
    (r"mlp\.fc", "pwconv"),
    (r"ls\.gamma", "gamma"),
]
OURS_TO_TIMM = [
    (r"^stem\.conv", "stem.0"),
    (r"^stem\.norm", "stem.1"),
    (r"^norm\.", "head.norm."),
    (r"downsample\.norm", "downsample.0"),
    (r"downsample\.conv", "downsample.1"),
    (r"dwconv", "conv_dw"),
    (r"ls\.gamma", "gamma"),
]


def renamed(name: str, substitutions: list[tuple[str, str]]) -> str:
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name
