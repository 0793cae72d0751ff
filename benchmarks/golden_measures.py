"""pysodmetrics' published values beside what `evaluate` prints for the same three pairs.

git clone https://github.com/lartpang/PySODMetrics
python benchmarks/golden_measures.py PySODMetrics
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import environment, save

OURS, THEIRS = (
    ("S", "wF", "meanE", "F", "MAE", "IoU"),
    ("Smeasure", "wFmeasure", "meanEm", "meanFm", "MAE", "sample_biiou"),
)
NAMES = dict(zip(OURS, THEIRS, strict=True))


def main() -> None:
    examples = Path(sys.argv[1]) / "examples"
    versions = json.loads((examples / "version_performance.json").read_text())
    version, published = [item for item in versions.items() if set(THEIRS) <= item[1].keys()][-1]
    data = examples / "test_data"
    command = [sys.executable, "-m", "dinov3_lite", "evaluate", str(data / "preds"), str(data / "masks"), "--json"]
    (found,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout).values()
    rows = {ours: {"published": published[theirs], "ours": found[ours]} for ours, theirs in NAMES.items()}
    result = {"environment": environment("pysodmetrics"), "published with": version, "measures": rows}
    save("golden_measures", result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Published and found values, as markdown."""
    names, rows = list(result["measures"]), result["measures"].values()
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for who, label in (("published", f"published with {result['published with']}"), ("ours", "`evaluate`")):
        lines.append(f"| {label} | {' | '.join(f'{row[who]:.12f}' for row in rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
