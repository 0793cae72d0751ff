"""Which way of computing is fastest on this machine: measured once, kept in memory and on disk, and pinned if need be.

A question is a line of text, such as "product 768 to 2304, 201 rows, float32"; an answer names one of the ways that
`prepacked` and `attention_ways` offer. Answers lie in one small file a machine, in the user's cache folder
(XDG_CACHE_HOME, else ~/.cache): processor, threads, and the versions of torch, its libraries and ours make a machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .pages import give_back_heap
from .stopwatch import Calls, least_seconds

ROWS_AS_THEY_ARE = 32  # different numbers of rows, of patches and tokens, are planned for before they are rounded up
LEVEL = 0.98  # of the first way's time: what is not faster than that is level with it, and the first is taken
SWITCHES = (  # variables that change what the libraries do: a preloaded one replaces their allocator, or their parts
    "ATEN_CPU_CAPABILITY",
    "LD_PRELOAD",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)


class Answer(NamedTuple):
    """The way taken, and the milliseconds of every way that was measured, the sum over the sizes that count."""

    way: str
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        if not self.milliseconds:
            return f"{self.way} (not measured: pinned, or the only way)"
        own = self.milliseconds[self.way]
        others = sorted((time, way) for way, time in self.milliseconds.items() if way != self.way)
        told = [f"{way} {time:.3g} ms ({time / own:.2f} times)" for time, way in others]
        return f"{self.way} {own:.3g} ms; " + ", ".join(told)


class Choices:
    """The answers that one model runs by: those pinned, else those known of this machine, else measured now.

    An answer once given stays: neither another process nor a busy machine changes it later.
    """

    def __init__(self, pinned: Mapping[str, str] | None = None) -> None:
        self.pinned = {} if pinned is None else _checked(pinned)
        self.answers: dict[str, Answer] = {}
        self.rows = {int(question.split()[1]) for question in self.pinned if question.startswith("rows ")}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "answers": dict(self.answers), "rows": set(self.rows)}  # another thread may add to them

    def planned_rows(self, rows: int) -> int:
        """`rows`, or some more where many numbers of rows were seen already: of the same number always the same.

        oneDNN plans a product anew for each number of rows, and each thread keeps the plans of 1024 products, half a
        MiB each: hundreds of MiB where images come in every size. So but for the first few, which are choices like
        others, numbers are rounded up, to one of 16 between two powers of two. That may change the last bits.
        """
        question = f"rows {rows}"
        if question in self.answers:
            return rows
        with _LOCK:
            if rows in self.rows or len(self.rows) < ROWS_AS_THEY_ARE:
                self.rows.add(rows)
                self.answers[question] = Answer("as they are", {})
                return rows
        step = max(16, 1 << max(0, rows.bit_length() - 5))
        return -(-rows // step) * step

    def way(self, question: str, ways: list[str], prepare: Callable[[str], Calls]) -> str:
        """The way to take, of those named; `prepare` gives what is to be timed of each."""
        if question not in self.answers:
            with _LOCK:
                self.answers[question] = self._answer(question, ways, prepare)
        return self.answers[question].way

    def _answer(self, question: str, ways: list[str], prepare: Callable[[str], Calls]) -> Answer:
        if (pinned := self.pinned.get(question)) is not None:
            if pinned not in ways:
                raise ValueError(f"choices[{question!r}] is {pinned!r}: expected one of {', '.join(ways)}")
            return Answer(pinned, {})
        if len(ways) == 1:
            return Answer(ways[0], {})
        known = _known(_file(machine()))
        if question not in known or set(known[question].milliseconds) != set(ways):
            known[question] = _measured(ways, prepare)
            give_back_heap()  # of what was measured with: 115 MiB for a ViT-B and eight images
            _keep(_file(machine()), known)
        return known[question]


def _checked(pinned: Mapping[str, str]) -> Mapping[str, str]:
    """Raise ValueError for what no model's `choices` hold."""
    if not isinstance(pinned, Mapping):
        raise ValueError(f"choices is {pinned!r}: expected a dict of texts, as the `choices` of a prepared model are")
    for question, way in pinned.items():
        texts = isinstance(question, str) and isinstance(way, str)
        if not texts or (question.startswith("rows ") and not question[5:].isdecimal()):
            raise ValueError(
                f"choices has {way!r} for {question!r}: expected texts for texts, of rows a whole number, as the "
                "`choices` of a prepared model have; leave it out, and it is measured"
            )
    return pinned


def _measured(ways: list[str], prepare: Callable[[str], Calls]) -> Answer:
    """Each size counts alike: the way with the least mean of its times in units of the best time for that size."""
    seconds = least_seconds({way: prepare(way) for way in ways})
    best = [min(times) for times in zip(*seconds.values(), strict=True)]
    costs = {way: sum(t / b for t, b in zip(times, best, strict=True)) for way, times in seconds.items()}
    first, fastest = ways[0], min(costs, key=costs.__getitem__)
    way = fastest if costs[fastest] < LEVEL * costs[first] else first
    return Answer(way, {name: round(1e3 * sum(times), 4) for name, times in seconds.items()})


# ---- what is kept

_LOCK = threading.RLock()
_KNOWN: dict[Path, dict[str, Answer]] = {}


def machine() -> str:
    """All that answers depend on, beside the question."""
    switches = {name: os.environ.get(name, "") for name in SWITCHES}
    return json.dumps([_processor(), torch.get_num_threads(), torch.__version__, torch.__config__.show(), switches])


@cache
def _processor() -> str:
    """The processor's name, model and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    changing = ("processor", "cpu MHz", "core id", "apicid", "initial apicid", "bogomips", "BogoMIPS", "physical id")
    return "\n".join(line for line in lines if line.partition(":")[0].strip() not in changing)


def _folder() -> Path:
    """The user's cache folder; what is none, so that nothing is kept, of a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except RuntimeError:
        return Path(os.devnull)


def _file(machine: str) -> Path:
    return _folder() / "dinov3_lite" / f"choices-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _known(file: Path) -> dict[str, Answer]:
    """The answers known of a machine, read once; none where the file is not there or is damaged."""
    if file not in _KNOWN:
        _KNOWN[file] = _read(file)
    return _KNOWN[file]


def _read(file: Path) -> dict[str, Answer]:
    try:
        said = json.loads(file.read_text())
        return {
            str(question): Answer(str(way), {str(name): float(time) for name, time in milliseconds.items()})
            for question, (way, milliseconds) in said.items()
            if way in milliseconds
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(file: Path, known: Mapping[str, Answer]) -> None:
    """Write the answers and those that other processes wrote, as one file in place of the other; or let it be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_read(file), **known}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            new.write(text)
        os.replace(new.name, file)
    except OSError:
        pass
