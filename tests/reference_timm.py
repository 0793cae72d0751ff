"""Run by test_roundtrips.py in its own process: timm's own model, loaded strictly, over a batch of images.

python reference_timm.py folder images.safetensors out.safetensors
"""

import json
import sys
from pathlib import Path

import torchvision_shim  # noqa: F401

# isort: split
import timm
import torch
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
architecture = json.loads((folder / "config.json").read_text())["architecture"]
model = timm.create_model(architecture, pretrained=False, num_classes=0, dynamic_img_size=True).eval()
model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
with torch.no_grad():
    features = model.forward_features(load_file(sys.argv[2])["images"])
save_file({"features": features, **{f"state/{k}": v for k, v in model.state_dict().items()}}, sys.argv[3])
print(architecture)
