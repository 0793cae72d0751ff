"""What lies where in the folder that an extraction fills. Without torch: reading features needs none.

job.json                  all that decides the numbers
plan/items.txt            the pictures, one a line; plan/shards.jsonl: one shard a line
cls_token/00000017.npy    rows of shard 17, one a picture; likewise the other outputs
keys/00000017.txt         what each row is of, one a line
shards/00000017.json      the marker, written last: the shard's rows exist if and only if it does
failed/00000017.json      why the shard could not be done
attempts/                 a file for each process at work on a shard: what stays behind tells of its death
log/                      seconds and machines: the only files that differ from run to run
index.json                when all is done: how many rows and rejects each shard has
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FORMAT = 1
ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files are bytes


class Folder:
    """Paths and small files of one extraction."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.job, self.index = self.path / "job.json", self.path / "index.json"
        self.plan, self.log, self.attempts = self.path / "plan", self.path / "log", self.path / "attempts"

    def rows(self, output: str, shard: int) -> Path:
        return self.path / output / f"{shard:08d}.npy"

    def keys(self, shard: int) -> Path:
        return self.path / "keys" / f"{shard:08d}.txt"

    def marker(self, shard: int) -> Path:
        return self.path / "shards" / f"{shard:08d}.json"

    def failure(self, shard: int) -> Path:
        return self.path / "failed" / f"{shard:08d}.json"

    def make(self, outputs: Iterable[str]) -> None:
        for name in (*outputs, "keys", "shards", "failed", "attempts", "log"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def read_job(self) -> dict[str, Any]:
        """Raises FileNotFoundError or ValueError if this is no folder of features."""
        if not self.job.is_file():
            raise FileNotFoundError(f"{self.path}: no job.json in it: this is no folder that `extract` wrote")
        job = read_json(self.job)
        if job.get("format") != FORMAT:
            raise ValueError(f"{self.job}: format {job.get('format')}, expected {FORMAT}: written by another release")
        return job

    def done(self) -> list[int]:
        """The shards that have their marker, ascending."""
        return numbered(self.path / "shards")

    def failures(self) -> dict[int, str]:
        """Shards that could not be done, with the reason."""
        failed = (i for i in numbered(self.path / "failed") if not self.marker(i).exists())
        return {i: read_json(self.failure(i))["reason"] for i in failed}

    @contextmanager
    def attempt(self, shard: int) -> Iterator[None]:
        """Leaves a file behind if the process dies within, and only then."""
        file = self.attempts / f"{shard:08d}.{os.getpid()}.{secrets.token_hex(4)}.{socket.gethostname()}"
        file.touch()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)

    def deaths(self) -> dict[int, list[Path]]:
        """For each shard, the files of processes that died at work on it."""
        found: dict[int, list[Path]] = {}
        for file in self.attempts.iterdir() if self.attempts.is_dir() else ():
            shard, pid, _, host = file.name.split(".", 3)
            if host != socket.gethostname() or not _alive(int(pid)):
                found.setdefault(int(shard), []).append(file)
        return found

    def sweep(self, shard: int) -> None:
        """Remove what a process that died at work on this shard left half written."""
        for file in self.path.glob(f"*/.{shard:08d}.*.tmp"):
            file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a process works on one shard at a time: this file is of an earlier one with its number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def numbered(folder: Path) -> list[int]:
    """The numbers that files of a folder are named by, ascending."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return sorted(int(entry.name[:8]) for entry in entries if re.fullmatch(r"\d{8}\.\w+", entry.name))
    return []


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, if it holds something else than a JSON object."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a JSON object")
    return content


def to_json(content: Any) -> bytes:
    """The same bytes for the same content."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def to_line(text: str) -> bytes:
    """A key or path as a line of a file: as it is, but for backslashes and ends of lines."""
    return text.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r").encode(**ENCODING) + b"\n"


def from_line(line: bytes) -> str:
    """The inverse of `to_line`."""
    text = line.decode(**ENCODING).removesuffix("\n")
    if "\\" not in text:
        return text
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), text)
