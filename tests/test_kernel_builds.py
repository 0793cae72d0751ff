"""Every kernel compiles for every target without spills, within its shared memory: no GPU is needed to know it."""

from __future__ import annotations

import json

import kernel_builds
import pytest
from helpers import ROOT

pytest.importorskip("triton")

COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "kernel_builds.json").read_text())


@pytest.mark.parametrize("release", ["installed", "3.6.0"])
def test_every_build_is_as_it_must_be(release):
    """What a released model launches, compiled now; and the committed table, of all builds, is no other."""
    folders = {folder.name.removeprefix("triton-"): folder for folder in kernel_builds.other_tritons()}
    if release != "installed" and release not in folders:
        pytest.skip(f"triton {release} is not in {kernel_builds.REFERENCES}: `make` puts it there")
    rows = kernel_builds.compile_all(triton=folders.get(release), quick=True)
    assert {row["target"] for row in rows} == {80, 86, 90, 100, 120}
    assert release in ("installed", rows[0]["triton"])
    assert [problem for row in rows for problem in kernel_builds.problems(row)] == []

    committed = [row for row in COMMITTED["rows"] if row["triton"] == rows[0]["triton"]]
    stale = "run python tools/kernel_builds.py --json benchmarks/results/kernel_builds.json, and renew the page's table"
    assert not committed or [row for row in committed if row["released"]] == rows, stale


def test_the_committed_builds_are_as_they_must_be_and_on_the_page():
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert [problem for row in COMMITTED["rows"] for problem in kernel_builds.problems(row)] == []
    assert kernel_builds.table(COMMITTED) in page
    assert f"triton {COMMITTED['environment']['triton']}" in page


@pytest.fixture(scope="module")
def faults() -> dict[str, list[str]]:
    """What the gate says of each of bad_kernels."""
    rows = kernel_builds.compile_all(modules=("bad_kernels",), path=ROOT / "tests" / "support")
    return {row["name"]: kernel_builds.problems(row) for row in rows}


@pytest.mark.parametrize(
    "name, problem",
    [
        ("spills BLOCK=128", "bytes: registers spill"),
        ("adds_atomically BLOCK=1024", "has 1 atomics: its sums have no fixed order"),
        ("copies_from_the_second_element BLOCK=1024", "accesses of less than 16 bytes"),
        ("multiplies M=32, K=64", "does not use wgmma"),
        ("multiplies M=32, K=64", "products by the older mma"),
        ("multiplies M=128, K=256", "needs 327680 bytes of shared memory, of 232448"),
        ("does_not_compile BLOCK=1000", "does not compile: CompilationError"),
    ],
)
def test_the_gate_finds_a_fault(faults, name, problem):
    assert any(problem in sentence for sentence in faults[name]), faults[name]
