"""Files and bytes: stored tensors and runs of their elements, JSON, folders, files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
MAX_JSON_BYTES = 4 << 20  # of a config or an index; a real one has kilobytes, the 7B's index 60 of them


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


def few(names: Iterable[object], most: int = 5) -> str:
    """The first names in quotes, none longer than a line, and how many more there are."""
    quoted = [short(name) for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more


def short(value: object, width: int = 100) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"


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
        content = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a JSON object")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {short(key)} is there twice")
        result[key] = value
    return result


# ---- what a folder holds


def weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The weights in a folder: the first of `names` that is there, or the only file that a name with `*` matches.

    An index (*.index.json) stands for the shards that it lists. Nothing if there are none. Raises ValueError if there
    are several to choose from: shards with their index beside a single file, or several files that match.
    """
    if not folder.is_dir():
        return []
    for name in names:
        file = folder / name
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file}: a link to a file that is gone: download it again")
    for name in names:
        file, index = folder / name, folder / f"{name}.index.json"
        if "*" in name or not (file.is_file() or index.is_file()):
            continue
        if not index.is_file():
            return [file]
        shards = list(dict.fromkeys(read_index(index).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if file.is_file() and missing:  # transformers' own save leaves the index of an earlier one
            return [file]
        if file.is_file():
            raise ValueError(f"{folder}: holds {name} and, by {index.name}, {few(shards)}: remove one of the two")
        if missing:
            raise ValueError(f"{index}: shard {short(missing[0])} is missing from the folder: download it")
        return [folder / shard for shard in shards]
    wildcards = [name for name in names if "*" in name]
    found = sorted(p for p in folder.iterdir() if any(fnmatch(p.name, name) for name in wildcards) and p.is_file())
    if len(found) > 1:
        raise SeveralFiles(f"{folder}: holds {few([file.name for file in found])}: name the file that is meant")
    return found


class SeveralFiles(ValueError):
    """A folder of several files of weights, none of which has a name that says it is the one."""


def read_index(index: Path) -> dict[str, str]:
    """Which file of the folder each tensor is in, by an index of shards.

    Raises ValueError if it lists none, or a path that is not the name of a file beside it.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map in it: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index}: shard {short(name)} is not the name of a file in this folder")
    return weight_map


def check_index(files: Sequence[Path], stored: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError if the index of these shards says of a tensor that it is where it is not."""
    names = {file.name for file in files}
    for index in files[0].parent.glob("*.index.json"):
        said = read_index(index)
        for name, shard in said.items() if set(said.values()) == names else ():
            if name not in stored or stored[name].file.name != shard:
                where = f"it is in {stored[name].file.name}" if name in stored else "no shard has it"
                raise ValueError(f"{index}: puts tensor {short(name)} into {shard}, but {where}: download it again")


def license_files(folder: Path) -> list[Path]:
    """The licence files in a checkpoint's folder."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.upper().startswith(("LICENSE", "LICENCE")))


def read_license(folder: Path) -> str:
    """`dinov3-license` if a licence file says that it is Meta's, the file's name if it is another; else what the front
    matter of a README.md calls it, or nothing.
    """
    for file in license_files(folder):
        return "dinov3-license" if "DINOv3" in _start(file) else file.name
    front = re.match(r"---\n(.*?)\n---", _start(folder / "README.md"), re.DOTALL)
    said: dict[str, str] = (
        dict(re.findall(r"^(license|license_name): *['\"]?([\w.-]+)", front[1], re.MULTILINE)) if front else {}
    )
    name = said.get("license_name", said.get("license", ""))
    return "" if name in ("other", "unknown") else name


def _start(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(4096)


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
        for folder in {path.parent for path in self._temporary}:
            _flush_folder(folder)

    def discard(self) -> None:
        """Remove what has not got its name."""
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the system lets folders be opened: a rename may be lost otherwise."""
    if hasattr(os, "O_DIRECTORY"):
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
