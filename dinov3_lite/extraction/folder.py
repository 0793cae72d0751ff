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

import glob
import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

FORMAT = 1
ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files are bytes


class Folder:
    """Paths and small files of one extraction, on this machine; `remote.RemoteFolder` is one behind a URL."""

    look_every = 2.0
    """Seconds between two looks at how far others are."""
    plan_appears_whole = True
    """Whether of several processes that plan at once the first one's plan stays."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.job, self.index = self.path / "job.json", self.path / "index.json"
        self.plan, self.log, self.attempts = self.path / "plan", self.path / "log", self.path / "attempts"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def address(self) -> str:
        """Its absolute path, or its URL: the same from any working directory."""
        return os.path.abspath(self.path)

    # ---- names

    def rows(self, output: str, shard: int) -> Path:
        return self.path / output / f"{shard:08d}.npy"

    def keys(self, shard: int) -> Path:
        return self.path / "keys" / f"{shard:08d}.txt"

    def marker(self, shard: int) -> Path:
        return self.path / "shards" / f"{shard:08d}.json"

    def failure(self, shard: int) -> Path:
        return self.path / "failed" / f"{shard:08d}.json"

    # ---- reading and writing, each where the folder is

    def where(self, path: Path) -> str:
        """The name of one of its files, for people."""
        return str(path)

    def has(self, path: Path) -> bool:
        return path.is_file()

    def names(self, inside: Path) -> list[str]:
        """What the files in one of its folders are called."""
        with suppress(FileNotFoundError), os.scandir(inside) as entries:
            return [entry.name for entry in entries]
        return []

    def open(self, path: Path) -> IO[bytes]:
        """To read from."""
        return path.open("rb")

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def fetch(self, path: Path) -> None:
        """Bring a file to `path`, if it lies elsewhere."""

    def array(self, path: Path) -> Any:
        """The array of a .npy file, memory-mapped."""
        return np.load(path, mmap_mode="r")

    def read_all(self, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """JSON of many small files."""
        return map(self.read_json, paths)

    def put(self, path: Path, data: bytes) -> None:
        """Write a small file, whole or not at all. An OSError names it: that of a full disk does not by itself."""
        from .writer import write_whole

        try:
            write_whole(path, data)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error

    def remove(self, path: Path) -> None:
        """Remove a file; one that is not there is no error."""
        path.unlink(missing_ok=True)

    def hand_over(self, paths: Sequence[Path], *, keep: bool = False) -> None:
        """These files have been written in `path`: bring them to where the folder is, in this order."""

    # ---- what is in it

    def make(self, outputs: Iterable[str]) -> None:
        for name in (*outputs, "keys", "shards", "failed", "attempts", "log"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def read_json(self, path: Path) -> dict[str, Any]:
        """Raises ValueError, naming the file, if it holds something else than a JSON object."""
        with self.open(path) as file:
            return parse_json(file.read(), self.where(path))

    def read_job(self) -> dict[str, Any]:
        """Raises FileNotFoundError or ValueError if this is no folder of features."""
        if not self.has(self.job):
            raise FileNotFoundError(f"{self}: no job.json in it: this is no folder that `extract` wrote")
        job = self.read_json(self.job)
        if job.get("format") != FORMAT:
            raise ValueError(
                f"{self.where(self.job)}: format {job.get('format')}, expected {FORMAT}: written by another release"
            )
        return job

    def done(self) -> list[int]:
        """The shards that have their marker, ascending."""
        return self._numbered("shards")

    def failures(self) -> dict[int, str]:
        """Shards that could not be done, with the reason."""
        failed = [i for i in self._numbered("failed") if not self.has(self.marker(i))]
        return {i: self.read_json(self.failure(i))["reason"] for i in failed}

    def _numbered(self, name: str) -> list[int]:
        found = (re.fullmatch(r"(\d{8})\.\w+", file) for file in self.names(self.path / name))
        return sorted(int(match[1]) for match in found if match)

    @contextmanager
    def attempt(self, shard: int) -> Iterator[None]:
        """Leaves a file behind if the process dies within, and only then."""
        file = self.attempts / f"{shard:08d}.{os.getpid()}.{secrets.token_hex(4)}.{socket.gethostname()}"
        file.touch()
        self.hand_over([file])
        try:
            yield
        finally:
            self.remove(file)

    def deaths(self) -> dict[int, list[Path]]:
        """For each shard, the files of processes that died at work on it."""
        found: dict[int, list[Path]] = {}
        for name in self.names(self.attempts):
            if match := re.fullmatch(r"(\d{8})\.(\d+)\.[0-9a-f]+\.(.*)", name):
                shard, pid, host = match.groups()
                if host != socket.gethostname() or not _alive(int(pid)):
                    found.setdefault(int(shard), []).append(self.attempts / name)
        return found

    def new_plan(self) -> Path:
        """A folder to write a plan in, which then becomes `plan`."""
        return self.path / f".plan.{secrets.token_hex(4)}.{os.getpid()}.{socket.gethostname()}.tmp"

    def dead_plans(self) -> list[Path]:
        """Those that processes of this machine left half written."""
        host = glob.escape(socket.gethostname())
        return [left for left in self.path.glob(f".plan.*.{host}.tmp") if not _alive(int(left.name.split(".")[3]))]


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


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Raises ValueError if these bytes of the file `name` are something else than a JSON object."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: holds a {type(content).__name__}, expected a JSON object")
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
