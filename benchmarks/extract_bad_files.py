"""Bad files among the pictures: every one is a reject with its reason, and the others' rows stay the same bytes.

    python benchmarks/extract_bad_files.py [--pictures 4800] [--share 0.01]

A folder of pictures is extracted; then the same folder with a share of bad files in between, of every kind in turn:
damaged, of other formats, bombs, links to nowhere and in circles, pipes. The same bytes once more in tars, and then the
pictures by a list, of whose lines some come twice and some name files that are gone. A tiny model, in float32. Writes
benchmarks/results/extract_bad_files.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment, headline, save
from extract_kills import write_input

from dinov3_lite.extraction.engines import extract

DISTINCT = 60  # pictures; the others are links to them
OUTPUTS = ("cls_token", "patch_tokens")
SHARD = 512

# What is no file of bytes: what makes it.
NO_FILE: dict[str, Callable[[Path], object]] = {
    "a link to nowhere": lambda path: path.symlink_to(path.with_name("nowhere")),
    "links in a circle": lambda path: path.symlink_to(path),
    "a link to the folder it is in": lambda path: path.symlink_to(path.parent),
    "a pipe": lambda path: os.mkfifo(path),
}


def bad_bytes() -> dict[str, bytes]:
    """What the tests take for bad files."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))  # whose `pictures` is another
    from bad_pictures import BAD

    return {what: make() for what, (make, _) in BAD.items()}


def write_folder(root: Path, count: int, bad: int) -> dict[str, str]:
    """`in` has the pictures, `bad` the same and bad files among them; the kind of each bad one by its name."""
    good = sorted((root / "in").iterdir())
    kinds: dict[str, bytes | Callable[[Path], object]] = {**bad_bytes(), **NO_FILE}
    named, step = {}, count // bad
    for folder in ("clean", "bad"):
        (root / folder).mkdir()
        for i in range(count):
            os.link(good[i % len(good)], root / folder / f"{i:06d}.jpg")
    for k in range(bad):
        what = list(kinds)[k % len(kinds)]
        name = f"{k * step:06d} bad.jpg"
        made = kinds[what]
        if isinstance(made, bytes):
            (root / "bad" / name).write_bytes(made)
        else:
            made(root / "bad" / name)
        named[name] = what
    return named


def write_tars(root: Path, named: dict[str, str]) -> None:
    """What has bytes, in tars of a shard each: `clean-0.tar` and so on, and `bad-0.tar` with bad members in between."""
    for folder in ("clean", "bad"):
        files = sorted(f for f in (root / folder).iterdir() if named.get(f.name) not in NO_FILE)
        for i in range(0, len(files), SHARD):
            with tarfile.open(root / f"{folder}-{i // SHARD:02d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
                for file in files[i : i + SHARD]:
                    member = tarfile.TarInfo(file.name)  # links to one file would be stored as links
                    member.size = file.stat().st_size
                    with file.open("rb") as opened:
                        tar.addfile(member, opened)


def write_lists(root: Path, named: dict[str, str]) -> list[str]:
    """`clean.txt`, and `bad.txt` with a line in a hundred doubled, and one in a hundred gone; what is wrong there."""
    lines = sorted(f"clean/{file.name}" for file in (root / "clean").iterdir())
    (root / "clean.txt").write_text("\n".join(lines))
    mixed, wrong = [], []
    for i, line in enumerate(lines):
        mixed.append(line)
        if i % 100 == 50:
            wrong += [lines[i // 2], f"clean/gone {i}.jpg"]
            mixed += wrong[-2:]
    (root / "bad.txt").write_text("\n".join(mixed))
    return wrong


def compare(root: Path, inputs: tuple[Any, Any], name: str, expected: list[str]) -> dict[str, Any]:
    """Extract both inputs: the clean one has no rejects, the other those that are expected, and all rows are equal."""
    options = {"outputs": OUTPUTS, "store": "float32", "batch_size": 16, "shard_size": SHARD, "decode_threads": 2}
    clean, bad = (
        extract(given, root / "model", root / f"out-{name}-{i}", device="cpu", progress=False, **options)  # type: ignore[arg-type]
        for i, given in enumerate(inputs)
    )

    def last(keys: Any) -> list[str]:
        return [key.rsplit("/", 1)[-1] for key in keys]

    assert not clean.rejects and last(bad.keys) == last(clean.keys), f"{name}: rows are lost, doubled or moved"
    found = [reject["key"] for reject in bad.rejects]
    assert last(found) == last(expected), f"{name}: {set(found) ^ set(expected)}"
    for output in OUTPUTS:
        for one, two in zip(_rows(bad[output]), _rows(clean[output]), strict=True):
            assert np.array_equal(one, two), f"{name}: a row of {output} differs"
    return {"rows": len(bad), "rejects": bad.rejects}


def _rows(array: Any) -> Any:
    return (row for block in array.blocks() for row in block)


def measure(root: Path, count: int, bad: int) -> dict[str, Any]:
    write_input(root, DISTINCT, damaged=0)
    named = write_folder(root, count, bad)
    write_tars(root, named)
    wrong = write_lists(root, named)
    of_bytes = sorted(name for name, what in named.items() if what not in NO_FILE)
    runs = {
        "folder": compare(root, (root / "clean", root / "bad"), "folder", sorted(named)),
        "tars": compare(root, (f"{root}/clean-*.tar", f"{root}/bad-*.tar"), "tars", of_bytes),
        "list": compare(root, (root / "clean.txt", root / "bad.txt"), "list", wrong),
    }
    kinds: dict[str, Any] = {}
    for reject in runs["folder"]["rejects"]:
        kind = kinds.setdefault(named[reject["key"]], {"files": 0, "reason": reject["reason"]})
        kind["files"] += 1
        assert kind["reason"] == reject["reason"], "one kind, several reasons"
    for reason, files in sorted(Counter(r["reason"] for r in runs["list"]["rejects"]).items()):
        what = "a line that comes twice" if "key" in reason else "a line whose file is gone"
        kinds[what] = {"files": files, "reason": reason}
    return {
        "pictures": count,
        "bad": bad,
        "inputs": {name: {"rows": run["rows"], "rejects": len(run["rejects"])} for name, run in runs.items()},
        "kinds": kinds,
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| bad file | how many | reason in the marker |", "|---|---|---|"]
    for what, found in result["kinds"].items():
        lines.append(f"| {what} | {found['files']} | {found['reason']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=4800)
    parser.add_argument("--share", type=float, default=0.01, help="of bad files (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="print only, write no results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"environment": environment("pillow")}
        result |= measure(Path(folder), args.pictures, round(args.pictures * args.share))
    if not args.dry:
        save("extract_bad_files", result)
    print(headline(result), table(result), json.dumps(result["inputs"]), sep="\n\n")


if __name__ == "__main__":
    main()
