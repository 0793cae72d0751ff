"""Tar files: their members one by one, as far as the archive is whole, and where a long one may be cut."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

CUT = 4 << 30  # bytes of a tar beyond which it is several shards

# What reading a damaged archive raises.
DAMAGED = (tarfile.TarError, EOFError, ValueError)


class _Header(tarfile.TarInfo):
    """Where tarfile takes a damaged header, or none, for the end of the archive, an error: pictures may be missing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined] # zeros: a proper end
                raise
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


def members(file: IO[bytes], mode: Any) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members from the position of `file` on. mode: tarfile's, "r|*" to read once from start to end.

    Raises one of DAMAGED where the archive ends before its end, or is none.
    """
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_Header) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined] # it would keep all of a billion
            yield member, tar


class Piece(NamedTuple):
    """A part of a tar: the members whose headers begin from byte `start` on, and before `stop`."""

    start: int
    stop: int | None
    """None: to the end of the archive."""
    names: list[str]
    """Of its pictures, if all is whole."""
    whole: bool
    """Whether its headers could be read to the end."""


def cut(file: IO[bytes], pictures: int, is_picture: Any) -> Iterator[Piece]:
    """An uncompressed tar in pieces of so many pictures. Reads headers alone, seeking from one to the next.

    Where a header is damaged, the last piece goes on to the end: reading it finds the damage.
    """
    start, names = 0, list[str]()
    try:
        for member, _ in members(file, "r:"):
            if not is_picture(member.name):
                continue
            if len(names) == pictures:
                yield Piece(start, member.offset, names, True)
                start, names = member.offset, []
            names.append(member.name)
    except DAMAGED:
        yield Piece(start, None, names, False)
        return
    if names:
        yield Piece(start, None, names, True)
