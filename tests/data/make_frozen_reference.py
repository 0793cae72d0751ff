"""Make frozen_reference.safetensors: what transformers computes of two small checkpoints, for where it is not installed.

    python tests/data/make_frozen_reference.py

Holds, for each checkpoint, its weights in transformers' layout, the images, a mask, and the reference's float64 states.
"""

import json
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import reference
from helpers import TINY, TINY_GATED, trained_like, write_checkpoint

tensors, configs = {}, {}
generator = torch.Generator().manual_seed(2)
for name, config in {"plain": TINY, "gated": TINY_GATED}.items():
    weights = trained_like(config, seed=3)
    images = torch.randn(2, 3, 40, 24, generator=generator)
    mask = torch.rand(2, 15, generator=generator) < 0.3
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = reference.truth_model(write_checkpoint(Path(folder), config, weights))
        states = torch.stack(reference.states(model, images.double()))
        masked_states = torch.stack(reference.states(model, images.double(), mask))
    configs[name] = config.to_dict()
    tensors |= {f"{name}/weights/{key}": value for key, value in weights.items()}
    tensors |= {f"{name}/images": images, f"{name}/mask": mask}
    tensors |= {f"{name}/states": states, f"{name}/masked_states": masked_states}

made = f"transformers {transformers.__version__}, torch {torch.__version__}, {date.today()}"
metadata = {"made_with": made, "configs": json.dumps(configs)}
save_file(tensors, Path(__file__).with_name("frozen_reference.safetensors"), metadata)
print(made)
