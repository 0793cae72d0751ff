"""benchmarks/models.py goes on where it stopped, on the machine it was begun on, and measures what it says."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from helpers import ROOT

from dinov3_lite import DINOv3ViT


@pytest.fixture
def models(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(importlib.import_module("environment"), "RESULTS", tmp_path)
    return importlib.import_module("models")


def environment() -> dict:
    return importlib.import_module("environment").environment()


def call(models, monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["models.py", "--variants", "vitt16", "--save", "x", *options])
    models.main()


def test_it_goes_on_where_it_stopped(models, monkeypatch, tmp_path):
    *there, missing = models.wanted(("vitt16",))
    rows = [row | {"peak MiB": 7.0, "computed": False, "seconds": [1.0]} for row in there]
    stored = {"environment": environment(), "rows": rows}
    (tmp_path / "x.json").write_text(json.dumps(stored))
    call(models, monkeypatch)
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["rows"][:-1] == rows and models.identity(result["rows"][-1]) == missing
    weights = 2 * models.parameters("vitt16") / 2**20
    assert weights < result["rows"][-1]["peak MiB"] < weights + 200 and len(result["rows"][-1]["seconds"]) >= 3


def test_two_machines_are_not_mixed(models, monkeypatch, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"environment": environment() | {"threads": 77}, "rows": []}))
    with pytest.raises(SystemExit, match="measured with threads 77, this is"):
        call(models, monkeypatch)


def test_a_model_of_one_block_all_over_runs_as_deep_as_the_variant(models):
    import torch

    plain, shared = (models.made("vitt16", torch.float32, shared=shared) for shared in (False, True))
    assert len(plain.blocks) == len(shared.blocks) == 12
    count = sum(p.numel() for p in DINOv3ViT.from_name("vitt16").parameters())
    assert sum(p.numel() for p in plain.parameters()) == count
    block = sum(p.numel() for p in shared.blocks[0].parameters())
    assert sum(p.numel() for p in shared.parameters()) == count - 11 * block
    with torch.no_grad():
        images = torch.randn(1, 3, 32, 32)
        plain.load_state_dict(shared.state_dict())
        torch.testing.assert_close(shared(images).last_hidden_state, plain(images).last_hidden_state)
