"""What the pages show is run, where they point is there, and the figures they give are those of the committed results."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import ROOT, run_python, run_reference

from dinov3_lite.config import config_from_name

FRONTS = ("README.md", "README.zh-CN.md")
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
PAGES |= {page.name: page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("*.md"))}
RUNNING = [name for name, text in PAGES.items() if re.search("^```python$", text, re.MULTILINE)]
COMMAND = re.compile(r"^(?:python -m (?:dinov3_lite|convert)|dinov3-lite|dinov3-convert)\b.*$", re.MULTILINE)


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours in a page's shell blocks."""
    found = [line for block in blocks("bash", text) for line in COMMAND.findall(block.replace("\\\n", " "))]
    return [shlex.split(line, comments=True) for line in found]


def run_blocks(text: str) -> dict:
    """Run a page's Python, block after block in one session."""
    session: dict = {}
    for block in blocks("python", text):
        exec(compile(block, "page", "exec"), session)
    return session


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the README's commands leave: a photograph and the made checkpoint in several layouts."""
    Image = pytest.importorskip("PIL.Image")
    import camouflage

    folder = tmp_path_factory.mktemp("readme")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)).save(folder / "photo.jpg")
    camouflage.write(folder / "dataset" / "TrainDataset", 4, seed=0, size=(64, 64))
    words = commands(PAGES["README.md"])
    assert len(words) == 5
    for command in words:
        done = subprocess.run([sys.executable, *command[1:]], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (folder / "pca.png").exists()
    return folder


# ---- snippets


@pytest.mark.parametrize("page", RUNNING)
def test_a_page_runs(page, folder, monkeypatch):
    if page == "from-transformers" and not hasattr(pytest.importorskip("transformers"), "DINOv3ViTBackbone"):
        pytest.skip("this transformers has no DINOv3ViTBackbone")
    if re.search("^(import|from) peft", PAGES[page], re.MULTILINE):
        pytest.importorskip("peft")
    for name in re.findall("^import (faiss|duckdb)", PAGES[page], re.MULTILINE):
        pytest.importorskip(name)
    if "import accelerate" in PAGES[page]:
        pytest.importorskip("accelerate")
    if "dinov3_lite.tasks" in PAGES[page]:
        pytest.importorskip("py_sod_metrics")
    monkeypatch.chdir(folder)
    session = run_blocks(PAGES[page])
    if page == "extract":
        assert session["store"].keys[session["found"][5][0]] == session["nearest"][0][0] == "left/05.jpg"
        assert len(session["store"]) == 25 and session["pairs"] == {(0, 24)}
        assert session["outcomes"] == [(shard, None) for shard in range(7)]
        extract, job = session["dinov3_lite"].extract, session["job"]
        by_engine, without = extract(**job), extract(**job | {"output": "features-without-engine"})
        assert by_engine.folder.index.exists() and np.array_equal(by_engine["cls_token"], without["cls_token"])
        # other batches round otherwise, here and there by one of float16's steps
        in_other_batches = session["store"]["cls_token"]
        assert np.allclose(by_engine["cls_token"], in_other_batches, rtol=2**-10, atol=2**-14)
    if page == "fine-tuning":
        keys_stay_while_queries_and_values_learn(session)
    if page in FRONTS:
        assert session["out"].feature_map.shape == (1, 384, 14, 14) and session["dense"].shape == (1, 384, 24, 40)


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


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text)])
def test_commands_have_the_flags_that_pages_show(page):
    for words in commands(PAGES[page]):
        module = words[2] if words[0] == "python" else words[0].replace("dinov3-convert", "convert").replace("-", "_")
        arguments = words[3:] if words[0] == "python" else words[1:]
        asked = arguments[:1] if module == "dinov3_lite" else []
        done = run_python(
            f"import runpy, sys; sys.argv[1:] = {[*asked, '--help']}; runpy.run_module('{module}', run_name='__main__')"
        )
        for flag in re.findall("--[a-z-]+", " ".join(words)):
            assert re.search(rf"{flag}\b", done.stdout), f"{flag} of {shlex.join(words)}: {done.stdout}{done.stderr}"


# ---- the front pages


