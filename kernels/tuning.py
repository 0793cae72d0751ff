"""How each kernel is launched, per architecture and head dim, and which strategy attention takes.

The tiles compile for their architectures without spills and within shared memory, under triton 3.6 and 3.9; README.md
has the exceptions. None of them has been timed: no number in this file is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .launch import Build

ARCHITECTURES = (80, 86, 90, 100, 120)

# Up to so many tokens the keys are rotated in the attention loop; beyond, a pass of its own over q and k is cheaper: by
# the instructions of the compiled loop (+45 % on sm_90, 2.8 times on sm_80, where every warp turns all keys again)
# against the bytes of the pass.
FUSED_UP_TO = {80: 64, 86: 64, 90: 450, 100: 450, 120: 64}

# Pairs that a program of the rotation pass turns, in q and in k: 16 a thread of 4 warps, two 16-byte accesses a half.
ROTATION_BLOCK = 2048


def prefers_sdpa(tokens: int, head_dim: int) -> bool:
    """Whether PyTorch's attention takes over after the rotation pass.

    The 16-wide tail saves 19 % of the work at 201 tokens, 7.5 % at 581 and 4.4 % at 1029; beyond head dim 64, published
    kernels are a third faster than Triton's.
    """
    return tokens > (600 if head_dim <= 64 else 450)


class Tiles(NamedTuple):
    """Queries and keys of a step, warps of a program, stages of the loop's software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By tensor core: "wgmma" takes operands from shared memory (sm_90, and so does sm_100's tcgen05), "mma" from registers
# (sm_80, sm_86, sm_120), exact float32 has none. Then by head dim, up to which an entry goes.
FORWARD = {
    "wgmma": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
    "mma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 16, 8, 1)},
    "float32": {64: Tiles(32, 32, 8, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
}
BACKWARD_Q = {
    "wgmma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2)},
    "mma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1)},
    # at 256 some 200 bytes spill
    "float32": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
BACKWARD_KV = {
    "wgmma": {64: Tiles(64, 64, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(32, 32, 8, 1)},
    "mma": {64: Tiles(32, 64, 8, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(32, 32, 8, 1)},
    "float32": {64: Tiles(16, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}


def launch(table: dict[str, dict[int, Tiles]], arch: int, D: int, itemsize: int) -> dict[str, int]:
    """What a launch takes by keyword: the table's entry for an architecture, a head dim and the bytes of an element."""
    block_m, block_n, num_warps, num_stages = tiles(table, arch, D, itemsize)
    return {
        **widths(D),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
    }


def tiles(table: dict[str, dict[int, Tiles]], arch: int, D: int, itemsize: int) -> Tiles:
    """The entry of a table for an architecture, a head dim and the bytes of an element."""
    cores = "float32" if itemsize == 4 else "wgmma" if arch in (90, 100) else "mma"
    return next(entry for width, entry in table[cores].items() if width >= D)


def widths(D: int) -> dict[str, int]:
    """The head dim, and its half and itself padded to the powers of two that tiles are made of."""
    width = max(16, 1 << (D - 1).bit_length())
    return {"D": D, "HALF": max(16, width // 2), "WIDTH": width}


def builds(arch: int) -> Iterator[Build]:
    """Every kernel of attention and rotation, as an architecture launches it for each entry of the tables.

    Left out is float32 beyond head dim 128, which spills.
    """
    from . import attention_triton as kernels

    plain: dict[str, object] = {"cu_seqlens_ptr": None}
    packed: dict[str, object] = {}
    attention: list[tuple[str, Any, dict[str, dict[int, Tiles]], dict[str, object]]] = [
        ("forward, fused", kernels.attention_forward, FORWARD, {"ROTATE": True, **plain}),
        ("forward", kernels.attention_forward, FORWARD, {"ROTATE": False, **plain}),
        ("backward q", kernels.attention_backward_q, BACKWARD_Q, plain),
        ("backward kv", kernels.attention_backward_kv, BACKWARD_KV, plain),
        ("packed forward", kernels.attention_forward, FORWARD, {"ROTATE": False, **packed}),
        ("packed backward q", kernels.attention_backward_q, BACKWARD_Q, packed),
        ("packed backward kv", kernels.attention_backward_kv, BACKWARD_KV, packed),
    ]
    for D, dtype in ((64, "bf16"), (128, "bf16"), (256, "bf16"), (64, "fp32"), (128, "fp32")):
        for name, kernel, table, flags in attention:
            if name.startswith("packed") and (D, dtype) != (64, "bf16"):
                continue  # a pack only adds where its sequences begin: one head dim shows that it compiles
            block_m, block_n, num_warps, num_stages = tiles(table, arch, D, 4 if dtype == "fp32" else 2)
            constexprs = {**widths(D), **flags, "BLOCK_M": block_m, "BLOCK_N": block_n, "PRECISION": "ieee"}
            signature = _signature(kernel.arg_names, constexprs, dtype)
            yield Build(f"{name}, D {D}, {dtype}", kernel, signature, constexprs, num_warps, num_stages)
        half = widths(D)["HALF"]
        constexprs = {"D": D, "HALF": half, "BLOCK": ROTATION_BLOCK // half, "INVERSE": False}
        signature = _signature(kernels.rotate.arg_names, constexprs, dtype)
        yield Build(f"rotate, D {D}, {dtype}", kernels.rotate, signature, constexprs, 4, 3)


def _signature(arguments: Sequence[str], constexprs: dict[str, object], dtype: str) -> dict[str, str]:
    """The types of a kernel's arguments, by their names."""
    pointers = {"cos": "*fp32", "sin": "*fp32", "lse": "*fp32", "delta": "*fp32", "cu_seqlens": "*i32"}

    def type_of(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name.endswith("_ptr"):
            return pointers.get(name.removesuffix("_ptr"), f"*{dtype}")
        return "fp32" if name.startswith("scale") else "i32"

    return {name: type_of(name) for name in arguments}
