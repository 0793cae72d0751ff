"""DINOv3 in pure PyTorch: load a checkpoint, get features.

model = DINOv3ViT.from_pretrained("checkpoint/")
images = ImageProcessor.from_pretrained("checkpoint/")(picture)
features = model(**images).feature_map
"""

from .config import DINOv3Config
from .encoder import build_dinov3_encoder
from .finetune import freeze_but_last, parameter_groups, trainable_summary
from .image import ImageProcessor
from .inference import compile
from .interfaces import DINOv3ViTBackbone, FeaturesOnly
from .model import DINOv3Output, DINOv3ViT
from .window import sliding_window_features

__version__ = "0.1.0"

__all__ = [
    "DINOv3Config",
    "DINOv3Output",
    "DINOv3ViT",
    "DINOv3ViTBackbone",
    "FeaturesOnly",
    "ImageProcessor",
    "build_dinov3_encoder",
    "compile",
    "freeze_but_last",
    "parameter_groups",
    "sliding_window_features",
    "trainable_summary",
]
