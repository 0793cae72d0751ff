"""Files and bytes: stored tensors and runs of their elements, JSON, folders, files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
MAX_JSON_BYTES = 64 << 20  # of a config or an index; a real one has kilobytes


class StoredTensor(NamedTuple):
    """A tensor of a file, or one in memory: what is known without its data, and the data on `read()`."""

    name: str
    dtype: torch.dtype
    shape: Shape
    read: Callable[[], Tensor]
    """Memory-mapped where the file allows it."""
    file: Path
    offset: int | None = None
    """Where in `file` its bytes start, in order and without gaps; None if they are not there as such."""
    problem: str = ""
    """Why it can't be read, as in "is sparse, expected a plain one"; mostly empty."""

    @classmethod
    def in_memory(cls, name: str, tensor: Tensor, file: Path | None = None) -> StoredTensor:
        """A tensor that no file holds as it is; `file`: whose tensors it was made of."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor, file or Path())

    @classmethod
    def unreadable(cls, name: str, file: Path, problem: str) -> StoredTensor:
        """A tensor that has a name and can't be read: `read()` raises ValueError that says why."""

        def read() -> Tensor:
            raise ValueError(f"{file}: tensor {name!r} {problem}")

        return cls(name, torch.uint8, (), read, file, problem=problem)

    def span(self) -> Span:
        """All its elements."""
        count = 1
        for side in self.shape:
            count *= side
        return Span(self, 0, count)


class Span(NamedTuple):
    """Elements start to stop of a stored tensor, in memory order."""

    stored: StoredTensor
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Span:
        """Some of its elements."""
        return Span(self.stored, self.start + start, self.start + stop)

    def read(self) -> Tensor:
        """The elements, (stop - start,), without a copy: the mapping keeps what was touched of the file in memory."""
        return self.stored.read().reshape(-1)[self.start : self.stop]

    def load(self) -> Tensor:
        """The elements, (stop - start,), read into memory of their own, which is freed with the tensor."""
        return self._load([(self.start, self.stop)])

    def sample(self) -> Tensor:
        """64 elements at each of five places, read into memory of their own."""
        quarters = (self.size * quarter // 4 for quarter in range(4))
        starts = [self.start + offset for offset in (*quarters, max(0, self.size - 64))]
        return self._load([(start, min(start + 64, self.stop)) for start in starts])

    def _load(self, ranges: Sequence[tuple[int, int]]) -> Tensor:
        stored = self.stored
        if stored.offset is None or not self.size:
            flat = stored.read().reshape(-1)
            return flat[slice(*ranges[0])] if len(ranges) == 1 else torch.cat([flat[a:b] for a, b in ranges])
        itemsize = stored.dtype.itemsize
        data = bytearray(sum(stop - start for start, stop in ranges) * itemsize)
        rest = memoryview(data)
        with stored.file.open("rb", buffering=0) as file:
            for start, stop in ranges:
                size = (stop - start) * itemsize
                file.seek(stored.offset + start * itemsize)
                read_into(file, rest[:size])
                rest = rest[size:]
        return torch.frombuffer(data, dtype=stored.dtype)


def cut(spans: Iterable[Span], sizes: Sequence[int]) -> list[list[Span]]:
    """The spans, laid one after the other, cut into runs of `sizes` elements."""
    runs = []
    queue = list(spans)
    for size in sizes:
        run: list[Span] = []
        while size:
            span = queue.pop(0)
            taken = min(size, span.size)
            run.append(span.part(0, taken))
            if taken < span.size:
                queue.insert(0, span.part(taken, span.size))
            size -= taken
        runs.append(run)
    return runs


def read_into(file: Any, buffer: memoryview) -> None:
    """Fill the buffer from an unbuffered file. Raises OSError if it ends before."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise OSError(f"{file.name}: ended early: was it changed meanwhile?")
        buffer = buffer[count:]


def not_whole(file: Path, kind: str, error: Exception) -> str:
    """What is wrong with a file that can't be read as one of that kind, and what to do."""
    with file.open("rb") as f:
        if f.read(32).startswith(b"version https://git-lfs"):
            return "a git-lfs pointer, not the weights: download it again"
    return f"not a whole {kind} file ({' '.join(str(error).split())[:200]}): download it again"


# ---- JSON


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError if the file holds anything else, or far more than a config or an index does."""
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{file}: {size} bytes, expected a JSON file of at most {MAX_JSON_BYTES}: download it again")
    try:
        return parse_json_object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}: download it again") from error


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """The object that the text spells. Raises ValueError if it is anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a JSON object")
    return content


# ---- what a folder holds


def weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The weights in a folder: the first of `names` that is there, or the only file that a name with `*` matches.

    An index (*.index.json) stands for the shards that it lists. Nothing if there are none, or several with `*`.
    """
    if not folder.is_dir():
        return []
    for name in names:
        file = folder / name
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file}: a link to a file that is gone: download it again")
        if "*" not in name and file.is_file():
            return _shards(file) if name.endswith(".index.json") else [file]
    wildcards = [name for name in names if "*" in name]
    found = sorted(p for p in folder.iterdir() if any(fnmatch(p.name, name) for name in wildcards) and p.is_file())
    return found if len(found) == 1 else []


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map in it: download it again")
    folder = index.parent.resolve()
    # the hub's cache keeps the files of a snapshot as links into the repository's own folder
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index}: shard {name!r} is not the name of a file in this folder")
        shard = index.parent / name
        if not shard.is_file():
            raise ValueError(f"{index}: shard {name!r} is missing from the folder: download it")
        if not shard.resolve().is_relative_to(home):
            raise ValueError(f"{index}: shard {name!r} is a link out of the folder: put the file itself there")
    return [index.parent / name for name in dict.fromkeys(weight_map.values())]


def license_files(folder: Path) -> list[Path]:
    """The licence files in a checkpoint's folder."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.upper().startswith(("LICENSE", "LICENCE")))


def read_license(folder: Path) -> str:
    """`dinov3-license` if a licence file says that it is Meta's, the file's name if it is another, or nothing."""
    for file in license_files(folder):
        return "dinov3-license" if "DINOv3" in file.read_text(encoding="utf-8", errors="replace")[:4096] else file.name
    return ""


# ---- whole or not at all


class WholeFiles:
    """Files being written: temporary ones beside their final names, which they get together when all are whole."""

    def __init__(self) -> None:
        self._temporary: dict[Path, Path] = {}  # by final name, in the order of renaming

    @contextmanager
    def create(self, path: Path) -> Iterator[IO[bytes]]:
        """A new file, open for reading and writing, that will be `path`: flushed to disk when the block ends."""
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
        with temporary.open("x+b", buffering=0) as file:
            self._temporary[path] = temporary
            yield file
            os.fsync(file.fileno())

    def adopt(self, temporary: Path, path: Path) -> None:
        """A file that a library has written under a name of its own, on the same disk, will be `path`."""
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary[path] = temporary

    def publish(self) -> None:
        """Rename all, the last one last: it is gone meanwhile, so that nobody reads a mixture of old and new."""
        if len(self._temporary) > 1:
            list(self._temporary)[-1].unlink(missing_ok=True)
        for path, temporary in self._temporary.items():
            os.replace(temporary, path)

    def discard(self) -> None:
        """Remove what has not got its name."""
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)


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
