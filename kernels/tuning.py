"""How each kernel is launched, per architecture and head dim, and which strategy attention takes.

What `measured.py` holds for an architecture comes first. The tables here are for the others: they compile for their
architectures without spills and within shared memory, under triton 3.6 and 3.9 (README.md has the exceptions). On an
H200 they were timed as they are, and nothing else beside them.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import TYPE_CHECKING

from .measured import MEASURED, Measured, Tiles

if TYPE_CHECKING:
    import torch

ARCHITECTURES = (80, 86, 90, 100, 120)

# Up to so many tokens the keys are rotated in the attention loop; beyond, a pass of its own over q and k is cheaper: by
# the instructions of the compiled loop (+45 % on sm_90, 2.8 times on sm_80, where every warp turns all keys again)
# against the bytes of the pass.
FUSED_UP_TO = {80: 64, 86: 64, 90: 450, 100: 450, 120: 64}

# Architectures where PyTorch's attention is cuDNN's, which was faster than ours there up to FUSED_UP_TO tokens.
CUDNN_LEADS = (90,)

# Pairs that a program of the rotation pass turns, in q and in k: 16 a thread of 4 warps, two 16-byte accesses a half.
ROTATION_BLOCK = 2048


# By tensor core: "wgmma" takes operands from shared memory (sm_90, and so does sm_100's tcgen05), "mma" from registers
# (sm_80, sm_86, sm_120), exact float32 has none. Then by head dim, up to which an entry goes.
TABLES: dict[str, dict[str, dict[int, Tiles]]] = {
    "forward": {
        "wgmma": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
        "mma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 16, 8, 1)},
        "float32": {64: Tiles(32, 32, 8, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
    },
    "backward_q": {
        "wgmma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2)},
        "mma": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1)},
        # at 256 some 200 bytes spill
        "float32": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
    },
    "backward_kv": {
        "wgmma": {64: Tiles(64, 64, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(32, 32, 8, 1)},
        "mma": {64: Tiles(32, 64, 8, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(32, 32, 8, 1)},
        "float32": {64: Tiles(16, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
    },
}


def prefers_sdpa(tokens: int, head_dim: int, device: torch.device, training: bool) -> bool:
    """Whether PyTorch's attention takes over after the rotation pass.

    Where nothing was measured: the 16-wide tail saves 19 % of the work at 201 tokens, 7.5 % at 581 and 4.4 % at 1029;
    beyond head dim 64, published kernels are a third faster than Triton's. On an H200, where PyTorch takes cuDNN's, the
    forward was measured with these tables (README.md, "On an H200"), and no backward.
    """
    arch = capability(device)
    measured = _measured(arch)
    if measured is not None and head_dim in measured.sdpa_beyond:
        return tokens > measured.sdpa_beyond[head_dim]
    if not training and device.type == "cuda" and arch in CUDNN_LEADS:
        return head_dim > 64 or tokens <= FUSED_UP_TO[arch]
    return tokens > (600 if head_dim <= 64 else 450)


def capability(device: torch.device) -> int:
    """Of a GPU, as in sm_90; the interpreter takes the launches of that one. Not cached: torch.compile traces it."""
    import torch

    if device.type != "cuda":
        return 90
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


@cache
def architecture(device: torch.device) -> int:
    """The newest architecture of the tables that this device can run."""
    return max(arch for arch in ARCHITECTURES if arch <= capability(device))


def _measured(arch: int) -> Measured | None:
    return MEASURED.get(arch)


@cache
def is_measured(operation: str, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the launch of an operation was measured on this very architecture, with this release of triton."""
    entry = _measured(capability(device)) if device.type == "cuda" else None
    if entry is None or dtype.itemsize != 2 or entry.triton != importlib.metadata.version("triton"):
        return False
    if operation.startswith("add_layer_norm"):
        return width in entry.layer_norm_warps
    return operation.startswith("swiglu") or all(width in by_width for by_width in entry.tiles.values())


def fused_up_to(device: torch.device) -> int:
    """The most tokens of a sequence whose keys are rotated in the attention loop."""
    arch = architecture(device)
    measured = _measured(arch)
    return FUSED_UP_TO[arch] if measured is None else measured.fused_up_to


def precision(dtype: torch.dtype) -> str:
    """How tensor cores may take float32: exactly, unless PyTorch's own switch, by its new or old name, allows tf32."""
    if dtype.itemsize != 4:
        return "ieee"
    import torch

    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def attention_launch(kernel: str, arch: int, D: int, itemsize: int) -> dict[str, int]:
    """What a kernel of attention takes by keyword for an architecture, a head dim and the bytes of an element."""
    block_m, block_n, num_warps, num_stages = tiles(kernel, arch, D, itemsize)
    return {
        **widths(D),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
    }


def tiles(kernel: str, arch: int, D: int, itemsize: int) -> Tiles:
    """The tiles of "forward", "backward_q" or "backward_kv"."""
    measured = _measured(arch)
    if measured is not None and itemsize == 2 and D in measured.tiles[kernel]:
        return measured.tiles[kernel][D]
    cores = "float32" if itemsize == 4 else "wgmma" if arch in (90, 100) else "mma"
    return next(entry for width, entry in TABLES[kernel][cores].items() if width >= D)


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


def layer_norm_launch(arch: int, C: int) -> dict[str, int]:
    """What the kernels of add_layer_norm take by keyword: a whole row a program, 8 channels a thread if not measured.

    8 channels are 16 bytes in half precision.
    """
    block = 1 << (C - 1).bit_length()
    warps, measured = max(1, block // 256), _measured(arch)
    if measured is not None:
        warps = measured.layer_norm_warps.get(C, warps)
    return {"C": C, "BLOCK_C": block, **ELEMENTWISE, "num_warps": warps}


def swiglu_launch(arch: int, F: int) -> dict[str, int]:
    """What the kernels of swiglu take by keyword: 1,024 channels a program, 8 a thread if not measured."""
    measured = _measured(arch)
    block, warps = (1024, 4) if measured is None else measured.swiglu
    return {"F": F, "BLOCK_F": block, **ELEMENTWISE, "num_warps": warps}
