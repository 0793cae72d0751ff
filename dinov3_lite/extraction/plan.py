"""The frozen listing of the input, cut into shards. Written once and streamed: it is never held as a whole."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import tars
from .doubled import Keys
from .folder import Folder, from_line, to_json, to_line
from .parquet import open_parquet, picture_column, row_groups
from .sources import Listing, Source, filesystem, is_picture, is_url, naming, pictures

ITEMS, SHARDS = "items.txt", "shards.jsonl"


def key_of(name: str, item: str) -> str:
    """What a picture of a folder, of a list or by name is called in the output: `name` is its source's."""
    return f"{name}/{item}" if name else item


class Plan:
    """The shards of a plan: `plan[i]` says what shard i is to read, and of how many pictures, if that is known."""

    def __init__(self, folder: Folder) -> None:
        self.folder, file = folder.plan, folder.plan / SHARDS
        for name in (SHARDS, ITEMS):
            folder.fetch(folder.plan / name)
        # text of one line a shard, and where each line ends
        self._text = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
        self._ends = np.flatnonzero(self._text == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> dict[str, Any]:
        start = self._ends[i - 1] + 1 if i else 0
        return json.loads(self._text[start : self._ends[i]].tobytes())

    def items(self, shard: dict[str, Any]) -> Iterator[str]:
        """The pictures of a shard of files."""
        with (self.folder / ITEMS).open("rb") as file:
            file.seek(shard["offset"])
            for _ in range(shard["count"]):
                yield from_line(file.readline())


def write_plan(
    folder: Folder,
    sources: list[Source],
    shard_size: int,
    column: str | None,
    job: dict[str, Any],
    *,
    cut: bool = False,
) -> None:
    """Write the plan and, in it, the job that it is of, completed by a summary of the plan.

    cut: tars of any length into shards of this size.
    The folder appears when it is whole: of several processes that plan at once, the first one wins.
    """
    temporary = folder.new_plan()
    temporary.mkdir(parents=True)
    try:
        summary = _write(temporary, sources, shard_size, cut, column)
        with (temporary / "job.json").open("wb") as file:
            file.write(to_json({**job, "plan": summary}))
            os.fsync(file.fileno())
        try:
            temporary.rename(folder.plan)
        except OSError:
            if not folder.plan.is_dir():
                raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"can't write the plan ({error.strerror})", str(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, sources: list[Source], shard_size: int, cut: bool, column: str | None) -> dict[str, Any]:
    listing = Listing(skip=os.path.abspath(folder.parent))
    shards, total, known = 0, 0, True
    with Keys() as keys, (folder / ITEMS).open("wb") as items, (folder / SHARDS).open("w+b") as lines:
        listed = _Listed(_Counted(items), keys, listing)
        for shard in _shards(sources, shard_size, cut, column, listed):
            lines.write(_line(shard))
            shards += 1
            known = known and shard["count"] is not None
            total += shard["count"] or 0
        if doubled := keys.doubled():
            _mark(lines, doubled)
        for file in (items, lines):
            file.flush()
            os.fsync(file.fileno())
    if not shards:
        left = ", ".join(f"{count} {suffix}" for suffix, count in sorted(listing.left_out.items()))
        but = f" (but {left})" if left else ""
        raise ValueError(f"{', '.join(source.path for source in sources)}: no pictures there{but}")
    return {
        "shards": shards,
        "pictures": total if known else None,
        "doubled": len(doubled),
        "left_out": dict(sorted(listing.left_out.items())),
        "sha256": plan_digest(folder),
    }


def plan_digest(folder: Path) -> str:
    """A SHA-256 of the listing and the shards."""
    sha = hashlib.sha256()
    for name in (ITEMS, SHARDS):
        with (folder / name).open("rb") as file:
            while data := file.read(1 << 20):
                sha.update(data)
    return sha.hexdigest()


def _line(shard: dict[str, Any]) -> bytes:
    return json.dumps(shard, sort_keys=True).encode() + b"\n"


def _mark(lines: IO[bytes], doubled: list[int]) -> None:
    """Note at each shard which of its keys an earlier shard has, or itself; `doubled` counts those in `keyed` ones."""
    lines.seek(0)
    shards, first, marked = lines.readlines(), 0, iter(doubled)
    number = next(marked, None)
    lines.seek(0)
    for line in shards:
        shard = json.loads(line)
        if shard.get("keyed"):
            after = first + shard["keyed"]
            while number is not None and number < after:
                shard.setdefault("doubled", []).append(number - first)
                number = next(marked, None)
            first = after
        lines.write(_line(shard))


@dataclass
class _Listed:
    """Where what is listed goes."""

    items: _Counted
    keys: Keys
    """Of what may come twice: lines of lists, files of several inputs, and members of a tar that is cut."""
    listing: Listing


class _Counted:
    """A file to write to, and where in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.position = file, 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.position += len(data)


def _shards(
    sources: list[Source], shard_size: int, cut: bool, column: str | None, listed: _Listed
) -> Iterator[dict[str, Any]]:
    several = sum(source.kind not in ("tar", "parquet") for source in sources) > 1  # which may overlap
    for source in sources:
        if source.kind == "tar":
            yield from _tar_shards(source, shard_size, cut, listed.keys)
        elif source.kind == "parquet":
            yield from _parquet_shards(source, shard_size, column)
        else:
            yield from _file_shards(source, shard_size, listed, may_double=several or source.kind == "list")


def _file_shards(source: Source, shard_size: int, listed: _Listed, *, may_double: bool) -> Iterator[dict[str, Any]]:
    root = os.path.dirname(source.path) if source.kind == "list" else source.path
    shard = {"kind": "files", "root": root, "name": source.name}
    items = pictures(source, listed.listing)
    while group := list(itertools.islice(items, shard_size)):
        start = listed.items.position
        for item in group:
            listed.items.write(to_line(item))
            if may_double:
                listed.keys.add(key_of(source.name, item))
        count = {"count": len(group), **({"keyed": len(group)} if may_double else {})}
        yield {**shard, "offset": start, **count}


def _tar_shards(source: Source, shard_size: int, cut: bool, keys: Keys) -> Iterator[dict[str, Any]]:
    """The whole tar or, of a long one that lies here uncompressed, pieces."""
    size = _size(source.path)
    shard = {"kind": "tar", "path": source.path, "name": source.name, "bytes": size}
    if is_url(source.path) or not source.path.endswith(".tar") or not (cut or size > tars.CUT):
        yield {**shard, "count": None}
        return
    with open(source.path, "rb") as file:
        pieces = 0
        for piece in tars.cut(file, shard_size, is_picture):
            for name in piece.names:
                keys.add(f"{source.name}/{name.removeprefix('./')}")
            count = {"count": len(piece.names) if piece.whole else None, "keyed": len(piece.names)}
            yield {**shard, "start": piece.start, "stop": piece.stop, **count}
            pieces += 1
        if not pieces:  # none in it: a shard all the same, as it is of a tar that is not cut
            yield {**shard, "count": 0}


def _parquet_shards(source: Source, shard_size: int, column: str | None) -> Iterator[dict[str, Any]]:
    with open_parquet(source.path) as file:
        shard = {"kind": "parquet", "path": source.path, "name": source.name, "bytes": _size(source.path)}
        shard["column"] = picture_column(file.schema_arrow, column, source.path)
        for first, after, row, rows in row_groups(file, shard_size):
            yield {**shard, "row_groups": [first, after], "first_row": row, "count": rows}


def _size(path: str) -> int:
    if not is_url(path):
        return os.path.getsize(path)
    fs, inner = filesystem(path)
    with naming(path):
        return fs.size(inner)
