"""A conversion as a value: which files will be written where, and what of the source they can't hold."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov3_lite.checkpoint import DTYPES, Checkpoint
from dinov3_lite.checkpoint.folders import license_files
from dinov3_lite.checkpoint.layouts import LAYOUTS
from dinov3_lite.checkpoint.layouts.table import Layout
from dinov3_lite.checkpoint.saving import (
    MAX_SHARD_SIZE,
    Files,
    WeightsFile,
    carried_into,
    destination,
    files_of,
    leave_readme,
    losses,
    obsolete,
)
from dinov3_lite.checkpoint.words import short


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, before anything is written: `check` it, `write` it, `verify` or describe it."""

    source: Checkpoint
    layout: Layout
    dtype: torch.dtype | None
    """Of the weights; None: the source's."""
    folder: Path
    files: Files
    """What will lie in the folder, by name."""
    lost: dict[str, str]
    """What of the source the layout can't hold, by tensor pattern or config field: a sentence each."""
    left_out: dict[str, str]
    """Tensors of the source's files that are not the model's and are not carried along, each with the reason."""

    @property
    def path(self) -> Path:
        """Where the result is opened: the folder, or the file where the layout is one."""
        return self.folder if self.layout.is_folder else self.folder / next(iter(self.files))

    @property
    def weights(self) -> dict[Path, WeightsFile]:
        """The files of weights."""
        return {self.folder / name: file for name, file in self.files.items() if isinstance(file, WeightsFile)}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors to be written."""
        return sum(file.nbytes for file in self.weights.values())

    @property
    def obsolete(self) -> list[Path]:
        """Files of an earlier output that readers would mix with this one, beside the source weights alone."""
        return obsolete(self.folder, self.files, self.layout, side_files=not self._is_beside_source)

    @property
    def _is_beside_source(self) -> bool:
        source = self.source.path if self.source.path.is_dir() else self.source.path.parent
        return source.resolve() == self.folder.resolve()

    @property
    def licenses(self) -> dict[Path, Path]:
        """The source's licence files that will be copied, and where to; one that is there already stays."""
        folder = self.source.path if self.source.path.is_dir() else self.source.path.parent
        files = {file: self.folder / file.name for file in license_files(folder)}
        return {file: target for file, target in files.items() if not target.exists()}


def make_plan(
    source: Checkpoint,
    output: str | os.PathLike[str] | None = None,
    *,
    to: str = "lite",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Plan:
    """Plan one conversion; the arguments are those of `convert`. Raises ValueError if one of them is not valid."""
    dtype, max_shard_size = parse_dtype(dtype), parse_size(max_shard_size)
    layout = parse_layout(to)
    folder, name = _destination(source, layout, None if output is None else Path(output))
    kept = {name.removeprefix(layout.carries) for name in carried_into(source, layout)}
    files = files_of(source, layout, dtype=dtype, name=name, max_shard_size=max_shard_size)
    leave_readme(folder, files)
    return Plan(
        source=source,
        layout=layout,
        dtype=dtype,
        folder=folder,
        files=files,
        lost=losses(source, layout, dtype),
        left_out={name: reason for name, reason in source.left_out.items() if name not in kept},
    )


def check_prefix(prefix: str | None, output: str | os.PathLike[str] | None) -> None:
    """Raise ValueError for one of several backbones without an output of its own: a folder of several does not say
    which of them the copy in it is of.
    """
    if prefix is not None and output is None:
        raise ValueError(f"prefix is {short(prefix)} and no output is named: name one with --output")


def parse_layout(to: str) -> Layout:
    """Return a layout by its name. Raises ValueError that lists the names for any other."""
    if not isinstance(to, str) or to not in LAYOUTS:
        raise ValueError(f"to is {short(to)}: expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[to]


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype of weights, given as such or by name, with or without `torch.`. Raises ValueError for others."""
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype is {short(dtype)}: expected one of {', '.join(DTYPES)}, or None for the source's own")
    return found


def parse_size(size: int | str) -> int:
    """Return a size in bytes, given as a number or as "5GB" or "500 MiB", as in transformers. Raises ValueError for
    others.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", size.upper()) if isinstance(size, str) else None
    if match:
        number = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))
    else:
        number = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if number <= 0:
        raise ValueError(f"max_shard_size is {short(size)}: expected a number of bytes, or a size such as '5GB'")
    return number


def _destination(source: Checkpoint, layout: Layout, output: Path | None) -> tuple[Path, str | None]:
    """The folder to write into, and the name of the file of weights if it is given."""
    if output is None:
        return (source.path if source.path.is_dir() else source.path.parent), None
    return destination(output, layout)


def check(plan: Plan, *, force: bool = False, allow_loss: bool = False) -> None:
    """Refuse what can be known before anything is written.

    Raises ValueError if the layout can't hold something of the source, FileExistsError if a file is there already,
    OSError if the disk has no room or the folder can't be made.
    """
    if plan.lost and not allow_loss:
        raise ValueError(
            f"{plan.source.path}: the {plan.layout.name} layout can't hold {'; '.join(plan.lost.values())}: "
            "use --allow-loss to go on without"
        )
    paths = [plan.folder / name for name in plan.files]
    sources = {span.stored.file.resolve() for spans in plan.source.spans.values() for span in spans}
    for path in plan.obsolete:
        if path.resolve() in sources:
            raise FileExistsError(
                f"{path}: is the source itself, and readers would mix it with what is written: give another --output"
            )
        if not force:
            raise FileExistsError(
                f"{path}: readers would mix it with what is written: use --force to remove it, or give another --output"
            )
    for path in paths:
        if path.resolve() in sources:
            raise FileExistsError(f"{path}: is the source itself: give another --output")
    for path in paths:
        if path.exists() and not force:
            raise FileExistsError(f"{path}: exists already: use --force to replace it")
    _check_room(plan)


def _check_room(plan: Plan) -> None:
    there = next(folder for folder in (plan.folder, *plan.folder.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"{there}: is a file, where a folder is to hold {plan.path.name}: give another --output"
        )
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there}: no permission to write into this folder: give another --output")
    if (free := shutil.disk_usage(there).free) < plan.nbytes:
        raise OSError(f"{there}: {free} bytes are free on this disk, {plan.nbytes} are needed: give another --output")


def check_values(plan: Plan) -> None:
    """Read all weights that are to be cast to float16, and raise ValueError for one that it can't hold: `write` finds
    that out only on its way.
    """
    for file in plan.weights.values():
        for tensor in file.tensors:
            for span in tensor.spans:
                if tensor.dtype == torch.float16 != span.stored.dtype:
                    tensor.cast(span)
