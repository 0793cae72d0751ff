"""The converter behind `python -m convert`: from any checkpoint layout to any other, without changing a number.

A conversion is a value, a `Plan` of the files to be written: `make_plan` -> `check` -> `write`, and `verify` if asked.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.hub import locate

from .plan import MAX_SHARD_SIZE, check, check_prefix, make_plan, parse_dtype, parse_layout, parse_size
from .writer import write

__all__ = ["convert"]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    to: str = "lite",
    dtype: torch.dtype | str | None = None,
    force: bool = False,
    allow_loss: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    prefix: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = False,
) -> Path:
    """Convert one model and return the path written: a file (lite, meta) or a folder (transformers, timm).

    source: a checkpoint folder, a .safetensors or .pth file, or a hub id, in any layout.
    output: a folder to write into, or the file's name; None writes beside the source, but not with a `prefix`.
    to: lite, transformers, meta or timm.
    dtype: of the weights, as torch.bfloat16 or "bfloat16"; None keeps the source's.
    force: replace existing output, and remove what readers would mix with the new one: of a folder that is written,
        other weights called model.safetensors or model-00001-of-00002.safetensors, an index of them, preprocessing.
    allow_loss: leave out what the layout can't hold (a mask token, other RoPE periods); otherwise that is an error.
    max_shard_size: of one file of transformers' layout, in bytes or as "5GB". progress: show a progress bar.
    prefix, subfolder, revision, cache_dir, local_files_only: as in `DINOv3ViT.from_pretrained`.

    Files appear under their names only when all are whole: a failure leaves what was there before.
    Raises FileNotFoundError if there is no such source, FileExistsError if the output is there already, ValueError if
    the source is damaged or ambiguous or the layout can't hold it.
    """
    parse_layout(to), parse_dtype(dtype), parse_size(max_shard_size)  # refused before anything is downloaded
    check_prefix(prefix, output)
    path = locate(
        source, subfolder=subfolder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    opened = open_checkpoint(path, original=True, prefix=prefix)
    plan = make_plan(opened, output, to=to, dtype=dtype, max_shard_size=max_shard_size)
    check(plan, force=force, allow_loss=allow_loss)
    return write(plan, progress=progress)
