"""What the README shows is run, and the figures it gives are those of the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_reference

README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_blocks(text: str, session: dict) -> int:
    """Run a page's Python, block after block in one session."""
    python = blocks("python", text)
    for block in python:
        exec(compile(block, "page", "exec"), session)
    return len(python)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the README's commands leave: a photograph and the made checkpoint in several layouts."""
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("readme")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)).save(folder / "photo.jpg")
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python ")]
    assert len(commands) == 5
    for command in ["python -m dinov3_lite sample checkpoint", *commands]:
        words = [sys.executable, *command.split()[1:]]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (folder / "pca.png").exists()
    return folder


def test_the_readme_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    session: dict = {}
    assert run_blocks(README, session) == len(blocks("python")) >= 6
    assert session["out"].feature_map.shape == (1, 384, 24, 40)
    assert [m.shape for m in session["maps"]] == [(1, 384, 14, 14)] * 4 and len(session["raw"]) == 13


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page, folder, monkeypatch):
    if page == "from-transformers" and not hasattr(pytest.importorskip("transformers"), "DINOv3ViTBackbone"):
        pytest.skip("this transformers has no DINOv3ViTBackbone")
    if "import peft" in PAGES[page] or "from peft" in PAGES[page]:
        pytest.importorskip("peft")
    monkeypatch.chdir(folder)
    session: dict = {}
    assert run_blocks(PAGES[page], session) > 0
    if page == "fine-tuning":
        keys_stay_while_queries_and_values_learn(session)


def keys_stay_while_queries_and_values_learn(session):
    model, C = session["adapted"], session["C"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(torch.randn(1, 3, 32, 32)).patch_tokens.square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "qkv.lora_B" in name:
            q, k, v = parameter.split(C)
            assert (k == 0).all() and (q != 0).any() and (v != 0).any()


def test_timms_side_of_its_page_runs(tmp_path):
    """In a process that sees timm, and without the download."""
    (before,) = blocks("python timm", PAGES["from-timm"])
    (tmp_path / "before.py").write_text(before.replace("pretrained=True", "pretrained=False"))
    run_reference("run_with_timm.py", tmp_path / "before.py", cwd=tmp_path)


TABLES = {  # a result, the script that made it, and its tables
    "parity": ("parity", lambda script, result: [script.table(result["rows"]), script.faces_table(result["faces"])]),
    "startup": ("startup", lambda script, result: [script.table(result)]),
    "conversion": ("conversion", lambda script, result: [script.table(result)]),
    "features": ("features", lambda script, result: script.tables(result).values()),
    "growth": ("growth", lambda script, result: [script.table(result)]),
    "compare": ("compare", lambda script, result: [script.table(result)]),
    "compare_bfloat16": ("compare", lambda script, result: [script.table(result)]),
    "steps": ("steps", lambda script, result: [script.table(result)]),
}
NOTES = {"steps"}  # in benchmarks/NOTES.md, all others in the README


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_the_committed_results(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module, tables = TABLES[name]
    script = __import__(module)
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    page = (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8") if name in NOTES else README
    for table in tables(script, result):
        assert table in page
    assert script.headline(result) in page


@pytest.mark.parametrize("name", ["rope_attention", "layer_norm", "swiglu"])
def test_the_errors_on_the_page_of_the_kernels_are_the_committed_ones(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = __import__(name)
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())
    assert script.error_table(result["errors"]) in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("folder", "text"), [(ROOT, README), *((ROOT / "docs", page) for page in PAGES.values())])
def test_links_and_pictures_are_there(folder, text):
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_nothing_in_the_project_names_this_machine():
    for file in [
        ROOT / "README.md",
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
        *(ROOT / "benchmarks").rglob("*.json"),
    ]:
        assert str(ROOT) not in file.read_text(encoding="utf-8"), file
