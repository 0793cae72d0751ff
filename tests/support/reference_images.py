"""Run by test_image.py in its own process: transformers' image processor over the pictures of a file.

python reference_images.py pictures.safetensors pixel_values.safetensors '{"size": ...}'
"""

import json
import sys

import torchvision_shim  # noqa: F401

# isort: split
import transformers
from safetensors.torch import load_file, save_file

processor_class = getattr(transformers, "DINOv3ViTImageProcessor", None) or transformers.DINOv3ViTImageProcessorFast
processor = processor_class(**json.loads(sys.argv[3]))
pictures = load_file(sys.argv[1])
save_file(
    {name: processor(image, return_tensors="pt")["pixel_values"].contiguous() for name, image in pictures.items()},
    sys.argv[2],
)
