"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

try:
    import fcntl
except ImportError:  # not POSIX: there, an open file can't be removed
    fcntl = None  # type: ignore[assignment]


RANDOM = "[0-9a-f]" * 8  # what stands in temporary names, as a pattern


class WholeFiles:
    """Files being written: temporary ones beside their final names, which they get together when all are whole."""

    def __init__(self) -> None:
        self._temporary: dict[Path, Path] = {}  # by final name, in the order of renaming
        self._obsolete: list[Path] = []
        self._nameless: dict[Path, int] = {}  # by temporary name, which they get once all are whole
        self._locks: list[int] = []

    @contextmanager
    def create(self, path: Path) -> Iterator[io.FileIO]:
        """A new file, open for reading and writing, that will be `path`: flushed to disk when the block ends. What is
        written is written whole, or an OSError that names `path` is raised.

        Where the system has files without a name, nothing is left of it if the process is killed. Elsewhere a temporary
        file is locked while its process lives, and what killed ones have left is removed.
        """
        _remove_leftovers(path)
        temporary = _beside(path, "tmp")
        descriptor = _without_name(path.parent)
        if descriptor is not None:
            self._nameless[temporary] = os.dup(descriptor)
            file = _WritesAll(descriptor, "r+", path)
        else:
            file = _WritesAll(temporary, "x+", path)
            while not (_lock(file.fileno(), wait=True) and temporary.exists()):  # it was taken for a leftover
                file.close()
                file = _WritesAll(temporary, "x+", path)
            if fcntl is not None:  # elsewhere an open file can't get another name
                self._locks.append(os.dup(file.fileno()))
        with file:
            self._temporary[path] = temporary
            try:
                yield file
            except Exception as error:
                if file.failure is None:
                    raise
                raise file.failure from error  # libraries say other things where a disk is full
            file.flush_to_disk()

    def adopt(self, temporary: Path, path: Path) -> None:
        """A file that a library has written under a name of its own, on the same disk, will be `path`."""
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary[path] = temporary

    def remove(self, path: Path) -> None:
        """A file that readers would take instead of what is written: it goes when the new ones get their names."""
        self._obsolete.append(path)

    def publish(self) -> None:
        """Give all their names, the last one last; if that fails, what was there before is put back.

        Of several files, the last is the one that readers need (a config, an index). The old files are put aside before
        any new one appears, the last one first, so that nobody reads a mixture of old and new.
        """
        if not self._temporary:
            return
        for temporary in list(self._nameless):
            descriptor = self._nameless.pop(temporary)
            self._locks.append(descriptor)
            _lock(descriptor, wait=True)
            # linkat follows the link to the open file, which link does not: it is called if a folder is given
            os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor, follow_symlinks=True)
        old = [*reversed(self._temporary), *self._obsolete]
        folders = sorted({path.parent for path in old})
        with _one_at_a_time(folders):
            if len(old) > 1:
                with _put_aside(old):
                    _flush(folders)
                    self._rename(folders)
            else:
                self._rename(folders)
            for path in old:  # and what a process has put aside that was killed right here
                for left in path.parent.glob(f".{glob.escape(path.name)}.{RANDOM}.old"):
                    with suppress(OSError):
                        left.unlink()

    def _rename(self, folders: Sequence[Path]) -> None:
        *most, last = self._temporary.items()
        for path, temporary in most:
            os.replace(temporary, path)
        if most:
            _flush(folders)
        path, temporary = last
        os.replace(temporary, path)
        _flush(folders)

    def discard(self) -> None:
        """Remove what has not got its name."""
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)
        for descriptor in (*self._locks, *self._nameless.values()):
            os.close(descriptor)
        self._locks, self._nameless = [], {}


class _WritesAll(io.FileIO):
    """An unbuffered file whose `write` writes all. Where a disk becomes full, the system writes a part and tells so by
    a number alone, which most libraries don't look at. Errors name the file by its final name.
    """

    def __init__(self, file: Path | int, mode: str, path: Path) -> None:
        super().__init__(file, mode)
        self.path = path
        self.failure: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        rest = whole = memoryview(data).cast("B")
        with self._remembering():
            while rest:
                rest = rest[super().write(rest) :]
        return len(whole)

    def flush_to_disk(self) -> None:
        with self._remembering():
            os.fsync(self.fileno())

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(self.path))
            raise self.failure from error


@contextmanager
def _put_aside(paths: Sequence[Path]) -> Iterator[None]:
    """Give the files that are there other names, in this order; if the block fails, back to how it was."""
    there = [path for path in paths if _is_file(path)]
    aside: dict[Path, Path] = {}
    try:
        for path in there:
            aside[path] = _beside(path, "old")
            os.rename(path, aside[path])
        yield
    except BaseException:
        moved = {path: other for path, other in aside.items() if _is_file(other)}
        for path in paths:  # in the same order: what readers need goes first
            if _is_file(path) and (path in moved or path not in there):
                path.unlink()
        for path, other in reversed(moved.items()):
            os.rename(other, path)
        raise


def _without_name(folder: Path) -> int | None:
    """A new open file that has no name yet, where the system and the folder's disk have such files (Linux's do)."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return None
        raise


def _is_file(path: Path) -> bool:
    """Also a link to one that is gone."""
    return path.is_file() or path.is_symlink()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.{suffix}")


def _remove_leftovers(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.{RANDOM}.tmp"):
        remove_leftover(left)


def remove_leftover(temporary: Path) -> None:
    """Remove a temporary file, unless the process that writes it lives: that holds a lock on it."""
    with suppress(OSError):  # gone by now, or, where open files can't be removed, still being written
        if fcntl is None:
            temporary.unlink()
            return
        with temporary.open("rb") as file:
            if _lock(file.fileno(), wait=False):
                temporary.unlink()


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether an open file or folder is locked until it is closed: always, if there are no locks or we may wait."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return wait
    return True


@contextmanager
def _one_at_a_time(folders: Sequence[Path]) -> Iterator[None]:
    """Nobody else gives files of these folders their names meanwhile."""
    descriptors = []
    try:
        for folder in folders if hasattr(os, "O_DIRECTORY") else ():
            descriptors.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
            _lock(descriptors[-1], wait=True)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _flush(folders: Sequence[Path]) -> None:
    """Have renames in the folders on the disk, where the system lets folders be opened."""
    for folder in folders if hasattr(os, "O_DIRECTORY") else ():
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def whole_files() -> Iterator[WholeFiles]:
    """Write files that all appear when the block ends, or, if it raises, none: what was there before stays.

    with whole_files() as out, out.create(path) as file:
        file.write(data)
    """
    out = WholeFiles()
    try:
        yield out
        out.publish()
    finally:
        out.discard()
