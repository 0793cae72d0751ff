"""What several layouts' cards share: the two JSON files of transformers', which may lie beside any weights."""

from __future__ import annotations

from typing import Any

from ...config import MODEL_TYPE, DINOv3Config
from .table import Beside, Card

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
NOTE_KEY = "dinov3_lite_note"


def read_config(beside: Beside) -> DINOv3Config:
    """The config in config.json. Raises ValueError that names the file if it is of another model."""
    try:
        return DINOv3Config.from_dict(beside.files[CONFIG])
    except ValueError as error:
        raise ValueError(f"{beside.path(CONFIG)}: {error}") from error


def read_foreign_card(beside: Beside) -> Card:
    """What transformers' two JSON files say, where they are there and about images and these models.

    They may lie beside weights of any layout but our own, and so may other models' files.
    """
    content, processing = beside.files.get(CONFIG, {}), beside.files.get(PREPROCESSOR)
    is_ours = content.get("model_type") == MODEL_TYPE
    return Card(
        config=read_config(beside) if is_ours else None,
        preprocessing=processing if processing is not None and _is_of_images(processing) else None,
        license=beside.license,
        note=str(content.get(NOTE_KEY, "")),
    )


def _is_of_images(processing: dict[str, Any]) -> bool:
    """False for the preprocessing of speech, which is called the same."""
    images = {"image_processor_type", "image_mean", "image_std", "size"}
    return bool(processing.keys() & images) or not processing.keys() & {"feature_extractor_type", "sampling_rate"}
