"""torchrun on this machine, with gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

THOROUGH = bool(os.environ.get("THOROUGH"))  # as `make test-thorough` says
OVER_FOUR = THOROUGH or (os.cpu_count() or 1) >= 4
FOUR = pytest.mark.skipif(
    not OVER_FOUR,
    reason="four processes want four cores: `make test-thorough` runs them on fewer",
)


def torchrun(processes: int, *words: object, restarts: int = 0, seconds: int = 170) -> subprocess.CompletedProcess[str]:
    """Run a script (and its arguments) in so many processes. After `seconds` they are ended, as by Ctrl-C."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += ["--max-restarts", restarts, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, command)], **pipes) as launcher:
        try:
            out, err = launcher.communicate(timeout=seconds)
        except BaseException:
            launcher.terminate()  # upon which it ends the processes, which a killed one would leave behind
            launcher.wait(60)
            raise
    return subprocess.CompletedProcess(command, launcher.returncode, out, err)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody uses."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
