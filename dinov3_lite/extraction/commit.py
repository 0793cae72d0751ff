"""The files of one shard while they grow: rows, keys and rejects of picture after picture, and the marker of them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import WholeFiles, remove_leftover
from .folder import Folder, to_json, to_line
from .pipeline import Batch, ReadFailed
from .writer import Hashed, Rows

GRID = "grid"  # a further output where pictures keep their own sizes: rows and columns of patches
FEW = 10  # rejects of a shard that a percentage always allows


class ShardFailed(Exception):
    """Why a shard can't be done: something is wrong with more than single pictures."""


class ShardFiles:
    """Temporary files until `publish`. Use as a context manager: they are gone at its end unless published."""

    def __init__(self, folder: Folder, job: dict[str, Any], shard: int, planned: int | None) -> None:
        """planned: how many pictures the plan has for the shard, if it knows."""
        self.folder, self.job, self.shard, self.planned = folder, job, shard, planned
        self.pictures = self.kept = self.missing = 0
        self.rejects: list[dict[str, Any]] = []
        self._files, self._open = WholeFiles(), ExitStack()
        self._rows: dict[str, Rows] = {}

    def _create(self, path: Path) -> Any:
        return self._open.enter_context(self._files.create(path))

    def __enter__(self) -> ShardFiles:
        try:
            self._keys = Hashed(self._create(self.folder.keys(self.shard)))
            for name, shape in self.job["outputs"].items():
                # of pictures of several sizes: the patches of all, one after the other
                row = tuple(n for n in shape if n is not None)
                dtype = np.int32 if name == GRID else self.job["store"]
                expected = 0 if None in shape else self.planned or 0
                file = self._create(self.folder.rows(name, self.shard))
                self._rows[name] = Rows(file, row, dtype, expected, ragged=None in shape)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)
        self._files.discard()

    def append(self, batch: Batch, features: dict[str, Sequence[np.ndarray]]) -> None:
        """features: for each output as many rows as the batch has pictures; those of rejected ones don't count."""
        for i, (key, outcome) in enumerate(zip(batch.keys, batch.outcomes, strict=True)):
            if outcome.reason is None and not all(np.isfinite(rows[i]).all() for rows in features.values()):
                outcome.reason = "features that are not finite, or beyond what they are stored in"
            if outcome.reason is not None:
                self.rejects.append({"key": key, "picture": self.pictures + i, "reason": outcome.reason})
                self.missing += not outcome.there
        good = [i for i, outcome in enumerate(batch.outcomes) if outcome.reason is None]
        for name, rows in features.items():
            self._rows[name].append([rows[i] for i in good] if len(good) < len(batch.keys) else rows)
        self._keys.write(b"".join(to_line(batch.keys[i]) for i in good))
        self.pictures += len(batch.keys)
        self.kept += len(good)

    def check(self, max_rejects: str, again: Collection[int] = ()) -> None:
        """Raises ShardFailed if more pictures than this ("N", or "P%" of the shard) are rejected, or none is there.

        again: pictures that don't count, as they are files that the plan has before.
        """
        rejects = [reject for reject in self.rejects if reject["picture"] not in again]
        count, pictures = len(rejects), self.pictures - len(again)
        if self.planned is not None and self.pictures != self.planned:
            raise ReadFailed(f"{self.pictures} pictures were read, and {self.planned} are planned")
        if pictures and self.missing == pictures:
            raise ShardFailed(f"none of {count} pictures can be read ({rejects[0]['reason']}): is it mounted?")
        number = float(max_rejects.rstrip("%"))
        most = max(number * pictures / 100, FEW) if max_rejects.endswith("%") else number
        if count > most:
            first = rejects[0]
            raise ShardFailed(
                f"{count} of {pictures} pictures were rejected, more than {max_rejects}: "
                f"the first, {first['key']!r}: {first['reason']}"
            )

    def publish(self) -> dict[str, Any]:
        """Finish the files, write the marker, and give all their names, the marker's last; the marker."""
        for rows in self._rows.values():
            rows.close()
        files = {self.folder.rows(name, self.shard): rows for name, rows in self._rows.items()}
        summaries = {self.folder.keys(self.shard): self._keys, **files}
        marker = {
            "shard": self.shard,
            "pictures": self.pictures,
            "rows": self.kept,
            "rejects": self.rejects,
            "files": {f"{path.parent.name}/{path.name}": file.summary() for path, file in summaries.items()},
        }
        Hashed(self._create(path := self.folder.marker(self.shard))).write(to_json(marker))
        self._open.close()  # and so flush each of them to disk
        self._files.publish()
        self.folder.hand_over([*summaries, path])
        return marker


def complete(folder: Folder, total: int) -> None:
    """Once all markers are there: write the index, which spares a reader all of them, and sweep."""
    if folder.has(folder.index) or len(folder.done()) < total:
        return
    index: dict[str, list[int]] = {"rows": [], "rejects": []}
    for marker in folder.read_all([folder.marker(i) for i in range(total)]):
        index["rows"].append(marker["rows"])
        index["rejects"].append(len(marker["rejects"]))
    folder.put(folder.index, to_json(index))
    # what processes left that died between a marker and their end, or at a shard that others did
    for place in (folder.attempts, folder.path / "failed"):
        for name in folder.names(place):
            folder.remove(place / name)
    for left in [*folder.path.glob("*/.*.tmp"), *folder.path.glob(".*.json.*.tmp")]:
        remove_leftover(left)
    for left in folder.dead_plans():
        shutil.rmtree(left, ignore_errors=True)
