"""DINOv3 in pure PyTorch: load a checkpoint, get features.

model = DINOv3ViT.from_pretrained("checkpoint/")
images = ImageProcessor.from_pretrained("checkpoint/")(picture)
features = model(**images).feature_map

Names are imported with their modules when they are first used; none may be called as a module is.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import DINOv3Config, DINOv3ConvNeXtConfig
    from .convnext import DINOv3ConvNeXt
    from .encoder import build_dinov3_encoder
    from .extraction.engines import extract
    from .extraction.store import open_features
    from .finetune import freeze_but_last, parameter_groups, trainable_summary
    from .image import ImageProcessor
    from .inference import optimize_for_inference
    from .interfaces import DINOv3ConvNextBackbone, DINOv3ViTBackbone, FeaturesOnly
    from .loading import load
    from .model import DINOv3Output, DINOv3ViT
    from .sharding.loading import load_weights
    from .window import sliding_window_features

__all__ = [
    "DINOv3Config",
    "DINOv3ConvNeXt",
    "DINOv3ConvNeXtConfig",
    "DINOv3ConvNextBackbone",
    "DINOv3Output",
    "DINOv3ViT",
    "DINOv3ViTBackbone",
    "FeaturesOnly",
    "ImageProcessor",
    "build_dinov3_encoder",
    "extract",
    "freeze_but_last",
    "load",
    "load_weights",
    "open_features",
    "optimize_for_inference",
    "parameter_groups",
    "sliding_window_features",
    "trainable_summary",
]

_MODULES = {
    "DINOv3Config": "config",
    "DINOv3ConvNeXt": "convnext",
    "DINOv3ConvNeXtConfig": "config",
    "DINOv3ConvNextBackbone": "interfaces",
    "DINOv3Output": "model",
    "DINOv3ViT": "model",
    "DINOv3ViTBackbone": "interfaces",
    "FeaturesOnly": "interfaces",
    "ImageProcessor": "image",
    "build_dinov3_encoder": "encoder",
    "extract": "extraction.engines",
    "freeze_but_last": "finetune",
    "load": "loading",
    "load_weights": "sharding.loading",
    "open_features": "extraction.store",
    "optimize_for_inference": "inference",
    "parameter_groups": "finetune",
    "sliding_window_features": "window",
    "trainable_summary": "finetune",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker would take any misspelt name for one of these

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
