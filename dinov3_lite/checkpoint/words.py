"""What messages say of names and values, and of files that are not what they should be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def not_whole(file: Path, kind: str, error: Exception) -> str:
    """What is wrong with a file that can't be read as one of that kind, and what to do."""
    with file.open("rb") as f:
        if f.read(32).startswith(b"version https://git-lfs"):
            return "a git-lfs pointer, not the weights: download it again"
    return f"not a whole {kind} file ({' '.join(str(error).split())[:200]}): download it again"


def few(names: Iterable[object], most: int = 5) -> str:
    """The first names in quotes, none longer than a line, and how many more there are."""
    quoted = [short(name) for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more


def short(value: object, width: int = 100) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"
