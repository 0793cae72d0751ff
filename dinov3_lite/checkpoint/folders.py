"""What a folder holds: the files of weights, the index of their shards, the licence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from .json_files import read_json
from .spans import StoredTensor
from .words import few, short


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
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or len(name) > 255:
            raise ValueError(f"{index}: shard {short(name)} is not the name of a file in this folder")
    return weight_map


def check_index(files: Sequence[Path], stored: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError if the index beside these shards lists a tensor in a shard that does not hold it."""
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
