"""Run several of the scripts of examples/distributed, one after the other, in the processes that torchrun started here.

Starting Python and torch takes most of the time of a tiny run. Arguments: a JSON list of [script, arguments...].
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"

if __name__ == "__main__":
    sys.path.insert(0, str(EXAMPLES))
    for i, (script, *arguments) in enumerate(json.loads(sys.argv[1])):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(100 + i)  # under which the processes find each other
        sys.argv = [script, *arguments]
        if os.environ["RANK"] == "0":
            print(f"script {i}", flush=True)
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
