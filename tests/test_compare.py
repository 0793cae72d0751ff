"""The comparison with other libraries: what is measured, which rows a result keeps, and what its tables say."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from dinov3_lite import DINOv3ViT

pytest.importorskip("onnx")
ROOT = Path(__file__).parent.parent
QUIET, LOUD = [0.1, 0.101, 0.102, 0.1, 0.1], [0.1, 0.2, 0.1, 0.3, 0.1]


@pytest.fixture
def script(monkeypatch):
    """Import one of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def results(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script("environment"), "RESULTS", tmp_path)
    return tmp_path


def row(**peers) -> dict:
    """A row of a ViT-B at 224 px."""
    return {"variant": "vitb16", "pixels": 224, "batch": 1, "dtype": "float32", "seconds": peers, "missing": {}}


def test_errors_are_against_float64_and_rows_are_kept(script, results, tmp_path, monkeypatch, capsys):
    compare = script("compare")
    words = ["compare.py", "--variants", "vitt16", "--peers", "ours", "--rounds", "2", "--folder", str(tmp_path / "f")]
    for more in (["--rows", "32x2"], ["--rows", "64x1", "--dtypes", "bfloat16"], ["--rows", "32x2", "--memory"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        compare.main()
    found = json.loads((results / "compare.json").read_text())["rows"]
    assert [(r["pixels"], r["batch"], r["dtype"]) for r in found] == [(32, 2, "float32"), (64, 1, "bfloat16")]
    assert [len(r["seconds"]["ours"]) for r in found] == [2, 2]
    assert found[0]["peak MiB"]["ours"] > 20  # 5.5 M parameters in float32, and more for what runs

    images = compare.made_images(32, 2)
    with torch.no_grad():
        actual, expected = (
            DINOv3ViT.from_pretrained(tmp_path / "f" / "vitt16", dtype=dtype)(images.to(dtype)).last_hidden_state
            for dtype in (torch.float32, torch.float64)
        )
    error = ((actual - expected).norm() / expected.norm()).item()
    assert found[0]["error"]["ours"] == pytest.approx(error, rel=1e-3) and 1e-8 < error < 5e-6
    assert 1e-4 < found[1]["error"]["ours"] < 2e-2


def test_every_way_of_attention_is_timed_and_compared(script, monkeypatch):
    attention = script("attention_ways")
    monkeypatch.setattr(attention, "SIZES", ((1, 5), (2, 3)))
    rows = attention.measure(heads=2, rounds=3)
    for row in rows:
        ways = attention.ways_of_attention(getattr(torch, row["dtype"]))
        assert list(row["seconds"]) == list(row["error"]) == ways
        assert all(len(seconds) == 3 for seconds in row["seconds"].values())
        assert all(0 < error < (1e-5 if row["dtype"] == "float32" else 2e-2) for error in row["error"].values())
    lines = attention.table({"rows": rows}).splitlines()
    assert [line.split(" | ")[0] for line in lines if " x " in line] == ["| 1 x 5", "| 2 x 3"] * 2


def test_a_result_with_another_library_preloaded_is_not_added_to(script, results, monkeypatch):
    environment = script("environment")
    found = {"environment": environment.environment(), "rows": [row()]}
    (results / "compare.json").write_text(json.dumps(found))
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libanother.so")
    with pytest.raises(SystemExit, match="with preloaded nothing, this is libanother.so: .*--again"):
        environment.opened("compare", again=False)


def test_a_result_of_another_machine_is_not_added_to(script, results):
    environment = script("environment")
    elsewhere = {**environment.environment(), "machine": "another processor"}
    (results / "compare.json").write_text(json.dumps({"environment": elsewhere, "rows": [row()]}))
    with pytest.raises(SystemExit, match="another processor, this is .*--again"):
        environment.opened("compare", again=False)
    assert environment.opened("compare", again=True)["rows"] == []


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("Intel(R) Xeon(R) Processor (family 6, model 143, AVX2, AVX-512, AMX), 2 cores", "Intel Xeon Processor (AMX)"),
        ("AMD EPYC (AVX2, AVX-512, AVX-512 bfloat16), 2 cores", "AMD EPYC (AVX-512 bfloat16)"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_a_processor_in_a_few_words(script, machine, expected):
    assert script("environment").processor({"environment": {"machine": machine}}) == expected


def test_a_quartile_far_from_the_median_is_told(script):
    tables = script("compare_tables")
    measured = row(ours=QUIET, timm=LOUD, OpenVINO=[0.05])
    assert tables.warnings([measured]).endswith("measure again: timm")
    assert tables.time_of(measured, "ours") == "100 (1.00)"
    assert tables.time_of(measured, "timm").endswith(" †")
    assert tables.time_of(row(ours=[0.1], OpenVINO=[0.05]), "OpenVINO") == "50 (0.50) ‡"
    assert script("timing").quartiles([0.3, 0.1]) == [0.1, 0.2, 0.3]


def test_the_fastest_other_computes_in_the_rows_dtype(script):
    """OpenVINO's own precision is bfloat16 in a row of float32: no match."""
    tables, peers = script("compare_tables"), script("peers")
    measured = row(**{"ours": QUIET, "timm": [0.09] * 5, peers.OPENVINO_BY_ITSELF: [0.02] * 5})
    result = {"environment": {"machine": "AMD EPYC, 2 cores"}, "rows": [measured]}
    assert tables.sides_table([result]).splitlines()[-1] == "| vitb16, float32, 224 px, batch 1 | 100 | 90 timm |"
