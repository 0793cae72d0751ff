"""Is everything there, and as it was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .folder import Folder, read_json
from .plan import Plan


def status(path: str | Path) -> dict[str, Any]:
    """How far a job is: shards, done, pictures (None if not known), rows, rejects, failed (number: reason), at_work."""
    folder = Folder(path)
    job, done = folder.read_job(), folder.done()
    markers = [read_json(folder.marker(i)) for i in done]
    at_work = len(list(folder.attempts.iterdir())) - sum(map(len, folder.deaths().values()))
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
    folder = Folder(path)
    job, plan = folder.read_job(), Plan(folder.plan)
    for shard in folder.done():
        if shard >= len(plan):
            yield shard, f"has a marker, and the plan has {len(plan)} shards"
            continue
        marker = read_json(folder.marker(shard))
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
        if not file.is_file():
            yield f"{name} is gone"
        elif file.stat().st_size != summary["bytes"]:
            yield f"{name} has {file.stat().st_size} bytes, not {summary['bytes']}"
        elif _sha256(file) != summary["sha256"]:
            yield f"{name} has changed: its SHA-256 is another than when it was written"
        elif file.suffix == ".npy" and None not in (shape := job["outputs"][file.parent.name]):
            expected, found = (marker["rows"], *shape), np.load(file, mmap_mode="r").shape
            if found != expected:
                yield f"{name} has shape {found}, expected {expected}"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return (
            hashlib.file_digest(opened, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _by_hand(opened)
        )


def _by_hand(opened: Any) -> str:
    sha = hashlib.sha256()
    while data := opened.read(1 << 20):
        sha.update(data)
    return sha.hexdigest()
