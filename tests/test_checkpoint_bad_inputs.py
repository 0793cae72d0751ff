"""A checkpoint that can't be loaded: one clear sentence each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import TINY, trained_like, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import DINOv3ViT
from dinov3_lite.checkpoint import CONVERTED


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", TINY)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder, change):
    weights = trained_like(TINY)
    change(weights)
    save_file(weights, folder / "model.safetensors")


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def lose_metadata(folder):
    path = convert(folder)
    save_file(load_file(path), path)
    (folder / "model.safetensors").unlink()


def change_metadata(folder, **changes):
    from safetensors import safe_open

    path = convert(folder)
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v})
    (folder / "model.safetensors").unlink()


BAD = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"config.json: missing: a checkpoint in transformers' layout needs",
    ),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json: not valid JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config.json: holds a list, expected a JSON object",
    ),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), r"config.json: no model_type in it"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config.json: not valid JSON"),
    "dinov2": (lambda f: edit_config(f, model_type="dinov2"), r"config.json: model_type is 'dinov2'"),
    "convnext": (
        lambda f: edit_config(f, model_type="dinov3_convnext"),
        r"config.json: is of a ConvNeXt, and the tensors",
    ),
    "contradictory config": (
        lambda f: edit_config(f, num_attention_heads=5),
        r"config.json: hidden_size 32 does not divide",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"no model.safetensors.*it holds 'config.json', 'prepro",
    ),
    "truncated data": (
        lambda f: truncate(f / "model.safetensors", 5000),
        r"model.safetensors: not a whole safetensors file",
    ),
    "truncated header": (
        lambda f: truncate(f / "model.safetensors", 100),
        r"model.safetensors: not a whole safetensors file",
    ),
    "empty file": (lambda f: truncate(f / "model.safetensors", 0), r"model.safetensors: not a whole safetensors file"),
    "a web page": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), r"not a whole safetensors file"),
    "lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"model.safetensors: a git-lfs pointer, not the weights",
    ),
    "foreign tensors": (
        lambda f: save_file({"fc.weight": torch.zeros(3)}, f / "model.safetensors"),
        r"none of its 1 tensors \(first: 'fc.weight'\)",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda w: w.pop("layer.1.norm2.bias")),
        r"model.safetensors: lacks tensor 'layer.1.norm2.bias', which the config \(vit-c32-d3-h2\) calls for",
    ),
    "extra tensor": (
        lambda f: edit_weights(f, lambda w: w.update({"neck.weight": torch.zeros(3)})),
        r"model.safetensors: holds tensor 'neck.weight', which the config \(vit-c32-d3-h2\) has no place for",
    ),
    "key bias that the config denies": (
        lambda f: edit_weights(f, lambda w: w.update({"layer.0.attention.k_proj.bias": torch.zeros(32)})),
        r"holds tensor 'layer.0.attention.k_proj.bias', which",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({"norm.weight": torch.zeros(31)})),
        r"against the config \(vit-c32-d3-h2\), tensor 'norm.weight' has shape \(31,\), not \(32,\)",
    ),
    "deeper config": (
        lambda f: edit_config(f, num_hidden_layers=4),
        r"lacks tensors 'layer.3.attention.k_proj.weight', .*'layer.3.attention.q_proj.weight' and 12 more, which",
    ),
    "shallower config": (
        lambda f: edit_config(f, num_hidden_layers=2),
        r"holds tensors 'layer.2.attention.k_proj.weight', .*'layer.2.attention.q_proj.weight' and 12 more, which",
    ),
    "wider config": (
        lambda f: edit_config(f, hidden_size=64),
        r"against the config \(vit-c64-d3-h2\), tensor .* has shape .*, not",
    ),
    "no register count": (lambda f: edit_config(f, num_register_tokens=0), r"register_tokens' has shape \(1, 4, 32\)"),
    "integer weights": (
        lambda f: edit_weights(f, lambda w: w.update({"norm.weight": torch.zeros(32, dtype=torch.int8)})),
        r"tensor 'norm.weight' is I8, expected one of F64, F32, F16, BF16",
    ),
    "mixed dtypes": (
        lambda f: edit_weights(f, lambda w: w.update({"norm.weight": torch.zeros(32).bfloat16()})),
        r"'norm.weight' is torch.bfloat16 but '.*' is torch.float32: say which dtype",
    ),
    "both prefixes": (
        lambda f: edit_weights(f, lambda w: w.update({"model.layer.0.norm1.bias": torch.zeros(32)})),
        r"tensor '(model.)?layer.0.norm1.bias' is also there as",
    ),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index.json: no weight_map",
    ),
    "shard missing": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"norm.bias": "model-1.safetensors"}}'),
        ),
        r"index.json: shard 'model-1.safetensors' is missing",
    ),
    "shard outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"norm.bias": "../model.safetensors"}}'
        ),
        r"index.json: shard '../model.safetensors' is not the name of a file",
    ),
    "converted by a later release": (
        lambda f: change_metadata(f, dinov3_lite="2"),
        r"converted file of version 2, this release",
    ),
    "converted without config": (
        lambda f: change_metadata(f, config=""),
        r"its metadata is not what this library writes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence(case, folder):
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        DINOv3ViT.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no model.safetensors.*\(it holds nothing\)"):
        DINOv3ViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["", "./nowhere", "/nowhere/at/all", "nowhere.safetensors", "a b/c"])
def test_no_such_source(source):
    with pytest.raises(FileNotFoundError, match=f"{source}: no such file or folder, and no hub id"):
        DINOv3ViT.from_pretrained(source)
    if source.startswith("/"):
        with pytest.raises(FileNotFoundError, match=f"^{source}: no such file or folder"):
            DINOv3ViT.from_pretrained(Path(source))


def test_a_file_of_another_kind(tmp_path):
    file = tmp_path / "weights.npz"
    file.write_bytes(b"123")
    with pytest.raises(ValueError, match="weights.npz: expected a folder or a file of type .safetensors, .pth, .pt"):
        DINOv3ViT.from_pretrained(file)


def test_what_lies_outside_of_a_file_is_not_said_of_the_file(folder, monkeypatch):
    """Its path, memory, the system: nobody is told to download it again."""
    file = folder / "model.safetensors"
    odd = file.rename(folder / os.fsdecode(b"model\xff.safetensors"))
    assert DINOv3ViT.from_pretrained(odd).weights_id.startswith("transformers ")
    with monkeypatch.context() as patch:  # safetensors refused such a path, as it still does for PyTorch
        patch.setattr("dinov3_lite.checkpoint.containers.safe_open", lambda path, framework: str(path).encode())
        with pytest.raises(ValueError, match=r"model\\udcff.safetensors'\): its path is no UTF-8, .*: rename it"):
            DINOv3ViT.from_pretrained(odd)
    odd.rename(file)
    pth = folder / "model.pth"
    torch.save(load_file(file), pth)

    def no_memory(*args, **kwargs):
        raise OSError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("dinov3_lite.checkpoint.containers.safe_open", no_memory)
    monkeypatch.setattr("dinov3_lite.checkpoint.pth.read_content", no_memory)
    with pytest.raises(OSError, match=r"model.safetensors: can't be opened: Cannot allocate memory \(os error 12\)$"):
        DINOv3ViT.from_pretrained(file)
    with pytest.raises(OSError, match="^Cannot allocate memory"):
        DINOv3ViT.from_pretrained(pth)


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path):
    weights = trained_like(TINY)
    weights["layer.1.mlp.down_proj.bias"][3] = 1e5
    folder = write_checkpoint(tmp_path, TINY, weights)
    for load in (DINOv3ViT.from_pretrained, lambda f, dtype: convert(f, dtype=dtype)):
        with pytest.raises(
            ValueError, match=r"'blocks.1.mlp.fc2.bias' reaches 1e\+05, beyond float16's 65504: use bfloat16"
        ):
            load(folder, dtype=torch.float16)
    assert not (folder / CONVERTED).exists()
