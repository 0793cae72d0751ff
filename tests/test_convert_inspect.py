"""`python -m convert --inspect` and `--verify`: what they say of a checkpoint and of a conversion."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PREPROCESSING, ROOT, TINY, trained_like, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from convert.__main__ import main
from convert.plan import make_plan
from convert.verify import verify
from convert.writer import write
from dinov3_lite import DINOv3ViT
from dinov3_lite.checkpoint import open_checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", TINY)


TIMMS = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96, key_bias=True)


@pytest.mark.parametrize("to", ["lite", "transformers", "meta"])
def test_verify_says_what_it_compared(to, tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "source", TINY)
    options = ["--to", to, "--output", str(tmp_path / "out"), "--verify"]
    assert main([str(folder), *options]) == 0
    out = capsys.readouterr().out
    match = re.search(r"verified: (\d+) tensors equal and finite; hidden states within (\S+) of transformers'", out)
    assert int(match[1]) == len(open_checkpoint(folder).names()) and float(match[2]) < 5e-6


def test_verify_from_the_repository_root(folder, tmp_path):
    """Where `import kernels` would find our folder, transformers is imported with the root off the path."""
    pytest.importorskip("transformers")
    (tmp_path / "kernels-0.18.3.dist-info").mkdir()
    command = [sys.executable, "-m", "convert", str(folder), "--verify"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "hidden states within" in done.stdout, done.stderr


def test_inspect(folder, capsys):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    for source, layout in ((folder, "transformers"), (convert(folder), "lite"), (convert(folder, to="meta"), "meta")):
        assert main([str(source), "--inspect"]) == 0
        text = capsys.readouterr().out
        assert "vit-c32-d3-h2" in text and layout in text and "dinov3-license" in text
        assert main([str(source), "--inspect", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["layout"] == layout and said["dtype"] == "float32" and said["warnings"] == []
        assert said["config"]["hidden_size"] == 32 and said["source_layout"] in ("transformers", "meta")
        weights = {name: t for name, t in DINOv3ViT(TINY).state_dict().items() if name != "rope_embed.periods"}
        key_biases = 3 * 32  # of zeros in the model, and of nothing in a file
        assert said["parameters"] == sum(t.numel() for t in weights.values()) - key_biases
        assert said["rope"].startswith("computed" if layout != "meta" else "stored, equal")


def test_inspect_tells_rounded_periods_and_tensors_left_out(folder, tmp_path, capsys):
    meta = convert(folder, tmp_path, to="meta")
    tensors = torch.load(meta, weights_only=True)
    tensors["rope_embed.periods"] = tensors["rope_embed.periods"].bfloat16()
    tensors["local_cls_norm.bias"] = torch.zeros(32)
    torch.save(tensors, meta)
    assert main([str(meta), "--inspect"]) == 0
    out = capsys.readouterr().out
    assert "stored, rounded to bfloat16" in out and "left out   'local_cls_norm.bias'" in out


def test_inspect_warns_of_a_satellite_model_with_imagenet_statistics(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "dinov3-vitl16-pretrain-sat493m", TINY)
    assert main([str(folder), "--inspect"]) == 0
    assert "WARNING    a satellite model (sat493m) with ImageNet's image statistics" in capsys.readouterr().out


def test_inspect_says_what_a_layout_would_lose(folder, capsys):
    assert main([str(folder), "--inspect", "--to", "timm"]) == 0
    assert "--to timm loses 'mask_token': it has no mask token" in capsys.readouterr().out


def verified(out: str) -> tuple[int, float]:
    """How many tensors were compared, and the largest error of a hidden state."""
    match = re.search(r"verified: (\d+) tensors equal and finite; hidden states within (\S+) of transformers'", out)
    return int(match[1]), float(match[2])


@pytest.mark.parametrize("to", ["lite", "transformers", "meta"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_verify_compares_with_the_source_as_it_was_cast(dtype, to, tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "source", TINY)
    options = ["--to", to, "--dtype", dtype, "--output", str(tmp_path / "out"), "--max-shard-size", "30KB"]
    assert main([str(folder), *options, "--verify"]) == 0
    count, error = verified(capsys.readouterr().out)
    assert count == len(open_checkpoint(folder).names())
    assert {"float32": 0, "float16": 1e-5, "bfloat16": 1e-4}[dtype] < error < {"float32": 5e-6}.get(dtype, 0.1)


def test_verify_runs_what_was_written(folder, tmp_path):
    """What differs in the config alone is in no tensor: the forward has to notice it."""
    pytest.importorskip("transformers")
    plan = make_plan(open_checkpoint(folder), tmp_path / "out", to="transformers")
    config = write(plan) / "config.json"
    assert max(verify(plan).errors) < 5e-6
    config.write_text(json.dumps({**json.loads(config.read_text()), "layer_norm_eps": 0.1}))
    errors = verify(plan).errors
    assert len(errors) == TINY.num_hidden_layers + 1
    assert errors[0] < 5e-6 and min(errors[1:]) > 1e-3, "the embeddings have no norm, all else has"


def test_verify_of_a_conversion_with_losses_compares_the_rest(tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "source", TIMMS)
    options = [str(folder), "--to", "timm", "--output", str(tmp_path / "out"), "--verify", "--json"]
    assert main(options) == 1
    assert "the timm layout can't hold 'mask_token': it has no mask token; " in capsys.readouterr().err
    assert main([*options, "--allow-loss"]) == 0
    said = json.loads(capsys.readouterr().out)
    lost = 1 + TIMMS.num_hidden_layers  # the mask token and the key biases
    assert verified(said["verified"])[0] == len(open_checkpoint(folder).names()) - lost
    assert [loss.split(":")[0] for loss in said["lost"]] == ["'mask_token'", "'blocks.0.attn.qkv.k_bias' (and 2 more)"]

    plan = make_plan(open_checkpoint(folder), tmp_path / "out", to="timm")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["blocks.2.attn.v_bias"][7] += 1e-6
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'blocks.2.attn.qkv.v_bias' differs from its source"):
        verify(plan)


@pytest.mark.parametrize("name", ["rope_embed.periods", "local_cls_norm.bias"])
def test_verify_compares_what_no_digest_holds(name, folder, tmp_path):
    """The periods in float32, whatever the weights are, and what the model does not use."""
    source = convert(folder, tmp_path / "source", to="meta")
    tensors = torch.load(source, weights_only=True)
    tensors |= {f"local_cls_norm.{part}": torch.randn(32) for part in ("weight", "bias")}
    torch.save(tensors, source)
    plan = make_plan(open_checkpoint(source), tmp_path / "out", to="meta", dtype=torch.bfloat16)
    written = torch.load(write(plan), weights_only=True)
    assert verify(plan).tensors == len(open_checkpoint(source).names())
    written[name] = written[name] + 1e-6 * (name == "rope_embed.periods") + 1e-2 * (name != "rope_embed.periods")
    torch.save(written, plan.path)
    with pytest.raises(ValueError, match=rf"tensor '{name}' differs from its source: convert again"):
        verify(plan)


def test_inspect_shows_what_lies_beside_the_weights(tmp_path, capsys):
    images = {"size": {"height": 96, "width": 160}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]}
    folder = write_checkpoint(tmp_path / "source", TINY, preprocessing={**PREPROCESSING, **images})
    out = convert(folder, tmp_path / "shards", to="transformers", max_shard_size=40_000)
    shards = list(out.glob("*.safetensors"))
    assert main([str(out), "--inspect", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {key: said[f"image_{key.removeprefix('image_')}"] for key in images} == images
    assert said["files"] == len(shards) > 1 and said["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert main([str(out), "--inspect"]) == 0
    text = capsys.readouterr().out
    assert "size {'height': 96, 'width': 160}, mean [0.4, 0.5, 0.6], std [0.2, 0.3, 0.1]" in text
    assert f" MB in {len(shards)} files\n" in text


@pytest.mark.parametrize("names", [["norm.bias"], ["layer.1.norm1.weight", "norm.bias"]], ids=len)
def test_inspect_warns_of_weights_that_are_not_numbers(names, tmp_path, capsys):
    weights = trained_like(TINY)
    for name, value in zip(names, (float("nan"), float("inf")), strict=False):
        weights[name][17] = value
    folder = write_checkpoint(tmp_path, TINY, weights)
    first = "norm.bias" if len(names) == 1 else "blocks.1.norm1.weight"
    assert main([str(folder), "--inspect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == [
        f"NaN or infinity in {len(names)} tensors, first '{first}'"
    ]
    assert main([str(folder), "--inspect"]) == 0
    assert f"WARNING    NaN or infinity in {len(names)} tensors" in capsys.readouterr().out
    more = "" if len(names) == 1 else r" \(and 1 more\)"
    with pytest.warns(UserWarning, match=f"NaN or infinity in tensor '{first}'{more}: kept as it is"):
        convert(folder)


def test_inspect_tells_periods_that_the_config_does_not_give(folder, tmp_path, capsys):
    meta = convert(folder, tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    tensors["rope_embed.periods"][1] *= 1.01
    torch.save(tensors, meta)
    assert main([str(meta), "--inspect"]) == 0
    assert "stored, others than the config gives" in capsys.readouterr().out


def test_weights_of_several_dtypes_are_shown_and_verified(tmp_path, capsys):
    pytest.importorskip("transformers")
    weights = {name: w.half() if "mlp.up" in name else w for name, w in trained_like(TINY).items()}
    folder = write_checkpoint(tmp_path / "mixed", TINY, weights)
    assert main([str(folder), "--inspect", "--json", "--dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32, float16"
    out = tmp_path / "out.safetensors"
    assert main([str(folder), "--output", str(out)]) == 1
    assert "say which dtype you want (dtype=, --dtype)" in capsys.readouterr().err
    assert main([str(folder), "--output", str(out), "--dtype", "float32", "--verify"]) == 0
    assert "verified: " in capsys.readouterr().out


def test_verify_tells_what_was_rounded(tmp_path, monkeypatch):
    half = convert(write_checkpoint(tmp_path / "source", TINY), tmp_path / "half.safetensors", dtype="float16")
    plan = make_plan(open_checkpoint(half), tmp_path / "out", to="transformers")
    plan.lost.clear()
    write(plan)
    with pytest.raises(ValueError, match="tensor 'cls_token' differs from its source"):
        verify(plan)
