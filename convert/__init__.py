"""The converter behind `python -m convert`: any checkpoint layout to any other, bytes for bytes."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dinov3_lite.layouts import LAYOUTS, LITE, META, TRANSFORMERS, Layout
from dinov3_lite.weights import Checkpoint, license_files, locate, open_source

from .plan import Entry, lite_metadata, losses, make_entries, output_name, side_files
from .writer import Output, write_pth, write_safetensors

__all__ = ["convert"]

MAX_SHARD_SIZE = 5_000_000_000


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
    progress: bool = False,
) -> Path:
    """Convert one model and return the path written: a file (lite, meta) or a folder (transformers, timm).

    source: a checkpoint folder, a .safetensors or .pth file, or a hub id, in any layout.
    output: a folder to write into, or the file's name; None writes beside the source.
    to: lite, transformers, meta or timm. dtype: of the weights; None keeps the source's.
    force: replace existing output. allow_loss: go on where the layout can't hold something of the source.
    max_shard_size: bytes in one file of transformers' layout. progress: show a bar of bytes.

    Files appear under their names only when all are whole: a failure leaves what was there before.
    Raises FileNotFoundError, FileExistsError or ValueError in one sentence.
    """
    opened = open_source(locate(source, revision=revision))
    return convert_opened(
        opened,
        None if output is None else Path(output),
        to=to,
        dtype=dtype,
        force=force,
        allow_loss=allow_loss,
        max_shard_size=max_shard_size,
        progress=progress,
    )


def convert_opened(
    opened: Checkpoint,
    output: Path | None,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    force: bool = False,
    allow_loss: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: bool = False,
) -> Path:
    """`convert` of a checkpoint that is open already."""
    if to not in LAYOUTS:
        raise ValueError(f"to is {to!r}: expected one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[to]
    lost = losses(opened, layout)
    if lost and not allow_loss:
        raise ValueError(
            f"{opened.path}: the {to} layout can't hold {'; '.join(lost)}: use --allow-loss to go on without"
        )
    folder, name = _destination(opened, layout, output)
    entries = make_entries(opened, layout, dtype)
    shards = _shards(entries, max_shard_size) if layout is TRANSFORMERS else [entries]
    weights = dict(zip(_shard_names(name, len(shards)), shards, strict=True))
    jsons = side_files(opened, layout)
    if len(weights) > 1:
        jsons[f"{name}.index.json"] = _index(weights)
    _check_outputs(opened, [folder / file for file in (*weights, *jsons)], force)

    folder.mkdir(parents=True, exist_ok=True)
    metadata = lite_metadata(opened, dtype) if layout is LITE else {"format": "pt"}
    total = sum(entry.nbytes for entry in entries)
    disable = None if progress else True  # None: shown on a terminal only
    with tqdm(total=total, unit="B", unit_scale=True, desc=opened.path.name, disable=disable) as bar, Output() as out:
        for file, shard in weights.items():
            with out.create(folder / file) as f:
                if layout is META:
                    write_pth(f, shard, bar.update)
                else:
                    write_safetensors(f, shard, metadata, bar.update)
        for file, content in jsons.items():
            with out.create(folder / file) as f:
                f.write((json.dumps(content, indent=2) + "\n").encode())
        out.publish()
    not_finite = list(dict.fromkeys(name for name, sample in opened.samples if not sample.isfinite().all()))
    if not_finite:
        more = f" (and {len(not_finite) - 1} more)" if len(not_finite) > 1 else ""
        warnings.warn(f"{opened.path}: NaN or infinity in tensor {not_finite[0]!r}{more}: kept as it is", stacklevel=3)
    for license_file in license_files(opened.path if opened.path.is_dir() else opened.path.parent):
        if not (folder / license_file.name).exists():
            shutil.copyfile(license_file, folder / license_file.name)
    return folder / name if layout in (LITE, META) else folder


def _destination(opened: Checkpoint, layout: Layout, output: Path | None) -> tuple[Path, str]:
    """The folder to write into, and the name of the file of weights."""
    name = output_name(opened, layout)
    if output is None:
        return (opened.path if opened.path.is_dir() else opened.path.parent), name
    if layout in (LITE, META) and output.suffix == Path(name).suffix:
        return output.parent, output.name
    return output, name


def _check_outputs(opened: Checkpoint, paths: list[Path], force: bool) -> None:
    sources = {piece.stored.file.resolve() for pieces in opened.pieces.values() for piece in pieces}
    for path in paths:
        if path.resolve() in sources:
            raise FileExistsError(f"{path}: is the source itself: give another --output")
    for path in paths:
        if path.exists() and not force:
            raise FileExistsError(f"{path}: exists already: use --force to replace it")


def _shards(entries: list[Entry], max_size: int) -> list[list[Entry]]:
    """The entries in order, in files of at most `max_size` bytes where a single tensor allows it."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _shard_names(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _index(weights: dict[str, list[Entry]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(entry.nbytes for shard in weights.values() for entry in shard)},
        "weight_map": {entry.name: file for file, shard in weights.items() for entry in shard},
    }
