"""What is built, what it installs, and that it works where nothing of the repository is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import dinov3_lite

FOLDERS = {
    "dinov3_lite": "dinov3_lite",
    "convert": "convert",
    "kernels": "dinov3_lite/kernels",
}  # where each is installed
HOSTILE = 'raise SystemExit("a stranger ran")'


def run(*words: object, **kwargs) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def tracked() -> list[str]:
    """The files of the repository, which a build of a clean clone sees."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs the git checkout, to build of what is tracked")
    return [name for name in filter(None, listed.stdout.split("\0")) if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """dist/: the source distribution, and the wheel that was built of it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("build")
    for name in tracked():
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "clone" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "clone")
    return folder / "dist"


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """A new environment's Python: the wheel is installed there, and what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (wheel,) = built.glob("*.whl")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder that holds modules of a stranger's under our names."""
    (tmp_path / "convert.py").write_text(HOSTILE)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(HOSTILE)
    return tmp_path


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for name in tracked():
        folder, _, rest = name.partition("/")
        if folder in FOLDERS and not name.endswith(".md"):
            expected.add(f"{FOLDERS[folder]}/{rest}")
    assert (
        installed == expected
    )  # a new folder belongs into [tool.setuptools] packages, a new kind of file into package-data


def test_the_wheel_says_what_it_is(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/METADATA"))
    for line in (
        f"Version: {dinov3_lite.__version__}",
        "License-Expression: Apache-2.0",
        "Author: dinov3-lite contributors",
        "Requires-Python: >=3.10",
    ):
        assert f"\n{line}\n" in metadata
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


def test_the_source_distribution_holds_the_repository(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    private = {".gitignore", ".ci/run"}  # of the repository, not of the project
    assert {name for name in tracked() if name not in private} <= held


def test_the_version_stands_in_one_place():
    version = re.escape(dinov3_lite.__version__)
    found = [
        file
        for file in [*ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]
        if re.search(rf"version[\w\s]*[:=].*{version}", file.read_text(encoding="utf-8"))
    ]
    assert found == [ROOT / "dinov3_lite" / "__init__.py"]
    assert f"## [{dinov3_lite.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_what_is_installed_is_what_runs(python, tmp_path):
    code = "import convert, dinov3_lite.kernels as k; print(convert.__file__, k.__file__, k.rope_attention_reference)"
    convert, kernels, *_ = run(python, "-c", code, cwd=tmp_path, env=environment()).split()
    assert python.parents[1] in Path(convert).parents and kernels.endswith(
        "site-packages/dinov3_lite/kernels/__init__.py"
    )


def test_installed_commands_dont_look_into_the_current_folder(python, elsewhere):
    """--verify imports transformers, which looks for a package called kernels."""
    pytest.importorskip("transformers")
    scripts = python.parent
    told = run(scripts / "dinov3-lite", "sample", "checkpoint", cwd=elsewhere, env=environment())
    assert "made weights" in told
    told = run(scripts / "dinov3-convert", "checkpoint", "--verify", cwd=elsewhere, env=environment())
    assert "dinov3_lite.safetensors" in told and (elsewhere / "checkpoint" / "dinov3_lite.safetensors").exists()
    assert run(python, "-m", "dinov3_lite", "--help", cwd=elsewhere, env=environment()).startswith("usage")


def test_python_m_convert_is_the_same_command(python, tmp_path):
    assert run(python, "-m", "convert", "--help", cwd=tmp_path, env=environment()).startswith("usage")
    refused = subprocess.run([python, "-m", "convert", "nothing"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and "nothing" in refused.stderr


def test_verify_finds_transformers_where_both_are_installed(tmp_path):
    """A checkout's root is taken off the path for it; an installed one's is where it lies."""
    for package in ("convert", "dinov3_lite"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "dinov3_lite" / "kernels", dirs_exist_ok=True)
    (tmp_path / "transformers.py").write_text(
        "class utils:\n    class logging:\n        disable_progress_bar = staticmethod(print)\n"
    )
    code = "from convert.verify import transformers_module\nwith transformers_module() as found: print(found.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip() == str(tmp_path / "transformers.py"), done.stderr
