"""What a checkpoint says of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import open_checkpoint, weights_in
from .json_files import read_json


def read_preprocessing(path: Path) -> dict[str, Any] | None:
    """The parsed preprocessor_config.json of a checkpoint folder, or the copy of it in a converted file."""
    if (file := path / "preprocessor_config.json").is_file():
        return read_json(file)
    if path.is_file() or (path.is_dir() and any(weights_in(path))):
        return open_checkpoint(path).card.preprocessing
    return None
