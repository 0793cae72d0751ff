"""Run by test_image.py in its own process: transformers' image processor over the pictures of a file.

python reference_images.py pictures.safetensors pixel_values.safetensors '{"size": ...}'
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # a torchvision built for another torch lacks its compiled operators; resizing tensors needs none of them
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]

import transformers

processor_class = getattr(transformers, "DINOv3ViTImageProcessor", None) or transformers.DINOv3ViTImageProcessorFast
processor = processor_class(**json.loads(sys.argv[3]))
pictures = load_file(sys.argv[1])
save_file(
    {name: processor(image, return_tensors="pt")["pixel_values"].contiguous() for name, image in pictures.items()},
    sys.argv[2],
)
