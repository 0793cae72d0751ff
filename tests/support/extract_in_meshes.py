"""Several extractions one after the other in the processes that torchrun started: what became of each in each process.

Arguments: a JSON list of the keyword arguments of `extract`. `dies: RANK` ends that process in its second forward.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import dinov3_lite
from dinov3_lite.extraction.compute import Network

RANK = int(os.environ["RANK"])


def die_in_the_second_forward() -> None:
    forwards, run = [], Network.run

    def dying(self, images):
        forwards.append(images)
        if len(forwards) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, images)

    Network.run = dying


if __name__ == "__main__":
    for i, arguments in enumerate(json.loads(sys.argv[1])):
        if arguments.pop("dies", None) == RANK:
            die_in_the_second_forward()
        try:
            became = f"{len(dinov3_lite.extract(**arguments))} rows"
        except Exception as error:
            became = f"{type(error).__name__}: {error}"
        print(f"\nrank {RANK} job {i}: {became}", flush=True)
