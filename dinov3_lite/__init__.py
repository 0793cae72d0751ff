"""DINOv3 in pure PyTorch: load a checkpoint, get features.

model = DINOv3ViT.from_pretrained("checkpoint/")
images = ImageProcessor.from_pretrained("checkpoint/")(picture)
features = model(**images).feature_map
"""

from .config import DINOv3Config
from .encoder import build_dinov3_encoder
from .image import ImageProcessor
from .model import DINOv3Output, DINOv3ViT

__version__ = "0.1.0"

__all__ = ["DINOv3Config", "DINOv3Output", "DINOv3ViT", "ImageProcessor", "build_dinov3_encoder"]
