"""What the README shows is run, and the figures it gives are those of the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_readme_runs(tmp_path, monkeypatch):
    """Its two commands, then its Python, block after block in one session, on the made checkpoint."""
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)).save(tmp_path / "photo.jpg")
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python ")]
    assert len(commands) == 5
    for command in ["python -m dinov3_lite sample checkpoint", *commands]:
        words = [sys.executable, *command.split()[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "pca.png").exists()

    monkeypatch.chdir(tmp_path)
    session: dict = {}
    python = blocks("python")
    assert len(python) == 6
    for block in python:
        exec(compile(block, "README.md", "exec"), session)
    assert session["out"].feature_map.shape == (1, 384, 24, 40)
    assert [m.shape for m in session["maps"]] == [(1, 384, 14, 14)] * 4 and len(session["raw"]) == 13


@pytest.mark.parametrize("name", ["parity", "startup", "conversion"])
def test_tables_are_the_committed_results(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = __import__(name)
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert script.table(result["rows"] if name == "parity" else result) in README
    assert ", ".join(f"{key} {value}" for key, value in result["environment"].items()) in README


def test_the_errors_on_the_page_of_the_kernels_are_the_committed_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = __import__("row_kernels")
    result = json.loads((ROOT / "benchmarks" / "results" / "row_kernels_cpu.json").read_text())
    assert script.error_table(result["errors"]) in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_in_the_project_names_this_machine():
    for file in ["README.md", "Makefile", "pyproject.toml", *map(str, Path("benchmarks/results").glob("*"))]:
        assert str(ROOT) not in (ROOT / file).read_text(encoding="utf-8"), file
