"""Is everything there, and as it was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .folder import Folder
from .plan import Plan
from .remote import folder_at


def status(path: str | Path) -> dict[str, Any]:
    """How far a job is: shards, done, pictures (None if not known), rows, rejects, failed (number: reason), at_work."""
    folder = folder_at(path)
    job, done = folder.read_job(), folder.done()
    markers = list(folder.read_all([folder.marker(i) for i in done]))
    at_work = len(folder.names(folder.attempts)) - sum(map(len, folder.deaths().values()))
    return {
        "shards": job["plan"]["shards"],
        "done": len(done),
        "pictures": job["plan"]["pictures"],
        "left_out": job["plan"]["left_out"],
        "rows": sum(marker["rows"] for marker in markers),
        "rejects": sum(len(marker["rejects"]) for marker in markers),
        "failed": folder.failures(),
        "at_work": at_work,
    }


def verify(path: str | Path) -> Iterator[tuple[int, str]]:
    """(shard, fault) for all that is not as its marker says: every file is read and hashed."""
    folder = folder_at(path)
    job, plan = folder.read_job(), Plan(folder)
    for shard in folder.done():
        if shard >= len(plan):
            yield shard, f"has a marker, and the plan has {len(plan)} shards"
            continue
        marker = folder.read_json(folder.marker(shard))
        yield from ((shard, fault) for fault in _faults(folder, job, plan[shard]["count"], shard, marker))


def _faults(
    folder: Folder, job: dict[str, Any], planned: int | None, shard: int, marker: dict[str, Any]
) -> Iterator[str]:
    if marker["rows"] + len(marker["rejects"]) != marker["pictures"] or planned not in (None, marker["pictures"]):
        yield (
            f"{marker['rows']} rows and {len(marker['rejects'])} rejects of {marker['pictures']} pictures, "
            f"{planned} planned"
        )
    for name, summary in marker["files"].items():
        file = folder.path / name
        if not folder.has(file):
            yield f"{name} is gone"
        elif (size := folder.size(file)) != summary["bytes"]:
            yield f"{name} has {size} bytes, not {summary['bytes']}"
        elif _sha256(folder, file) != summary["sha256"]:
            yield f"{name} has changed: its SHA-256 is another than when it was written"
        elif file.suffix == ".npy" and None not in (shape := job["outputs"][file.parent.name]):
            expected, found = (marker["rows"], *shape), _shape(folder, file)
            if found != expected:
                yield f"{name} has shape {found}, expected {expected}"


def _sha256(folder: Folder, path: Path) -> str:
    sha = hashlib.sha256()
    with folder.open(path) as file:
        while data := file.read(1 << 20):
            sha.update(data)
    return sha.hexdigest()


def _shape(folder: Folder, path: Path) -> tuple[int, ...]:
    """By its header."""
    with folder.open(path) as file:
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_1_0(file)[0]
