"""torchrun on this machine, with gloo."""

from __future__ import annotations

import subprocess
import sys


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
