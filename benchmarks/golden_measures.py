"""pysodmetrics' published values beside what `evaluate` prints for the same three pairs.

git clone https://github.com/lartpang/PySODMetrics
python benchmarks/golden_measures.py PySODMetrics
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    for name, row in rows.items():
        print(f"{name:<6} published {row['published']:.16f}  ours {row['ours']:.16f}")
    save(
        "golden_measures",
        {"environment": environment("pysodmetrics"), "published with": version, "measures": rows},
    )


if __name__ == "__main__":
    main()
