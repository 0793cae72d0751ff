"""One door for both architectures: the tensors of a checkpoint say which it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from .attention import resolve_attention
from .checkpoint import open_checkpoint
from .checkpoint.hub import locate
from .checks import check_dtype
from .config import DINOv3Config
from .convnext import DINOv3ConvNeXt
from .model import DINOv3ViT

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Backbone = DINOv3ViT | DINOv3ConvNeXt


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: str = "auto",
    prefix: str | None = None,
    subfolder: str | None = None,
    mesh: DeviceMesh | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Backbone:
    """Load whichever DINOv3 backbone a checkpoint holds, as its class's `from_pretrained` does, in evaluation mode.

    attention, mesh: of a vision transformer. The other arguments are those of `DINOv3ViT.from_pretrained`.

    Raises FileNotFoundError and ValueError as `DINOv3ViT.from_pretrained`, and ValueError for an attention or a mesh
    that is asked of a ConvNeXt, which has none.
    """
    resolve_attention(attention)
    check_dtype(dtype)
    path = locate(
        source, subfolder=subfolder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    opened = open_checkpoint(path, prefix=prefix)
    if isinstance(opened.config, DINOv3Config):
        return DINOv3ViT.from_checkpoint(opened, attention, mesh, dtype=dtype, device=device)
    if attention != "auto":
        raise ValueError(f"attention is {attention!r} and {path} holds a ConvNeXt, which has none: leave it out")
    if mesh is not None:
        raise ValueError(f"mesh is given and {path} holds a ConvNeXt, of 0.2 billion parameters at most: leave it out")
    return DINOv3ConvNeXt.from_checkpoint(opened, dtype=dtype, device=device)