def test_the_front_page_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_the_front_pages_show_the_same():
    """In both languages: the same code but for comments, the same commands and pictures, and a link to every page."""

    def shown(text: str) -> list:
        code = [re.sub(r" *#.*", "", block) for block in re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)]
        targets = {target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)}
        return [code, targets - set(FRONTS), text.count("\n| "), text.count("\n## ")]

    english, chinese = (shown(PAGES[front]) for front in FRONTS)
    assert english == chinese


# ---- figures


@pytest.fixture
def scripts(monkeypatch):
    """Import one of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def page_script(scripts) -> ModuleType:
    return scripts("page")


def test_tables_are_the_committed_results(page_script):
    for page in page_script.pages():
        assert page_script.filled(page) == page.read_text(encoding="utf-8"), f"{page}: run `python benchmarks/page.py`"


def test_charts_are_drawn_from_the_committed_results(page_script):
    for name, panels in page_script.CHARTS.items():
        assert page_script.drawn_from(page_script.IMAGES / f"{name}.png") == page_script.digest(panels), name


def test_every_result_is_on_a_page(page_script):
    """A result that no page shows is a loss that nobody sees."""
    used = set(re.findall(r'"(\w+)"', (ROOT / "benchmarks" / "page.py").read_text()))
    elsewhere = {"kernel_builds", "rope_attention_cpu", "layer_norm_cpu", "swiglu_cpu"}  # in kernels/README.md
    assert {file.stem for file in page_script.RESULTS.glob("*.json")} <= used | elsewhere


@pytest.mark.parametrize("name", ["rope_attention", "layer_norm", "swiglu"])
def test_the_errors_on_the_page_of_the_kernels_are_the_committed_ones(name, scripts):
    script = scripts(name)
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())
    assert script.error_table(result["errors"]) in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_models_name_what_loads(scripts):
    """Every hub id leads to the variant of its line, and every variant has one, but for the one without weights."""
    rows = [
        line.split("|")[1:] for line in PAGES["models"].splitlines() if re.match(r"\| (vit|convnext-)\w+.*`\w+/", line)
    ]
    named = {
        (cells[0].split(",")[0].strip(), hub)
        for cells in rows
        for hub in re.findall("`((?:facebook|robbyant)/.+?)`", str(cells))
    }
    assert {variant for variant, _ in named} == {*scripts("models").VARIANTS} - {"vitl16plus"} and len(named) == 22
    for variant, hub in named:
        assert config_from_name(hub) == config_from_name(variant), hub


# ---- links


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    folder = ROOT if page.endswith(".md") else ROOT / "docs"
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else folder / (page if page.endswith(".md") else f"{page}.md")
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_tests_that_a_page_names_are_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", "\n".join(PAGES.values()))
    assert len(named) > 40
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_first_page_of_the_site_leads_to_every_other():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {
        "index.md",
        "tasks.zh-CN.md",
    }  # which tasks.md links
    assert pages == set(re.findall(r"\]\((\S+\.md)\)", PAGES["index"]))


def test_the_site_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert set(re.findall(r"[\w.-]+\.md", navigation)) == {file.name for file in (ROOT / "docs").glob("*.md")}


def test_the_citation_names_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert paper["title"] == "DINOv3" and paper["url"].endswith("2508.10104") and len(paper["authors"]) == 26


def test_nothing_in_the_project_names_this_machine():
    for file in [*ROOT.glob("*.*"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.json")]:
        if file.suffix in {".md", ".json", ".toml", ".yml", ".cff", ".txt"}:
            assert str(ROOT) not in file.read_text(encoding="utf-8"), file


def test_the_design_page_has_a_room_for_every_file_and_no_other():
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", PAGES["design"]))
    there = set()
    for folder in (ROOT / "dinov3_lite", ROOT / "dinov3_lite" / "checkpoint", ROOT / "convert"):
        there |= {file.name for file in folder.glob("*.py") if not file.name.startswith("__")}
        there |= {f"{package.parent.name}/" for package in folder.glob("*/__init__.py")}
    inner = {"layouts/", "kernels/"}  # the one is said with its parent, the other is a floor
    assert there - inner <= named, there - inner - named
    files = {file.name for folder in ("dinov3_lite", "convert", "kernels") for file in (ROOT / folder).rglob("*.py")}
    assert {name for name in named if name.endswith(".py") and "/" not in name} <= files
