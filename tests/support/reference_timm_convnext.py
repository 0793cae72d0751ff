"""Run by test_convnext_parity.py in its own process: timm's own ConvNeXt, loaded strictly, over batches of images.

python reference_timm_convnext.py weights.safetensors images.safetensors out.safetensors '{"depths": ..., "dims": ...}' calls

images: batches by the name of their size. calls: options of forward_intermediates as JSON; their results come as
"{size}/{call}/theirs/{dtype}/{i}", with the maps of features_only as call "features_only", forward_features as "features",
forward as "pooled"; under "truth" those in float64, with weights and images as that dtype holds them.
"""

import copy
import json
import sys

import torchvision_shim  # noqa: F401

# isort: split
import timm
import torch
from safetensors.torch import load_file, save_file

weights, images = load_file(sys.argv[1]), load_file(sys.argv[2])
sizes, calls = json.loads(sys.argv[4]), json.loads(sys.argv[5])
model = timm.create_model("convnext_tiny", num_classes=0, **sizes).eval()
model.load_state_dict(weights, strict=True)
getter = timm.create_model("convnext_tiny", features_only=True, out_indices=(0, 2, 3), **sizes).eval()
getter.load_state_dict(
    {
        name.replace("stages.", "stages_").replace("stem.", "stem_"): w
        for name, w in weights.items()
        if "head" not in name
    }
)
info = getter.feature_info
described = {"channels": info.channels(), "reduction": info.reduction(), "module_name": info.module_name()}
print(json.dumps(described | {"feature_info": model.feature_info}))
out = {}


def run(of, model, getter, dtype):
    for size, pixels in images.items():
        x = pixels.to(dtype).to(model.head.norm.weight.dtype)
        results = {"features": [model.forward_features(x)], "pooled": [model(x)], "features_only": getter(x)}
        for i, call in enumerate(calls):
            result = model.forward_intermediates(x, **call)
            results[str(i)] = result if call.get("intermediates_only") else [result[0], *result[1]]
        for name, tensors in results.items():
            for i, tensor in enumerate(tensors):
                out[f"{size}/{name}/{of}/{dtype}/{i}"] = tensor.clone(memory_format=torch.contiguous_format)


with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        rounded = [copy.deepcopy(of).to(dtype) for of in (model, getter)]
        run("theirs", *rounded, dtype)
        run("truth", *(of.double() for of in rounded), dtype)
save_file(out, sys.argv[3])
