"""Kernels of dinov3-lite, imported as `dinov3_lite.kernels`: they know tensors, nothing of the model.

This file stays lazy and without effects. With the repository's root on `sys.path`, `import kernels` finds this folder,
and transformers takes it for the PyPI package of that name: it must import, have a version, and offer nothing it
doesn't hold.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .reference import rope_attention_reference

__all__ = ["rope_attention_reference"]


def __getattr__(name: str) -> Any:
    if name == "rope_attention_reference":
        from .reference import rope_attention_reference

        return rope_attention_reference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
