"""Run the parity tests and print what they measured: the worst relative error over all hidden states, both libraries.

    python benchmarks/parity.py

Truth is float64. Writes benchmarks/results/parity.json, of which the README's table is made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import RESULTS, environment

TESTS = Path(__file__).parent.parent / "tests" / "test_parity.py"


def main() -> int:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        pytest = [str(Path(sys.executable).with_name("pytest")), "-q", str(TESTS), "-k", "hidden_state or outliers"]
        status = subprocess.run(pytest, env={**os.environ, "PARITY_TABLE": file.name}).returncode
        rows = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    result = {"environment": environment(), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "parity.json").write_text(json.dumps(result, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in result["environment"].items()) + "\n")
    print(table(rows))
    return status


def table(rows: list[dict]) -> str:
    """A row a variant, a column a dtype, the worse of both image sizes: ours / transformers'."""
    dtypes = ("float32", "bfloat16", "float16")
    lines = ["| variant | " + " | ".join(f"{d}: ours | transformers" for d in dtypes) + " |", "|---" * 7 + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for dtype in dtypes:
            found = [row for row in rows if (row["variant"], row["dtype"]) == (variant, dtype)]
            for who in ("ours", "transformers"):
                errors = [row[who] for row in found]
                cells.append("overflow" if "overflow" in errors else f"{max(errors):.2e}" if errors else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
