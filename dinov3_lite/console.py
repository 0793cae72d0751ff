"""What commands tell people, and what becomes of their errors: for `dinov3_lite` and `convert` alike.

A command works first and tells of it afterwards. Nothing that is told can undo the work: not a stdout that is full,
closed or unable to encode a name, and no missing stderr. The exit status speaks of the work alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

# Errors whose message is a sentence, ours or the system's; of others the type is told too.
SENTENCES = (OSError, ValueError, RuntimeError, ImportError, AssertionError)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps each line of a description to the terminal's width, but for those that begin with spaces: the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines())


def called_as(script: str, module: str) -> str:
    """How the running command was called, for its usage: by its installed script, or by `python -m`."""
    return script if Path(sys.argv[0]).stem == script else f"python -m {module}"


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
        complain(f"{name}: {sentence(error)}")
        return 1


def sentence(error: Exception) -> str:
    """What an error says, in one line: first the file that it names, or its type where that may be no sentence."""
    message = _one_line(error)
    if isinstance(error, OSError) and error.filename is not None and error.filename2 is None:
        message = _one_line(f"{error.filename}: {error.strerror}")
    return message if message and isinstance(error, SENTENCES) else f"{type(error).__name__}: {message}"


def say(line: str) -> None:
    """Print a line to stdout, or don't where nobody can read it."""
    _print(line, sys.stdout)


def complain(line: str) -> None:
    """Print a line to stderr, or don't where nobody can read it."""
    _print(line, sys.stderr)


def progress(
    items: Iterable[Any] | None = None, *, unit: str, total: int | None = None, shown: bool = True, **options: Any
) -> Any:
    """A bar of tqdm's over `items`, drawn on stderr where that is a terminal and there is more than one item.

    unit: what is counted, behind a space, as in " photos"; "B" for bytes. total: the number of items, where `items` has
    no length, or is None and the caller counts by `.update()`. shown: False for a caller who wants none.
    """
    from tqdm import tqdm

    total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    watched = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(items, total=total, unit=unit, disable=not (shown and watched) or total == 1, **options)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors while `file` is written name it: libraries say that a disk is full, but not where."""
    try:
        yield
    except (ValueError, ImportError):  # these don't come from writing
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None)  # an error of the system has one
        if not reason and str(file) in str(error):
            raise
        raise OSError(f"{file}: can't be written: {reason or sentence(error)}") from error


def flush() -> None:
    """Write out what was printed, now: at the interpreter's end a failure would change the exit status.

    A stream that can't be written becomes /dev/null, so that what its buffer still holds does not fail again.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):  # a full disk, a closed pipe; a closed file
                with suppress(OSError, ValueError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, stream.fileno())
                    os.close(null)


def _print(line: str, stream: TextIO | None) -> None:
    if stream is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with suppress(OSError, ValueError):
            print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


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


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
