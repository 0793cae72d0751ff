"""What several layouts' cards share: the two JSON files of transformers', which may lie beside any weights."""

from __future__ import annotations

from ...config import config_from_dict
from .table import Beside, Card

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
NOTE_KEY = "dinov3_lite_note"


def read_foreign_card(beside: Beside) -> Card:
    """What transformers' two JSON files say, where they are there: of any layout but our own."""
    content = beside.files.get(CONFIG, {})
    config = None
    if "model_type" in content:
        try:
            config = config_from_dict(content)
        except ValueError as error:
            raise ValueError(f"{beside.path(CONFIG)}: {error}") from error
    return Card(
        config=config,
        preprocessing=beside.files.get(PREPROCESSOR),
        license=beside.license,
        note=str(content.get(NOTE_KEY, "")),
    )
