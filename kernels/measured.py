"""What was measured, an entry an architecture. Written by `tools/tune.py`, not by hand: `tuning` reads it.

No GPU has been measured yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """Queries and keys of a step, warps of a program, stages of the loop's software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Measured(NamedTuple):
    """The best launches that were found on one GPU, in half precision, and the two thresholds of attention."""

    where: str  # the GPU
    when: str
    torch: str
    triton: str
    tiles: dict[str, dict[int, Tiles]]  # "forward", "backward_q", "backward_kv": by head dim
    fused_up_to: int  # tokens whose keys are rotated in the loop
    sdpa_beyond: dict[int, int]  # tokens, by head dim, that PyTorch's attention is left
    layer_norm_warps: dict[int, int]  # by channels
    swiglu: tuple[int, int]  # channels and warps of a program


MEASURED: dict[int, Measured] = {}
