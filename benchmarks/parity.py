"""Run the parity tests and print what they measured: the worst relative errors of both libraries, against float64.

    python benchmarks/parity.py

One table for the hidden states of every variant, one for the faces of transformers, Meta and timm. Writes
benchmarks/results/parity.json, of which the README's and the pages' tables are made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import environment, headline, save

TESTS = Path(__file__).parent.parent / "tests"


def main() -> int:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        files = [str(TESTS / name) for name in ("test_parity.py", "test_interfaces.py", "test_convnext_parity.py")]
        chosen = "hidden_state or outliers or transformers_backbone or metas_ or timms_"
        pytest = [str(Path(sys.executable).with_name("pytest")), "-q", *files, "-k", chosen]
        status = subprocess.run(pytest, env={**os.environ, "PARITY_TABLE": file.name}).returncode
        rows = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    faces = [row for row in rows if "face" in row]
    result = {"environment": environment(), "rows": [row for row in rows if row not in faces], "faces": faces}
    save("parity", result)
    print(headline(result), table(result["rows"]), faces_table(faces), sep="\n\n")
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


def faces_table(rows: list[dict]) -> str:
    """A row a face: the worst errors over all calls, outputs and models that its tests compare."""
    lines = ["| face | float32: ours | theirs | float64: ours to theirs |", "|---" * 4 + "|"]
    for face in dict.fromkeys(row["face"] for row in rows):
        found = [row for row in rows if row["face"] == face]
        errors = [max(row["float32"][who] for row in found) for who in (0, 1)]
        errors.append(max(row["float64"] for row in found))
        lines.append(f"| {face} | " + " | ".join(f"{error:.2e}" for error in errors) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
