"""PyTorch's .pth files: today's archives and the format before them, both opened by their index.

An archive is a zip file of uncompressed members: `NAME/data.pkl`, a pickle, and `NAME/data/KEY`, the bytes of a storage
that its tensors view. Before, the pickle came after three others, and the storages behind a list of their keys.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from mmap import mmap
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, NamedTuple

from torch import Tensor

from ..pages import mapped, view
from .pickles import OtherTensor, SavedTensor, read_pickle
from .spans import StoredTensor
from .words import not_whole

MAX_DEPTH = 16  # dictionaries within dictionaries; a training checkpoint has five or six
MAX_NAME = 1000  # characters of a tensor's name, its dictionaries' keys included
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # what the first pickle of the format before the archive holds
PROTOCOL = 1001
BIG_ENDIAN = "its numbers are big-endian: save it again on a little-endian machine"


class Refused(ValueError):
    """Why a file that may be whole is not read."""


class Place(NamedTuple):
    """Where the bytes of a storage lie in the file."""

    start: int
    nbytes: int


def open_pth(file: Path) -> list[StoredTensor]:
    """The tensors of a .pth file, those in nested dictionaries by their keys joined with dots; no data is read.

    Raises ValueError, in one sentence, if the file is damaged or holds anything but tensors and plain data, and OSError
    if it can't be read.
    """
    try:
        content, places = read_content(file)
        found = list(named_tensors(content))
    except UnpicklingError as error:
        raise ValueError(
            f"{file}: holds Python objects beyond tensors ({error}), which are not loaded since they could run code: "
            "save its state dict by itself"
        ) from error
    except Refused as error:
        raise ValueError(f"{file}: {error}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle or archive fails in many ways
        raise ValueError(f"{file}: {not_whole(file, 'PyTorch', error)}") from error
    if not found:
        raise ValueError(f"{file}: no tensors in it (it holds a {type(content).__name__}): expected a state dict")

    data = cache(partial(mapped, file))
    return [_stored(name, tensor, file, places, data) for name, tensor in found]


def _stored(
    name: str, tensor: SavedTensor | OtherTensor, file: Path, places: Mapping[str, Place], data: Callable[[], mmap]
) -> StoredTensor:
    if isinstance(tensor, OtherTensor):
        return StoredTensor.unreadable(name, file, f"is {tensor.kind}, expected a plain one")
    if problem := _problem(tensor, places):
        return StoredTensor.unreadable(name, file, problem)
    start = places[tensor.storage.key].start + tensor.start * tensor.dtype.itemsize

    def read(stored: StoredTensor) -> Tensor:
        flat = view(data(), tensor.dtype, start, tensor.end - tensor.start)
        return flat.as_strided(tensor.shape, tensor.stride)

    return StoredTensor(name, tensor.dtype, tensor.shape, read, file, start if tensor.is_contiguous else None)


def _problem(tensor: SavedTensor, places: Mapping[str, Place]) -> str:
    """Why the tensor's numbers can't be told from the file, or nothing: its bytes must be those of its own record."""
    storage = tensor.storage
    if storage.key not in places:
        return f"has no data: the archive lacks the record {storage.key!r}"
    if places[storage.key].nbytes != storage.nbytes:
        return f"lies in a record of {places[storage.key].nbytes} bytes, where its storage takes {storage.nbytes}"
    if tensor.end * tensor.dtype.itemsize > storage.nbytes:
        return f"of shape {tensor.shape} reaches beyond the {storage.nbytes} bytes of its record"
    if tensor.numel * tensor.dtype.itemsize > storage.nbytes:
        return f"of shape {tensor.shape} shows the {storage.nbytes} bytes of its record several times"
    return ""


def read_content(file: Path) -> tuple[Any, dict[str, Place]]:
    """What was saved, with SavedTensor in place of tensors, and where their storages lie, by their keys.

    Raises pickle.UnpicklingError that names what is neither tensors nor plain data; OSError if the file can't be read;
    anything else if it is damaged.
    """
    if not zipfile.is_zipfile(file):
        return _read_legacy(file)
    with zipfile.ZipFile(file) as archive, file.open("rb") as f:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two members of the archive have the same name")

        def member(name: str) -> bytes:  # checksums are left: torch can be told not to write them
            f.seek(record_offset(f, members[name]))
            return f.read(members[name].file_size)

        roots = [name[: -len("data.pkl")] for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused(f"an archive with {len(roots)} members called data.pkl, expected one: it is no checkpoint")
        (root,) = roots
        if f"{root}constants.pkl" in members:
            raise Refused("a TorchScript program: save the state dict of the model that it was made from")
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise Refused("its members are compressed, which torch.save never does: save it again")
        if f"{root}byteorder" in members and member(f"{root}byteorder") != b"little":
            raise Refused(BIG_ENDIAN)
        places = {
            name.removeprefix(f"{root}data/"): Place(record_offset(f, info), info.file_size)
            for name, info in members.items()
            if name.startswith(f"{root}data/")
        }
        if any(place.start + place.nbytes > file.stat().st_size for place in places.values()):
            raise ValueError("it ends within a tensor")
        content, _ = read_pickle(io.BytesIO(member(f"{root}data.pkl")))
        return content, places


def _read_legacy(file: Path) -> tuple[Any, dict[str, Place]]:
    """Pickles of a magic number, a protocol and the system, the content and its storages' keys; then the storages."""
    with file.open("rb") as f:
        if f.read(1) != b"\x80":
            raise ValueError("it begins like none of PyTorch's files")
        f.seek(0)
        stream = _Bounded(f, file.stat().st_size)
        if read_pickle(stream)[0] != MAGIC_NUMBER:
            raise ValueError("a pickle that torch.save did not write")
        if read_pickle(stream)[0] != PROTOCOL:
            raise Refused("a format of before 2018: save it again with a newer PyTorch")
        system, _ = read_pickle(stream)
        if not isinstance(system, dict) or not system.get("little_endian"):
            raise Refused(BIG_ENDIAN)
        content, storages = read_pickle(stream)
        keys, _ = read_pickle(stream)
        places = {}
        for key in keys:
            numel = int.from_bytes(f.read(8), "little")
            nbytes = numel * storages[key].dtype.itemsize
            places[key] = Place(f.tell(), nbytes)
            if f.tell() + nbytes > stream.size:
                raise ValueError("it ends within a tensor")
            f.seek(nbytes, os.SEEK_CUR)
        return content, places


