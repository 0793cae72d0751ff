"""One door for both architectures: the tensors of a checkpoint say which it is."""

from __future__ import annotations

import os

import torch

from .attention import resolve_attention
from .checkpoint import open_checkpoint
from .checkpoint.hub import locate
from .checks import check_dtype
from .config import DINOv3Config
from .convnext import DINOv3ConvNeXt
from .model import DINOv3ViT

Backbone = DINOv3ViT | DINOv3ConvNeXt


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: str = "auto",
    prefix: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Backbone:
    """Load whichever DINOv3 backbone a checkpoint holds, as its class's `from_pretrained` does, in evaluation mode.

    attention: for a vision transformer, see `DINOv3ViT`. The other arguments are those of `DINOv3ViT.from_pretrained`.

    Returns a DINOv3ViT or a DINOv3ConvNeXt. Raises FileNotFoundError and ValueError as `DINOv3ViT.from_pretrained`, and
    ValueError if `attention` is given for a ConvNeXt, which has none.
    """
    resolve_attention(attention)
    check_dtype(dtype)
    path = locate(
        source, subfolder=subfolder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    opened = open_checkpoint(path, prefix=prefix)
    if isinstance(opened.config, DINOv3Config):
        return DINOv3ViT.from_checkpoint(opened, dtype=dtype, device=device, attention=attention)
    if attention != "auto":
        raise ValueError(f"attention is {attention!r} and {path} holds a ConvNeXt, which has none: leave it out")
    return DINOv3ConvNeXt.from_checkpoint(opened, dtype=dtype, device=device)
