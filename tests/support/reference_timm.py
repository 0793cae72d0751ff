"""Run by other tests in its own process: timm's own model, loaded strictly, over a batch of images.

python reference_timm.py folder images.safetensors out.safetensors [calls.json]

calls.json: a list of options of forward_intermediates; their results come as "{dtype}/{call}/{i}" and, for prefix tokens,
"{dtype}/{call}/{i}/prefix", in float32 and float64, with the maps of features_only as call "features_only".
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
options = {"pretrained": False, "num_classes": 0, "dynamic_img_size": True}
weights = load_file(folder / "model.safetensors")
images = load_file(sys.argv[2])["images"]
model = timm.create_model(architecture, **options).eval()
model.load_state_dict(weights, strict=True)
with torch.no_grad():
    features = model.forward_features(images)
out = {"features": features, **{f"state/{k}": v for k, v in model.state_dict().items()}}

if len(sys.argv) > 4:
    getter = timm.create_model(
        architecture, pretrained=False, dynamic_img_size=True, features_only=True, out_indices=(2, 5, 8, 11)
    )
    getter.model.load_state_dict({name: w for name, w in weights.items() if not name.startswith("norm.")})
    info = getter.feature_info
    described = {"channels": info.channels(), "reduction": info.reduction(), "module_name": info.module_name()}
    print(json.dumps(described | {"feature_info": model.feature_info}))
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        with torch.no_grad():
            calls = {
                str(i): model.to(dtype).forward_intermediates(images.to(dtype), intermediates_only=True, **call)
                for i, call in enumerate(json.loads(Path(sys.argv[4]).read_text()))
            }
            calls["features_only"] = getter.eval().to(dtype)(images.to(dtype))
            out[f"{name}/last"] = model.forward_intermediates(images.to(dtype), [1])[0]
        for call, results in calls.items():
            for i, result in enumerate(results):
                maps, *prefix = result if isinstance(result, tuple) else (result,)
                out[f"{name}/{call}/{i}"] = maps
                out |= {f"{name}/{call}/{i}/prefix": tokens for tokens in prefix}

save_file({name: tensor.contiguous() for name, tensor in out.items()}, sys.argv[3])
print(architecture)
