"""The folder of an extraction in an object store. Without torch, as folder.py."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from .folder import Folder, parse_json
from .sources import filesystem, is_url, naming

# Whose PUT shows a file whole or not at all, and which show it to everybody as soon as it is there.
STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"}
TOGETHER = 256  # small files that are read at once


def folder_at(path: str | os.PathLike[str]) -> Folder:
    """The folder of this machine, or behind a URL, that a user names.

    Raises ValueError for a URL of something else than an object store.
    """
    name = os.fspath(path)
    if match := re.match(r"(?:file|local)://(/.*)", name):
        return Folder(match[1])
    return RemoteFolder(name) if is_url(name) else Folder(name)


class RemoteFolder(Folder):
    """Its paths are those of a scratch folder, where what is written grows and from where it is put into the store.

    Nothing is renamed there and nothing appended to: a PUT makes a file, whole or not at all, and that of the marker
    comes last. The scratch folder holds the files of one shard, and goes with the process.
    """

    look_every = 30.0
    plan_appears_whole = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connect()
        names = (protocol,) if isinstance(protocol := self.store.protocol, str) else protocol
        if not STORES.intersection(names):
            raise ValueError(
                f"{self.url}: {names[0]} is no object store, where a file appears whole or not at all: write to a "
                f"folder, or to one of {', '.join(sorted(STORES))}"
            )
        self.scratch = tempfile.TemporaryDirectory(prefix="dinov3-lite-", ignore_cleanup_errors=True)
        super().__init__(self.scratch.name)

    def _connect(self) -> None:
        # others write there too: what was listed a moment ago is no longer so
        self._store, self.root = filesystem(self.url, use_listings_cache=False, skip_instance_cache=True)
        self._process = os.getpid()

    @property
    def store(self) -> Any:
        """The file system of fsspec, whose connections a forked process may not use."""
        if os.getpid() != self._process:
            self._connect()
        return self._store

    def __reduce__(self) -> Any:
        return RemoteFolder, (self.url,)

    def __str__(self) -> str:
        return self.url

    @property
    def address(self) -> str:
        return self.url

    def where(self, path: Path) -> str:
        return f"{self.url}/{self._inside(path)}"

    def _inside(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _there(self, path: Path) -> str:
        return f"{self.root.rstrip('/')}/{self._inside(path)}"

    def has(self, path: Path) -> bool:
        with self._named(path):
            return self.store.isfile(self._there(path))

    def _named(self, path: Path) -> AbstractContextManager[None]:
        return naming(self.where(path))

    def names(self, inside: Path) -> list[str]:
        try:
            found = self.store.ls(self._there(inside), detail=False)
        except FileNotFoundError:
            return []
        return [PurePosixPath(path).name for path in found]

    def open(self, path: Path) -> IO[bytes]:
        return self.store.open(self._there(path), "rb")

    def size(self, path: Path) -> int:
        return self.store.size(self._there(path))

    def array(self, path: Path) -> Any:
        """Fetched whole, and mapped from a file without a name that goes with the array."""
        copy = self._get(path)
        try:
            return np.load(copy, mmap_mode="r")
        finally:
            copy.unlink()

    def fetch(self, path: Path) -> None:
        if not path.exists():
            self._get(path).rename(path)

    def _get(self, path: Path) -> Path:
        """A copy, under a name of its own beside `path`."""
        copy = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        with self._named(path):
            self.store.get_file(self._there(path), str(copy))
        return copy

    def read_all(self, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for i in range(0, len(paths), TOGETHER):
            some = paths[i : i + TOGETHER]
            found = self.store.cat([self._there(path) for path in some])
            yield from (parse_json(found[self._there(path)], self.where(path)) for path in some)

    def put(self, path: Path, data: bytes) -> None:
        with self._named(path):
            self.store.pipe_file(self._there(path), data)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if self.store.exists(self._there(path)):
            self.store.rm_file(self._there(path))

    def hand_over(self, paths: Sequence[Path], *, keep: bool = False) -> None:
        for path in paths:
            with self._named(path):
                self.store.put_file(str(path), self._there(path))
            if not keep:
                path.unlink()
