"""How each kernel is launched, per architecture and head dim, and which strategy attention takes.

The tiles compile for their architectures without spills and within shared memory, under triton 3.6 and 3.9; README.md
has the exceptions. None of them has been timed: no number in this file is measured.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

ARCHITECTURES = (80, 86, 90, 100, 120)

# Up to so many tokens the keys are rotated in the attention loop; beyond, a pass of its own over q and k is cheaper: by
# the instructions of the compiled loop (+45 % on sm_90, 2.8 times on sm_80, where every warp turns all keys again)
# against the bytes of the pass.
FUSED_UP_TO = {80: 64, 86: 64, 90: 450, 100: 450, 120: 64}

# Pairs that a program of the rotation pass turns, in q and in k: 16 a thread of 4 warps, two 16-byte accesses a half.
ROTATION_BLOCK = 2048


class Tiles(NamedTuple):
    """Queries and keys of a step, warps of a program, stages of the loop's software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By tensor core: "wgmma" takes operands from shared memory (sm_90, and so does sm_100's tcgen05), "mma" from registers
# (sm_80, sm_86, sm_120), exact float32 has none. Then by head dim, up to which an entry goes.
Table = dict[str, dict[int, Tiles]]
FORWARD: Table = {
    "wgmma": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
    "mma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 16, 8, 1)},
    "float32": {64: Tiles(32, 32, 8, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
}
BACKWARD_Q: Table = {
    "wgmma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2)},
    "mma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1)},
    # at 256 some 200 bytes spill
    "float32": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
BACKWARD_KV: Table = {
    "wgmma": {64: Tiles(64, 64, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(32, 32, 8, 1)},
    "mma": {64: Tiles(32, 64, 8, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(32, 32, 8, 1)},
    "float32": {64: Tiles(16, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}


def prefers_sdpa(tokens: int, head_dim: int) -> bool:
    """Whether PyTorch's attention takes over after the rotation pass.

    The 16-wide tail saves 19 % of the work at 201 tokens, 7.5 % at 581 and 4.4 % at 1029; beyond head dim 64, published
    kernels are a third faster than Triton's.
    """
    return tokens > (600 if head_dim <= 64 else 450)


@cache
def architecture(device: torch.device) -> int:
    """The newest architecture of the tables that this device can run; the interpreter takes the tiles of sm_90."""
    import torch

    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max(arch for arch in ARCHITECTURES if arch <= 10 * major + minor)


def attention_launch(table: Table, arch: int, D: int, itemsize: int) -> dict[str, int]:
    """What a kernel of attention takes by keyword for an architecture, a head dim and the bytes of an element."""
    block_m, block_n, num_warps, num_stages = tiles(table, arch, D, itemsize)
    return {
        **widths(D),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
    }


def tiles(table: Table, arch: int, D: int, itemsize: int) -> Tiles:
    """The entry of a table for an architecture, a head dim and the bytes of an element."""
    cores = "float32" if itemsize == 4 else "wgmma" if arch in (90, 100) else "mma"
    return next(entry for width, entry in table[cores].items() if width >= D)


def widths(D: int) -> dict[str, int]:
    """The head dim, and its half and itself padded to the powers of two that tiles are made of."""
    width = max(16, 1 << (D - 1).bit_length())
    return {"D": D, "HALF": max(16, width // 2), "WIDTH": width}


# for kernels without products, whose loops there is nothing to pipeline in
ELEMENTWISE = {"num_stages": 1, "enable_fp_fusion": True}


def rotate_launch(D: int) -> dict[str, int]:
    """What the rotation pass takes by keyword: as many rows of D elements as make ROTATION_BLOCK pairs."""
    half = widths(D)["HALF"]
    return {"D": D, "HALF": half, "BLOCK": ROTATION_BLOCK // half, **ELEMENTWISE, "num_warps": 4}


def layer_norm_launch(C: int) -> dict[str, int]:
    """What the kernels of add_layer_norm take by keyword: a whole row a program, 8 channels a thread.

    8 channels are 16 bytes in half precision.
    """
    block = 1 << (C - 1).bit_length()
    return {"C": C, "BLOCK_C": block, **ELEMENTWISE, "num_warps": max(1, block // 256)}


def swiglu_launch(F: int) -> dict[str, int]:
    """What the kernels of swiglu take by keyword: 1,024 channels a program, 8 a thread."""
    return {"F": F, "BLOCK_F": 1024, **ELEMENTWISE, "num_warps": 4}
