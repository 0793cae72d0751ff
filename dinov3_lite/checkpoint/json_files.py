"""JSON objects, as configs and indexes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .words import short

MAX_JSON_BYTES = 4 << 20  # of a config or an index; a real one has kilobytes, the 7B's index 60 of them


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError if the file holds anything else, or far more than a config or an index does."""
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{file}: {size} bytes, expected a JSON file of at most {MAX_JSON_BYTES}: download it again")
    try:
        return parse_json_object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}: download it again") from error


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """The object that the text spells. Raises ValueError if it is anything else."""
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a JSON object")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {short(key)} is there twice")
        result[key] = value
    return result
