"""Parity where transformers is not installed: against hidden states that it computed once, kept with their weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import relative_error, write_checkpoint
from safetensors import safe_open

from dinov3_lite import DINOv3Config, DINOv3ViT

FILE = Path(__file__).parent / "data" / "frozen_reference.safetensors"
# float32: the rounding of a 3-block model, several times over; float64: the float32 RoPE coordinates of the reference
BOUNDS = {torch.float64: 5e-7, torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 6e-3}


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", ["plain", "gated"])
def test_frozen_states(name, masked, dtype, tmp_path):
    with safe_open(FILE, "pt") as file:
        config = DINOv3Config.from_dict(json.loads(file.metadata()["configs"])[name])
        prefix = f"{name}/weights/"
        weights = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        images, mask = file.get_tensor(f"{name}/images"), file.get_tensor(f"{name}/mask")
        truth = file.get_tensor(f"{name}/masked_states" if masked else f"{name}/states")
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, config, weights), dtype=dtype)
    with torch.no_grad():
        out = model(images, bool_masked_pos=mask if masked else None, output_hidden_states=True)
    states = [*out.hidden_states, out.last_hidden_state]
    assert len(states) == len(truth) == config.num_hidden_layers + 2
    for i, (state, t) in enumerate(zip(states, truth, strict=True)):
        assert relative_error(state, t) < BOUNDS[dtype], i
