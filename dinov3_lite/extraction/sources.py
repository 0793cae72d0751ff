"""What an INPUT may be, and its pictures: listed one by one, in an order that depends on the input alone."""

from __future__ import annotations

import codecs
import errno
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

from ..extras import needed

# What a file in a folder, or in a tar, is taken for a picture by: the formats that Pillow reads and people keep.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
        *("jp2", "j2k", "avif", "tga", "ico"),
    )
)


@dataclass
class Listing:
    """What is found while listing: pictures go on as they come, the rest is counted."""

    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are not named as pictures: how many of each suffix."""
    skip: str = ""
    """A folder that is not looked into: the output may lie within the input."""


@dataclass(frozen=True)
class Source:
    """One input: pictures of their own, or an archive of them."""

    kind: str
    """"folder", "list", "pictures", "tar" or "parquet"."""
    path: str
    """Absolute path, or URL."""
    name: str
    """What its keys begin with: empty for the only folder or list."""
    members: tuple[str, ...] = ()
    """The pictures themselves, of kind "pictures"."""


def is_url(path: str) -> bool:
    """Whether it begins with a scheme and ://, or with caches before it: a file may well be called `a::b.jpg`."""
    return re.match(r"([a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://", path) is not None


def is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not PurePosixPath(name).name.startswith(".")


class NotServed(ValueError):
    """A URL of a scheme that fsspec does not know, or that needs to be told more than a URL."""


def filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """The file system of a URL, by fsspec, and the path in it.

    Raises NotServed for a scheme that can't be served, another ValueError where a package for it is missing.
    """
    with needed(f"{url}: opening URLs", "fsspec", "fsspec"):
        import fsspec

    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ValueError, TypeError) as error:
        raise NotServed(f"{url}: {error}") from error
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from error


_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}  # of HTTP


@contextmanager
def naming(url: str, *but: type[Exception]) -> Iterator[None]:
    """What goes wrong behind a URL is an OSError that names it: each store's library has errors of its own.

    but: errors that stay as they are.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        kinds = ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES))  # which may have no number
        number = next((number for kind, number in kinds if isinstance(error, kind)), getattr(error, "errno", None))
        number = number or _STATUS.get(getattr(error, "status", 0), errno.EIO)
        said = " ".join(str(error).split())
        words = getattr(error, "strerror", None) or (os.strerror(number) if said in ("", url) else said)
        raise OSError(number, words, url) from error


def find_sources(inputs: list[str]) -> list[Source]:
    """What each input is. Patterns (`data-*.tar`, `data-{000..099}.tar`, both also in URLs) are expanded.

    Raises FileNotFoundError for what is not there, ValueError for what can't be told apart and for what is given twice.
    """
    if not inputs:
        raise ValueError("no input: give a folder, a list of files, tar or parquet files, or URLs of them")
    paths = [path for text in inputs for path in _expand(text)]
    if doubled := [path for path, count in Counter(map(_absolute, paths)).items() if count > 1]:
        raise ValueError(f"{doubled[0]}: given twice: each picture may have one row")
    kinds = [(_kind(path), path) for path in paths]
    archives = [os.path.basename(path.rstrip("/")) for kind, path in kinds if kind in ("tar", "parquet")]
    others = {path.split("/")[0] for kind, path in kinds if kind not in ("tar", "parquet")}  # what keys begin with
    same_names = len(set(archives)) < len(archives) or not others.isdisjoint(archives)
    sources = []
    for kind, path in kinds:
        if kind in ("tar", "parquet"):
            name = path if same_names else os.path.basename(path)
        else:
            name = "" if len(kinds) == 1 else path.rstrip("/")
        if kind != "picture":
            sources.append(Source(kind, _absolute(path), name))
    if pictures := tuple(path for kind, path in kinds if kind == "picture"):
        sources.append(Source("pictures", "" if is_url(pictures[0]) else os.getcwd(), "", pictures))
    return sources


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _expand(text: str) -> list[str]:
    """The paths that a pattern stands for: itself if it is none, or if a file is called so."""
    if not is_url(text) and os.path.exists(text):
        return [text]
    paths = _expand_braces(text)
    if not any(c in text for c in "*?[") and len(paths) == 1:
        return paths
    found = [match for path in paths for match in (_matches(path) if any(c in path for c in "*?[") else [path])]
    if not found:
        raise FileNotFoundError(f"{text}: no file matches this pattern")
    return found


def _matches(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob.glob(pattern))
    fs, path = filesystem(pattern)
    with naming(pattern):
        return sorted(fs.unstrip_protocol(match) for match in fs.glob(path))


def _expand_braces(text: str) -> list[str]:
    """`a-{08..11}.tar` as webdataset writes it, and `{a,b}`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if not match:
        return [text]
    first, last, names = match.groups()
    parts = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)] if names is None else names.split(",")
    return [path for part in parts for path in _expand_braces(text[: match.start()] + part + text[match.end() :])]


