"""Run several of the scripts of examples/distributed, one after the other, in the processes that torchrun started here.

Starting Python and torch takes most of the time of a tiny run. Arguments: a JSON list of [port, script, arguments...];
each script's process group needs a free port of its own.
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
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's own store is for one process group
    for i, (port, script, *arguments) in enumerate(json.loads(sys.argv[1])):
        os.environ["MASTER_PORT"] = port
        sys.argv = [script, *arguments]
        if os.environ["RANK"] == "0":
            print(f"script {i}", flush=True)
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
