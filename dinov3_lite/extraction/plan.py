"""The frozen listing of the input, cut into shards. Written once and streamed: it is never held as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .folder import from_line, to_json, to_line
from .parquet import open_parquet, picture_column, row_groups
from .sources import Listing, Source, filesystem, is_url, pictures

ITEMS, SHARDS = "items.txt", "shards.jsonl"


class Plan:
    """The shards of a plan: `plan[i]` says what shard i is to read, `plan.count(i)` of how many pictures, if known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / SHARDS
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


def write_plan(folder: Path, sources: list[Source], shard_size: int, column: str | None, job: dict[str, Any]) -> None:
    """Write the plan and, in it, the job that it is of, completed by a summary of the plan.

    The folder appears when it is whole: of several processes that plan at once, the first one wins.
    """
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        summary = _write(temporary, sources, shard_size, column)
        with (temporary / "job.json").open("wb") as file:
            file.write(to_json({**job, "plan": summary}))
            os.fsync(file.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, sources: list[Source], shard_size: int, column: str | None) -> dict[str, Any]:
    listing, sha = Listing(skip=os.path.abspath(folder.parent)), hashlib.sha256()
    shards, total, known = 0, 0, True
    with (folder / ITEMS).open("wb") as items, (folder / SHARDS).open("wb") as lines:
        written = _Hashed(items, sha)
        for shard in _shards(sources, shard_size, column, listing, written):
            line = json.dumps(shard, sort_keys=True).encode() + b"\n"
            sha.update(line)
            lines.write(line)
            shards += 1
            known = known and shard["count"] is not None
            total += shard["count"] or 0
        for file in (items, lines):
            file.flush()
            os.fsync(file.fileno())
    if not shards:
        left = ", ".join(f"{count} {suffix}" for suffix, count in sorted(listing.left_out.items())) or "nothing"
        raise ValueError(f"{', '.join(source.path for source in sources)}: no pictures there (but {left})")
    return {
        "shards": shards,
        "pictures": total if known else None,
        "left_out": dict(sorted(listing.left_out.items())),
        "sha256": sha.hexdigest(),
    }


class _Hashed:
    """A file to write to, hashed as it is written."""

    def __init__(self, file: IO[bytes], sha: Any) -> None:
        self.file, self.sha, self.position = file, sha, 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha.update(data)
        self.position += len(data)


def _shards(
    sources: list[Source], shard_size: int, column: str | None, listing: Listing, items: _Hashed
) -> Iterator[dict[str, Any]]:
    for source in sources:
        if source.kind == "tar":
            yield {"kind": "tar", "path": source.path, "name": source.name, "bytes": _size(source.path), "count": None}
        elif source.kind == "parquet":
            yield from _parquet_shards(source, shard_size, column)
        else:
            yield from _file_shards(source, shard_size, listing, items)


def _file_shards(source: Source, shard_size: int, listing: Listing, items: _Hashed) -> Iterator[dict[str, Any]]:
    root = os.path.dirname(source.path) if source.kind == "list" else source.path
    shard = {"kind": "files", "root": root, "name": source.name}
    start, count = items.position, 0
    for item in pictures(source, listing):
        items.write(to_line(item))
        count += 1
        if count == shard_size:
            yield {**shard, "offset": start, "count": count}
            start, count = items.position, 0
    if count:
        yield {**shard, "offset": start, "count": count}


def _parquet_shards(source: Source, shard_size: int, column: str | None) -> Iterator[dict[str, Any]]:
    with open_parquet(source.path) as file:
        shard = {"kind": "parquet", "path": source.path, "name": source.name, "bytes": _size(source.path)}
        shard["column"] = picture_column(file.schema_arrow, column, source.path)
        for first, after, row, rows in row_groups(file, shard_size):
            yield {**shard, "row_groups": [first, after], "first_row": row, "count": rows}


def _size(path: str) -> int | None:
    if not is_url(path):
        return os.path.getsize(path)
    fs, inner = filesystem(path)
    return fs.size(inner)
