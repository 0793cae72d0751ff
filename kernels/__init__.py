"""Kernels of dinov3-lite, imported as `dinov3_lite.kernels`: they know tensors, nothing of the model.

Under its own name this package is empty. With the repository's root on `sys.path`, `import kernels` finds this folder,
and transformers takes it for the PyPI package of that name: it must import, have a version, and offer nothing. Nor may
its ops be registered a second time.
"""

__version__ = "0"  # of the package that transformers takes this for: too old to be used

if __name__ != "kernels":
    from .availability import is_available, unavailable_reason
    from .layer_norm import add_layer_norm
    from .reference import (
        add_layer_norm_reference,
        rope_attention_packed_reference,
        rope_attention_reference,
        swiglu_reference,
    )
    from .rope_attention import rope_attention, rope_attention_packed
    from .swiglu import swiglu

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
