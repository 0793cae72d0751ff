"""What commands tell people, and what becomes of their errors: for `dinov3_lite` and `convert` alike.

A command works first and tells of it afterwards. Nothing that is told can undo the work: not a stdout that is full,
closed or unable to encode a name, and no missing stderr. The exit status speaks of the work alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# Errors whose message is a sentence, ours or the system's; of others the type is told too.
SENTENCES = (OSError, ValueError, RuntimeError, ImportError, AssertionError)


def exit_status(name: str, work: Callable[[], int | None]) -> int:
    """Run a command's work: 0 (or the status that it returns), or 1 and its error as one line on stderr.

    name: what the line starts with. Ctrl-C gives 130; SIGTERM and SIGHUP end the process with 128 + their number, once
    temporary files are removed. `python -X dev` shows the traceback of an error. argparse.ArgumentError passes: only
    the parser knows the usage.
    """
    _occupy_closed_streams()
    try:
        with _ending_in_order(), _warnings_as_lines(name):
            return work() or 0
    except KeyboardInterrupt:
        complain(f"{name}: stopped by Ctrl-C")
        return 128 + signal.SIGINT
    except argparse.ArgumentError:
        raise
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        complain(f"{name}: {_sentence(error)}")
        return 1


def say(line: str) -> None:
    """Print a line to stdout, or don't where nobody can read it."""
    _print(line, sys.stdout)


def complain(line: str) -> None:
    """Print a line to stderr, or don't where nobody can read it."""
    _print(line, sys.stderr)


def progress(items: Iterable[Any] | None = None, *, total: int | None = None, unit: str, **options: Any) -> Any:
    """A bar of tqdm's over `items`, drawn on stderr where that is a terminal and there is more than one item.

    total: the number of items, where `items` has no length, or is None and the caller counts by `.update()`.
    """
    from tqdm import tqdm

    total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    watched = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(items, total=total, unit=unit, disable=not watched or total == 1, **options)


def flush() -> None:
    """Write out what was printed, now: at the interpreter's end a failure would change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                _silence(stream)


def _print(line: str, stream: TextIO | None) -> None:
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe, a closed file
        _silence(stream)


def _silence(stream: TextIO) -> None:
    """Let the stream's file be /dev/null, so that what its buffer still holds does not fail again."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _occupy_closed_streams() -> None:
    """Open /dev/null as those of stdin, stdout and stderr that are closed: the next file opened would get their number,
    and whatever a C library prints would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack, as Ctrl-C does, unless somebody handles or ignores them already."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    taken = []
    if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
        for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")):
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, leave)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _warnings_as_lines(name: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where: complain(f"{name}: warning: {_one_line(message)}")
        yield


def _sentence(error: Exception) -> str:
    message = _one_line(error)
    return message if message and isinstance(error, SENTENCES) else f"{type(error).__name__}: {message}"


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
