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


def kept_patches(model, pixel_values: Tensor, keep_indices: Tensor) -> Tensor:
    """last_hidden_state of one image from which all patches but these were removed after the embedding."""
    prefix = 1 + model.config.num_register_tokens
    x = model.embeddings(pixel_values)
    x = torch.cat((x[:, :prefix], x[:, prefix:][:, keep_indices]), dim=1)
    rotation = tuple(table[keep_indices] for table in model.rope_embeddings(pixel_values))
    for layer in getattr(model, "model", model).layer:
        x = layer(x, position_embeddings=rotation)
    return model.norm(x)
