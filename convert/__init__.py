"""The converter behind `python -m convert`: any checkpoint layout to any other, bytes for bytes.

A conversion is a value, a `Plan` of the files to be written: `make_plan` -> `check` -> `write`, and `verify` if asked.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.hub import locate

from .plan import MAX_SHARD_SIZE, check, make_plan
from .writer import write

__all__ = ["convert"]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    to: str = "lite",
    dtype: torch.dtype | None = None,
    force: bool = False,
    allow_loss: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    revision: str | None = None,
    prefix: str | None = None,
    progress: bool = False,
) -> Path:
    """Convert one model and return the path written: a file (lite, meta) or a folder (transformers, timm).

    source: a checkpoint folder, a .safetensors or .pth file, or a hub id, in any layout.
    output: a folder to write into, or the file's name; None writes beside the source.
    to: lite, transformers, meta or timm. dtype: of the weights; None keeps the source's.
    force: replace existing output. allow_loss: go on where the layout can't hold something of the source.
    max_shard_size: bytes in one file of transformers' layout. progress: show a bar of bytes.
    prefix: what stands before the names of the backbone that is meant, where the source holds several.

    Files appear under their names only when all are whole: a failure leaves what was there before.
    Raises FileNotFoundError, FileExistsError or ValueError in one sentence.
    """
    opened = open_checkpoint(locate(source, revision=revision), original=True, prefix=prefix)
    plan = make_plan(opened, output, to=to, dtype=dtype, max_shard_size=max_shard_size)
    check(plan, force=force, allow_loss=allow_loss)
    return write(plan, progress=progress)
