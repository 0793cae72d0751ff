"""`python -m convert`: what it prints, its status, and that its options arrive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, trained_like, write_checkpoint

from convert import convert
from convert.__main__ import main
from dinov3_lite.checkpoint import CONVERTED, open_checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", TINY)


TIMMS = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96, key_bias=True)


def test_summary_line(folder, capsys):
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("vit-c32-d3-h2  0.0 M parameters  float32  0.1 MB  ")
    assert out.rstrip().endswith(str(folder / CONVERTED)) and out.count("\n") == 1
    digest = open_checkpoint(folder).digest()[:8]
    assert f"transformers {digest} -> lite {digest}" in out
    assert err == ""


def test_quiet(folder, capsys):
    assert main([str(folder), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_output_and_dtype(folder, tmp_path):
    assert main([str(folder), "--output", str(tmp_path / "half.safetensors"), "--dtype", "bfloat16"]) == 0
    assert open_checkpoint(tmp_path / "half.safetensors").dtype == torch.bfloat16


def test_a_folder_of_models_goes_on_past_a_bad_one(tmp_path, capsys):
    for name in ("a", "b", "c"):
        write_checkpoint(tmp_path / name, TINY)
    (tmp_path / "b" / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and err.count("\n") == 2 and "b/config.json" in err
    assert err.splitlines()[1] == f"convert: 1 of 3 failed: {tmp_path / 'b'}"
    assert (tmp_path / "a" / CONVERTED).exists() and (tmp_path / "c" / CONVERTED).exists()
    assert main([str(tmp_path), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert (tmp_path / "out" / "c" / CONVERTED).exists()


@pytest.mark.parametrize("source", ["/nowhere/at/all", str(ROOT / "tests")])
def test_bad_input_is_status_1_and_one_line(source, capsys):
    assert main([source]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"convert: {source}: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "--dtype", "int8"],
        ["x", "--to", "keras"],
        ["x", "--max-shard-size", "0"],
        ["x", "--max-shard-size", "5 pounds"],
        ["x", "--nonsense"],
    ],
)
def test_bad_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m convert" in capsys.readouterr().err


def test_as_a_module_from_the_repository_root(folder):
    done = subprocess.run([sys.executable, "-m", "convert", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "vit-c32-d3-h2" in done.stdout, done.stderr


# ---- --dry-run, and --json


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(folder, tmp_path, capsys):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    before = sorted(tmp_path.rglob("*"))
    options = [str(folder), "--to", "transformers", "--output", str(tmp_path / "out"), "--max-shard-size", "40KB"]
    assert main([*options, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main([*options, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*options, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    written = sorted(str(file) for file in (tmp_path / "out").iterdir())
    assert sorted(file["path"] for file in said["files"]) == written and all(path in text for path in written)
    assert said["bytes"] == sum(t.nbytes for t in trained_like(TINY).values())
    assert said["path"] == done["path"] == str(tmp_path / "out") and said["to"] == "transformers"
    assert said["lost"] == said["left_out"] == [] and done["weights"] == said["weights"]


def test_a_dry_run_fails_as_the_real_run_would(folder, tmp_path, capsys):
    weights = trained_like(TINY)
    weights["norm.bias"][3] = 1e6
    large = write_checkpoint(tmp_path / "large", TINY, weights)
    convert(folder, tmp_path / "there")
    (tmp_path / "file").write_text("")
    for options in (
        [folder, "--to", "timm", "--output", tmp_path / "new"],
        [folder, "--output", tmp_path / "there"],
        [folder, "--output", tmp_path / "file" / "x.safetensors"],
        [large, "--dtype", "float16", "--output", tmp_path / "half"],
        [folder / "config.json"],
    ):
        errors = []
        for more in (["--dry-run"], []):
            assert main([*map(str, options), *more]) == 1
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1
            errors.append(err)
        assert errors[0] == errors[1]
    assert not (tmp_path / "new").exists()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example:\n  python -m convert " in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="redirections of a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "env"),
    [
        (">&- 2>&-", {}),
        (">/dev/full", {"PYTHONUNBUFFERED": "1"}),
        ("| true; exit ${PIPESTATUS[0]}", {"PYTHONUNBUFFERED": ""}),
        ("", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_the_status_speaks_of_the_work_and_not_of_telling_it(redirection, env, tmp_path):
    folder = write_checkpoint(tmp_path / "söurce", TINY)
    command = f"{sys.executable} -m convert söurce {redirection}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "dinov3_lite.safetensors").exists()
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_bar_where_there_is_no_stderr(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert convert(folder, tmp_path / "out", progress=True).exists()


# ---- options in combination


def test_options_reach_the_conversion(folder, tmp_path, monkeypatch, capsys):
    """Each by itself, and as it was said: 5GB is 5,000,000,000 bytes, as transformers counts."""
    asked = {}

    def spy(name):
        function = getattr(sys.modules["convert.__main__"], name)
        monkeypatch.setattr(f"convert.__main__.{name}", lambda *a, **k: (asked.update({name: k}), function(*a, **k))[1])

    for name in ("make_plan", "check", "write"):
        spy(name)
    output, size = ["--output", str(tmp_path / "out")], "max_shard_size"
    default = {"to": "lite", "dtype": None, "max_shard_size": 5_000_000_000}
    assert main([str(folder), *output]) == 0
    assert asked == {"make_plan": default, "check": {"force": False, "allow_loss": False}, "write": {"progress": True}}
    for text, value in {"5GB": 5 * 10**9, "7MB": 7 * 10**6, "90KB": 90_000, "123456": 123_456}.items():
        assert main([str(folder), *output, "--force", "--quiet", "--max-shard-size", text]) == 0
        assert asked["make_plan"] == {**default, size: value}
    assert asked["check"] == {"force": True, "allow_loss": False} and asked["write"] == {"progress": False}
    assert main([str(folder), *output, "--force", "--allow-loss", "--dtype", "float16"]) == 0
    assert asked["make_plan"] == {**default, "dtype": torch.float16}
    assert asked["check"] == {"force": True, "allow_loss": True}


@pytest.mark.parametrize("options", [["--inspect"], ["--dry-run"], ["--json"], ["--inspect", "--json"], ["--verify"]])
def test_quiet_is_quiet_whatever_else_is_asked(options, folder, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main([str(folder), "--output", str(tmp_path / "out"), "--quiet", *options]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "out").exists() == (options[0] in ("--json", "--verify"))


def test_one_object_a_model(tmp_path, capsys):
    for name in ("b", "a"):
        write_checkpoint(tmp_path / "models" / name, TINY)
    output = tmp_path / "out"
    assert main([str(tmp_path / "models"), "--json", "--output", str(output), "--to", "transformers"]) == 0
    first, second = capsys.readouterr().out.split("\n}\n")[:2]
    assert [json.loads(text + "}")["path"] for text in (first, second)] == [str(output / "a"), str(output / "b")]
    assert "verified" not in first and json.loads(first + "}")["lost"] == []


@pytest.mark.parametrize("prefix", ["rgb", "depth.", "rgb.backbone"])
def test_a_prefix_names_the_backbone(prefix, tmp_path, capsys):
    weights = {where: trained_like(TIMMS, seed) for seed, where in enumerate(("rgb.backbone.", "depth.backbone."))}
    folder = write_checkpoint(
        tmp_path / "both", TIMMS, {where + name: w for where, named in weights.items() for name, w in named.items()}
    )
    assert main([str(folder)]) == 1
    assert "under 'depth.backbone.', 'rgb.backbone.': name the one that is meant" in capsys.readouterr().err
    expected = weights["rgb.backbone." if prefix.startswith("rgb") else "depth.backbone."]["norm.bias"]
    options = ["--prefix", prefix, "--output", str(tmp_path / "out"), "--json"]
    assert main([str(folder), *options]) == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]
    other = "depth." if prefix.startswith("rgb") else "rgb."
    assert len(left_out) == 1 and left_out[0].startswith(f"{len(trained_like(TIMMS))} tensors of '{other}'")
    assert torch.equal(open_checkpoint(tmp_path / "out" / CONVERTED).tensor("norm.bias"), expected)
    assert main([str(folder), "--prefix", prefix]) == 1
    assert "and no output is named: name one with --output" in capsys.readouterr().err
    assert not (folder / CONVERTED).exists() and main([str(folder), "--prefix", prefix, "--inspect", "--quiet"]) == 0
    again = convert(folder, tmp_path / "again", prefix=prefix)
    assert again.read_bytes() == (tmp_path / "out" / CONVERTED).read_bytes()


def test_a_damaged_index_is_a_model_that_fails_by_itself(tmp_path, capsys):
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, TINY)
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors.index.json").write_text("{")
    assert main([str(tmp_path), "--quiet"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and "index.json: not valid JSON" in lines[0] and lines[1].endswith(f"failed: {tmp_path / 'a'}")
    )
    assert (tmp_path / "b" / CONVERTED).exists()


def test_what_is_lost_and_left_out_is_said_to_people_too(tmp_path, capsys):
    meta = convert(write_checkpoint(tmp_path / "source", TIMMS), tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    torch.save(tensors | {f"local_cls_norm.{part}": torch.zeros(128) for part in ("weight", "bias")}, meta)
    options = [str(meta), "--to", "timm", "--allow-loss", "--dtype", "bfloat16", "--output", str(tmp_path / "timm")]
    left_out = "2 tensors of 'local_cls_norm.' (normalises the CLS token of local crops in pretraining)"
    assert main([*options, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "-> timm bfloat16" in text and "would lose 'mask_token'" in text and f"would leave out {left_out}" in text
    assert main(options) == 0
    assert f"\n  left out {left_out}\n" in capsys.readouterr().out
    lite = convert(meta, tmp_path / "lite")
    assert main([str(lite), "--inspect"]) == 0
    text = capsys.readouterr().out
    assert "  made from  meta\n" in text and "  layout     lite\n" in text
    assert open_checkpoint(tmp_path / "timm").left_out == {}


def test_a_revision_reaches_the_hub(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("dinov3_lite.checkpoint.hub.download", lambda name, **k: (asked.append((name, k)), folder)[1])
    convert("someone/dinov3-tiny", tmp_path / "a", revision="v2")
    assert main(["someone/dinov3-tiny", "--revision", "v3", "--quiet", "--output", str(tmp_path / "b")]) == 0
    assert [(name, options["revision"]) for name, options in asked] == [
        ("someone/dinov3-tiny", "v2"),
        ("someone/dinov3-tiny", "v3"),
    ]


@pytest.mark.parametrize("to", ["lite", "meta"])
def test_what_is_carried_along_is_not_said_to_be_left_out(to, folder, tmp_path, capsys):
    meta = convert(folder, tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    torch.save(tensors | {f"local_cls_norm.{part}": torch.zeros(32) for part in ("weight", "bias")}, meta)
    options = [str(meta), "--to", to, "--output", str(tmp_path / "out"), "--json"]
    for more in (["--dry-run"], []):
        assert main([*options, *more]) == 0
        assert json.loads(capsys.readouterr().out)["left_out"] == []