class _Bounded:
    """A file that is asked for no more than it has: Python sets aside as much memory as it is asked for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.readline = file, size, file.readline

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.size - self.file.tell()))


def named_tensors(content: Any) -> Iterator[tuple[str, SavedTensor | OtherTensor]]:
    """The tensors in nested dictionaries, by their keys joined with dots; each dictionary once, in order.

    What stands under a key that is no text is no weight of a model. Raises Refused for nesting and names beyond
    what any checkpoint has.
    """
    seen: set[int] = set()

    def walk(prefix: str, content: Any, depth: int) -> Iterator[tuple[str, SavedTensor | OtherTensor]]:
        if not isinstance(content, Mapping) or id(content) in seen:
            return
        seen.add(id(content))
        if depth > MAX_DEPTH:
            raise Refused(f"dictionaries are nested more than {MAX_DEPTH} deep")
        for key, value in content.items():
            if not isinstance(key, str):
                continue
            name = f"{prefix}{key}" if len(prefix) + len(key) <= MAX_NAME else ""
            if not name:
                raise Refused(f"a name of {len(prefix) + len(key)} characters, which begins {(prefix + key)[:60]!r}")
            if isinstance(value, (SavedTensor, OtherTensor)):
                yield name, value
            elif isinstance(value, Mapping):
                yield from walk(f"{name}.", value, depth + 1)

    yield from walk("", content, 1)


def record_offset(f: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where an uncompressed member of an archive starts: after its local header of 30 bytes, name and extra field."""
    if info.header_offset < 0:  # seeking there is an OSError, which would be taken for a failing disk
        raise ValueError(f"its index puts {info.filename[:100]!r} before the file's first byte")
    f.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", f.read(4))
    return info.header_offset + 30 + name + extra
