"""The converter behind `python -m convert`: a checkpoint folder in, one self-describing file out."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tqdm import tqdm

from dinov3_lite.weights import LITE_FILE, Checkpoint, locate, open_source

from .plan import make_plan
from .writer import write_safetensors

__all__ = ["convert"]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    to: str = "lite",
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Convert one model and return the path written: `dinov3_lite.safetensors` beside the source, or `output`.

    source: a checkpoint folder, a converted file, or a hub id. output: a file, or a folder to put the file into.
    dtype: of the weights; None keeps the source's. force: replace an existing output. progress: show a bar of bytes.

    The file appears under its name only when it is whole: a failure leaves what was there before.
    Raises FileNotFoundError, FileExistsError or ValueError in one sentence.
    """
    return convert_opened(open_source(locate(source)), output, to=to, dtype=dtype, force=force, progress=progress)


def convert_opened(
    opened: Checkpoint,
    output: str | os.PathLike[str] | None,
    *,
    to: str,
    dtype: torch.dtype | None,
    force: bool,
    progress: bool,
) -> Path:
    if to != "lite":
        raise ValueError(f"to is {to!r}: expected 'lite', the one layout that is written so far")
    path = _output_path(opened.path, output)
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already: use --force to replace it")
    plan = make_plan(opened, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(entry.nbytes for entry in plan.entries)
    disable = None if progress else True  # None: shown on a terminal only
    with tqdm(total=total, unit="B", unit_scale=True, desc=opened.path.name, disable=disable) as bar:
        write_safetensors(path, plan, on_bytes=bar.update)
    return path


def _output_path(source: Path, output: str | os.PathLike[str] | None) -> Path:
    if output is None:
        return (source if source.is_dir() else source.parent) / LITE_FILE
    return Path(output) if Path(output).suffix == ".safetensors" else Path(output) / LITE_FILE
