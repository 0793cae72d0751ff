"""transformers' DINOv3ConvNextModel as the reference, whatever release is installed, and Meta's code where it is at hand."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import Tensor

transformers.utils.logging.disable_progress_bar()


def load(folder: Path, dtype: torch.dtype = torch.float32):
    """Transformers' model in evaluation mode; its float64 self is the truth."""
    return transformers.DINOv3ConvNextModel.from_pretrained(folder, dtype=torch.float32).to(dtype).eval()


def states(model, images: Tensor) -> list[Tensor]:
    """All that a forward returns: the images and the four maps, then last_hidden_state, of either library."""
    out = model(images, output_hidden_states=True)
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
