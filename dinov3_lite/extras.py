"""Packages that only some of the library needs, which come with its extras."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(purpose: str, package: str, install: str) -> Iterator[None]:
    """Imports of a package: where they fail, the ImportError says what for, and what pip is to install.

    purpose: what needs the package. Why an installed one can't be imported is told, too.
    """
    try:
        yield
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise ImportError(f"{purpose} needs {package}{why}: pip install {install}", name=error.name) from error