def _kind(path: str) -> str:
    suffix = PurePosixPath(path.split("?")[0]).suffix.lower()
    if is_url(path):
        if suffix in _BY_SUFFIX:
            return _BY_SUFFIX[suffix]
        fs, inner = filesystem(path)
        with naming(path):
            if fs.isdir(inner):
                return "folder"
        raise FileNotFoundError(f"{path}: neither a folder there nor {_EXPECTED}")
    if os.path.isdir(path):
        return "folder"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if path.lower().endswith((".tar.gz", ".tar.bz2", ".tar.xz")):
        return "tar"
    raise ValueError(f"{path}: can't tell what this is: expected a folder or {_EXPECTED}")


_BY_SUFFIX = {".tar": "tar", ".tgz": "tar", ".parquet": "parquet", ".txt": "list", ".lst": "list"}
_BY_SUFFIX |= dict.fromkeys(SUFFIXES, "picture")
_EXPECTED = "a list (.txt), a .tar, a .parquet or a picture"


def pictures(source: Source, listing: Listing) -> Iterator[str]:
    """The pictures of a folder (relative to it, recursively, sorted), of a list (its lines) or as given.

    What may be unreadable is listed all the same: reading it is what finds out. A link to a folder that it lies in is
    listed in place of what is behind it.
    """
    if source.kind == "pictures":
        yield from source.members
    elif is_url(source.path):
        fs, path = filesystem(source.path)
        with naming(source.path):
            if source.kind == "list":
                with fs.open(path, "rb") as file:
                    yield from _lines(file)
            else:
                yield from _walk_url(fs, path, listing)
    elif source.kind == "list":
        with open(source.path, "rb") as file:
            yield from _lines(file)
    else:
        yield from _walk(source.path, "", (), listing)


def _lines(file: IO[bytes]) -> Iterator[str]:
    for i, line in enumerate(file):
        if i == 0:
            line = line.removeprefix(codecs.BOM_UTF8)  # which editors on Windows put there
        if text := line.rstrip(b"\r\n").decode("utf-8", "surrogateescape"):
            yield text


def _walk(root: str, inside: str, above: tuple[tuple[int, int], ...], listing: Listing) -> Iterator[str]:
    folder = os.path.join(root, inside)
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        if not inside:
            raise
        yield inside.rstrip("/")  # as an item, whose reading says why not
        return
    here = (*above, (status.st_dev, status.st_ino))
    for entry in found:
        path = inside + entry.name
        if entry.name.startswith("."):
            listing.left_out["hidden"] += 1
        elif entry.path == listing.skip:
            continue
        elif _is_folder(entry):
            if entry.is_symlink() and _identity(entry.path) in here:
                yield path
            else:
                yield from _walk(root, path + "/", here, listing)
        elif is_picture(entry.name):
            yield path
        else:
            listing.left_out[PurePosixPath(entry.name).suffix.lower() or "no suffix"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _walk_url(fs: Any, root: str, listing: Listing) -> Iterator[str]:
    root = root.rstrip("/")
    for folder, folders, files in fs.walk(root):
        folders.sort()  # in place: the walk goes on in this order
        for name in sorted(files):
            if is_picture(name):
                yield f"{folder}/{name}"[len(root) + 1 :]
            else:
                listing.left_out["hidden" if name.startswith(".") else PurePosixPath(name).suffix or "no suffix"] += 1
