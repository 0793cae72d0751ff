"""transformers' DINOv3ViTModel as the reference, and float64 as the truth, whatever release is installed."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from packaging.version import Version
from torch import Tensor

transformers.utils.logging.disable_progress_bar()

# Up to 4.57.1 the last of the hidden states had gone through the final LayerNorm.
LAST_STATE_IS_NORMED = Version(transformers.__version__) < Version("4.57.2")


def load(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    """The reference in evaluation mode."""
    model = transformers.DINOv3ViTModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval()


def truth_model(folder: Path):
    """The reference in float64, every step written out."""
    return load(folder, torch.float32, "eager").double()


def states(model, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> list[Tensor]:
    """All that a forward returns: the hidden states (before the final norm) and last_hidden_state, of either library."""
    out = model(pixel_values, bool_masked_pos=bool_masked_pos, output_hidden_states=True)
    hidden_states = out.hidden_states
    if LAST_STATE_IS_NORMED:
        hidden_states = hidden_states[:-1]  # the missing one is checked through last_hidden_state
    return [*hidden_states, out.last_hidden_state]
