"""The pictures of a shard as bytes. A picture that can't be had for good is `Rejected`; other failures are OSErrors."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import IO, Any, NamedTuple, TypeVar

from . import tars
from .parquet import open_parquet
from .plan import Plan, key_of
from .sources import NotServed, filesystem, is_picture, is_url, naming

PAUSES = (0.5, 2.0)  # seconds between three tries
LARGEST = 1 << 30  # bytes of one picture's file
T = TypeVar("T")


class Rejected(Exception):
    """Why a picture has no features: its message is the reason that the marker keeps."""


class NotThere(Rejected):
    """A file that is not there or may not be read: where this holds for all, the fault is not the files'."""


class Item(NamedTuple):
    """One picture of a shard."""

    key: str
    read: Callable[[], bytes]
    """Its bytes. Raises Rejected, or OSError where reading failed three times."""


def read_items(plan: Plan, shard: dict[str, Any]) -> Iterator[Item]:
    """The pictures of a shard in the plan's order.

    Raises OSError if an archive can't be read, ValueError if it is not the one that was planned.
    """
    doubled, seen = set(shard.get("doubled", ())), set[str]()
    for i, item in enumerate(_items(plan, shard)):
        again = i in doubled or item.key in seen
        seen.add(item.key)
        yield _rejected(item.key, "its key is that of an earlier picture") if again else item


def _items(plan: Plan, shard: dict[str, Any]) -> Iterator[Item]:
    if shard["kind"] == "files":
        for item in plan.items(shard):
            yield Item(key_of(shard["name"], item), partial(read_file, shard["root"], item))
        return
    archive = _read_tar(shard) if shard["kind"] == "tar" else _read_parquet(shard)
    with naming(shard["path"], OSError, ValueError) if is_url(shard["path"]) else nullcontext():
        yield from archive


def read_file(root: str, name: str) -> bytes:
    """The bytes of a URL, or of a file in a folder that may lie behind one, tried three times.

    Raises Rejected if it is none, is gone, or is huge.
    """
    root, name = (name, "") if is_url(name) else (root, name)
    return retried(lambda: _read_url(root, name) if is_url(root) else _read_local(os.path.join(root, name)))


def retried(call: Callable[[], T]) -> T:
    """What a call returns that may fail now and then: tried three times."""
    for pause in PAUSES:
        try:
            return call()
        except OSError:
            time.sleep(pause)
    return call()


_NOT_THERE = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "may not be read",
    errno.EPERM: "may not be read",
}
_NO_FILE = {errno.EISDIR: "is a folder", errno.ELOOP: "links in a circle", errno.ENAMETOOLONG: "too long a name"}


def _read_local(path: str) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            link = os.path.islink(path)
            raise Rejected("a link to a folder that it lies in" if link else "a folder that can't be read")
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            raise Rejected("is no regular file")
        if status.st_size > LARGEST:
            raise Rejected(f"{status.st_size} bytes: more than {LARGEST}")
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise NotThere(_NOT_THERE[error.errno]) from error
        if error.errno in _NO_FILE:
            raise Rejected(_NO_FILE[error.errno]) from error
        raise
    except ValueError as error:  # a NUL in the name
        raise NotThere("no such file") from error


def _read_url(root: str, name: str) -> bytes:
    """Of a file in a folder by the folder's file system, where no part of its name means a scheme."""
    try:
        with naming(root, ValueError):
            fs, path = filesystem(root)
        with naming(_below(root, name)):
            return fs.cat_file(_below(path, name))
    except NotServed as error:
        raise NotThere(f"fsspec serves no such URL ({error.__cause__})") from error
    except FileNotFoundError as error:
        raise NotThere(_NOT_THERE[errno.ENOENT]) from error
    except PermissionError as error:
        raise NotThere(_NOT_THERE[errno.EACCES]) from error


def _below(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}" if name else root


def _open(shard: dict[str, Any]) -> IO[bytes]:
    """The archive of a shard, checked to be as long as it was when it was planned."""
    path = shard["path"]
    if is_url(path):
        fs, inner = filesystem(path)
        with naming(path):
            size, file = fs.size(inner), fs.open(inner, "rb")
    else:
        size, file = os.path.getsize(path), open(path, "rb")  # noqa: SIM115 - its caller closes it
    if size != shard["bytes"]:
        file.close()
        raise ValueError(f"{path}: has {size} bytes, and had {shard['bytes']} when it was planned: extract it anew")
    return file


def _read_tar(shard: dict[str, Any]) -> Iterator[Item]:
    """Members that are named as pictures, one by one. A damaged archive ends in a rejected item of its own name."""
    start, stop = shard.get("start", 0), shard.get("stop")
    with _open(shard) as file:
        file.seek(start)
        try:
            for member, tar in tars.members(file, "r|*"):
                if stop is not None and start + member.offset >= stop:
                    return
                if not is_picture(member.name):
                    continue
                key = f"{shard['name']}/{member.name.removeprefix('./')}"
                if not member.isreg():
                    yield _rejected(key, "is no regular file of the archive")
                elif member.size > LARGEST:
                    yield _rejected(key, f"{member.size} bytes: more than {LARGEST}")
                else:
                    content = tar.extractfile(member)
                    assert content is not None
                    data = content.read()
                    yield Item(key, lambda data=data: data)  # type: ignore[misc]
        except tars.DAMAGED as error:
            yield _rejected(shard["name"], f"not a whole tar file ({' '.join(str(error).split())})")


def _rejected(key: str, reason: str) -> Item:
    def read() -> bytes:
        raise Rejected(reason)

    return Item(key, read)


def _read_parquet(shard: dict[str, Any]) -> Iterator[Item]:
    root = os.path.dirname(shard["path"])
    _open(shard).close()
    with open_parquet(shard["path"]) as file:
        groups = list(range(*shard["row_groups"]))
        row = shard["first_row"]
        for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=[shard["column"]]):
            for value in batch.column(0):
                yield _parquet_item(f"{shard['name']}/{row}", value.as_py(), root)
                row += 1


def _parquet_item(key: str, value: Any, root: str) -> Item:
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if isinstance(value, bytes):
        return Item(key, lambda: value)
    if isinstance(value, str):
        return Item(key, lambda: read_file(root, value))
    return _rejected(key, "nothing in this row" if value is None else f"a {type(value).__name__}, not bytes or a path")
