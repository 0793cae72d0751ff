"""Kernels of dinov3-lite, imported as `dinov3_lite.kernels`: they know tensors, nothing of the model.

This file stays lazy and without effects. With the repository's root on `sys.path`, `import kernels` finds this folder,
and transformers takes it for the PyPI package of that name: it must import, have a version, and offer nothing it
doesn't hold.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .attention import rope_attention, rope_attention_packed
    from .launch import is_available, unavailable_reason
    from .reference import (
        add_layer_norm_reference,
        rope_attention_packed_reference,
        rope_attention_reference,
        swiglu_reference,
    )
    from .rows import add_layer_norm, swiglu

__all__ = [
    "add_layer_norm",
    "add_layer_norm_reference",
    "is_available",
    "rope_attention",
    "rope_attention_packed",
    "rope_attention_packed_reference",
    "rope_attention_reference",
    "swiglu",
    "swiglu_reference",
    "unavailable_reason",
]

_MODULES = {
    "add_layer_norm": "rows",
    "is_available": "launch",
    "rope_attention": "attention",
    "rope_attention_packed": "attention",
    "swiglu": "rows",
    "unavailable_reason": "launch",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES.get(name, 'reference')}", __name__), name)
