"""Every kernel as an architecture launches it: what `tools/kernel_builds.py` compiles without a GPU.

The library imports nothing of this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import tuning
from .layer_norm_triton import add_layer_norm_backward_kernel, add_layer_norm_forward_kernel
from .rope_attention_backward_triton import rope_attention_backward_kv_kernel, rope_attention_backward_q_kernel
from .rope_attention_triton import rope_attention_forward_kernel
from .rotate_triton import rotate_kernel
from .swiglu_triton import swiglu_backward_kernel, swiglu_forward_kernel


class Build(NamedTuple):
    """One kernel with one launch configuration, as `triton.compile` takes it.

    At run time every pointer, and every argument called stride_.., is a multiple of 16: the compiler is to be told so.
    """

    name: str
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # of every argument: "*fp16", "i32", "fp32", .. or "constexpr"
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int


IMAGES: dict[str, object] = {"cu_seqlens_ptr": None}
PACK: dict[str, object] = {}
ATTENTION: list[tuple[str, Any, str, dict[str, object]]] = [
    ("forward, fused", rope_attention_forward_kernel, "forward", {"ROTATE": True, **IMAGES}),
    ("forward", rope_attention_forward_kernel, "forward", {"ROTATE": False, **IMAGES}),
    ("backward q", rope_attention_backward_q_kernel, "backward_q", IMAGES),
    ("backward kv", rope_attention_backward_kv_kernel, "backward_kv", IMAGES),
    ("packed forward", rope_attention_forward_kernel, "forward", {"ROTATE": False, **PACK}),
    ("packed backward q", rope_attention_backward_q_kernel, "backward_q", PACK),
    ("packed backward kv", rope_attention_backward_kv_kernel, "backward_kv", PACK),
]


def builds(arch: int) -> Iterator[Build]:
    """Every kernel, for each entry of the tables and at a released width for each way to launch it.

    Left out is float32 attention beyond head dim 128, which spills.
    """
    for D, dtype in ((64, "bf16"), (128, "bf16"), (256, "bf16"), (64, "fp32"), (128, "fp32")):
        yield from attention_builds(arch, D, dtype)
        yield build(
            f"rotate, D {D}, {dtype}", rotate_kernel, {**tuning.rotate_launch(D), "INVERSE": False}, f"*{dtype}"
        )
    for stream, half in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")):
        dtypes = half if half == stream else f"{half} on {stream}"
        streams = dict.fromkeys(("x_ptr", "x_new_ptr", "grad_x_ptr", "grad_x_new_ptr"), f"*{stream}")
        for C in (384, 1024, 1280, 4096):
            for kernel in (add_layer_norm_forward_kernel, add_layer_norm_backward_kernel):
                name = f"{kernel.__name__.removesuffix('_kernel')}, C {C}, {dtypes}"
                yield build(name, kernel, tuning.layer_norm_launch(arch, C), f"*{half}", streams)
    for dtype in ("bf16", "fp32"):
        for kernel in (swiglu_forward_kernel, swiglu_backward_kernel):
            name = f"{kernel.__name__.removesuffix('_kernel')}, F 5120, {dtype}"
            yield build(name, kernel, tuning.swiglu_launch(arch, 5120), f"*{dtype}")


def attention_builds(arch: int, D: int, dtype: str, only: str = "") -> Iterator[Build]:
    """The kernels of attention, or those of one of tuning's tables."""
    for name, kernel, launched, flags in ATTENTION:
        if only and only != launched:
            continue
        if name.startswith("packed") and (D, dtype) != (64, "bf16"):
            continue  # a pack only adds where its sequences begin: one head dim shows that it compiles
        launch = tuning.attention_launch(launched, arch, D, itemsize=4 if dtype == "fp32" else 2)
        yield build(f"{name}, D {D}, {dtype}", kernel, launch | {**flags, "PRECISION": "ieee"}, f"*{dtype}")


TYPES = {
    **dict.fromkeys(("cos_ptr", "sin_ptr", "maximum_ptr", "total_ptr", "delta_ptr", "partials_ptr"), "*fp32"),
    "cu_seqlens_ptr": "*i32",
    **dict.fromkeys(("scale", "scale_log2", "eps"), "fp32"),
}


def build(name: str, kernel: Any, launch: dict[str, Any], pointer: str, types: dict[str, str] | None = None) -> Build:
    """A kernel launched with these keywords. Its pointers are of the type `pointer`, but for what `types` says."""
    constexprs: dict[str, object] = {key: value for key, value in launch.items() if key in kernel.arg_names}
    types = TYPES | (types or {}) | dict.fromkeys(constexprs, "constexpr")
    signature = {x: types.get(x, pointer if x.endswith("_ptr") else "i32") for x in kernel.arg_names}
    return Build(name, kernel, signature, constexprs, launch["num_warps"], launch["num_stages"])
