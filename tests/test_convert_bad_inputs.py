"""Bad input to `python -m convert`: exit status 1, one sentence that names the file, nothing written, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, trained_like, write_checkpoint
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from convert.plan import make_plan
from convert.verify import verify
from convert.writer import write
from dinov3_lite import DINOv3ViT
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.layouts import META, rename


def lite_state(folder: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(folder)
    return {name: opened.tensor(name).clone() for name in opened.names()}


def raw(file: Path, header: dict | bytes, data: bytes = b"", size: int | None = None) -> None:
    """A safetensors file with any header, whose length field may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def tensor(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}


def weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change or, with None, remove tensors; `__` in a key stands for a dot."""
    tensors = trained_like(TINY) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pth(folder: Path, change=lambda tensors: tensors) -> None:
    """Meta's file instead of transformers', changed."""
    tensors = rename(DINOv3ViT.from_pretrained(folder).state_dict(), META, TINY)
    for file in folder.iterdir():
        file.unlink()
    torch.save(change({k: v.clone() for k, v in tensors.items()}), folder / "dinov3.pth")


def without(*names: str):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


class Malicious:
    """Unpickled without care, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (os.environ["DINOV3_LITE_TEST_PWNED"],)


def malicious(folder: Path, form: str) -> None:
    pth(folder)
    tensors = torch.load(folder / "dinov3.pth", weights_only=True)
    if form == "plain pickle":
        (folder / "dinov3.pth").write_bytes(pickle.dumps({"cls_token": Malicious()}))
    else:
        torch.save(
            {**tensors, "extra": Malicious()}, folder / "dinov3.pth", _use_new_zipfile_serialization=form == "zip"
        )


def shards(folder: Path, weight_map: dict | list, rename_to: str = "model-1.safetensors") -> None:
    (folder / "model.safetensors").rename(folder / rename_to)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cut(file: Path, size: int) -> None:
    with file.open("r+b") as f:
        f.truncate(size)


M, F32 = "model.safetensors", torch.float32
CASES = {
    # files that lie or are cut
    "header longer than the file": (lambda f: raw(f / M, {}, size=10**6), "not a whole safetensors file"),
    "header of 2^63 bytes": (lambda f: raw(f / M, {}, size=2**63), "not a whole safetensors file"),
    "header of 200 MB of spaces": (lambda f: raw(f / M, b" " * 200_000_000), "not a whole safetensors file"),
    "header not JSON": (lambda f: raw(f / M, b"{'a': 1}"), "not a whole safetensors file"),
    "header not UTF-8": (lambda f: raw(f / M, b"\xff\xfe{}"), "not a whole safetensors file"),
    "header a list": (lambda f: raw(f / M, b"[1, 2]"), "not a whole safetensors file"),
    "header without offsets": (lambda f: raw(f / M, {"a": {"dtype": "F32", "shape": [1]}}), "not a whole safetensors"),
    "offsets past the end": (lambda f: raw(f / M, {"a": tensor(0, 400)}, b"1234"), "not a whole safetensors file"),
    "offsets backwards": (lambda f: raw(f / M, {"a": tensor(4, 0, [1])}, b"1234"), "not a whole safetensors file"),
    "offsets negative": (lambda f: raw(f / M, {"a": tensor(-4, 0, [1])}, b"1234"), "not a whole safetensors file"),
    "offsets overlap": (
        lambda f: raw(f / M, {"a": tensor(0, 4), "b": tensor(0, 4)}, b"12345678"),
        "not a whole safetensors file",
    ),
    "offsets with a hole": (
        lambda f: raw(f / M, {"a": tensor(0, 4), "b": tensor(8, 12)}, b"1" * 12),
        "not a whole safetensors file",
    ),
    "offsets and shape disagree": (
        lambda f: raw(f / M, {"a": tensor(0, 8, [1])}, b"12345678"),
        "not a whole safetensors",
    ),
    "shape of 2^62 elements": (lambda f: raw(f / M, {"a": tensor(0, 8, [2**31, 2**31])}, b"1" * 8), "not a whole"),
    "data after the tensors": (
        lambda f: (f / M).write_bytes((f / M).read_bytes() + b"12345678"),
        "not a whole safetensors file",
    ),
    "cut in the data": (lambda f: cut(f / M, 10_000), "not a whole safetensors file"),
    "cut in the header": (lambda f: cut(f / M, 50), "not a whole safetensors file"),
    "cut in the length": (lambda f: cut(f / M, 5), "not a whole safetensors file"),
    "empty": (lambda f: cut(f / M, 0), "not a whole safetensors file"),
    "no tensors": (lambda f: raw(f / M, {}), "none of its 0 tensors"),
    "an unknown dtype": (lambda f: raw(f / M, {"a": tensor(0, 4, [1], "F31")}, b"1234"), "not a whole safetensors"),
    "an 8-bit float": (
        lambda f: weights(f, norm__bias=torch.zeros(32).to(torch.float8_e4m3fn)),
        "'norm.bias' is F8_E4M3, expected one of",
    ),
    "a pickle called safetensors": (lambda f: (f / M).write_bytes(pickle.dumps({})), "not a whole safetensors file"),
    "a git-lfs pointer": (
        lambda f: (f / M).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "a git-lfs pointer, not the weights",
    ),
    # tensors
    "missing": (lambda f: weights(f, norm__weight=None), "lacks tensor 'norm.weight'"),
    "missing in one block": (lambda f: weights(f, layer__1__attention__o_proj__bias=None), "lacks tensor 'layer.1.att"),
    "extra": (lambda f: weights(f, neck__bias=torch.zeros(3)), "holds tensor 'neck.bias'"),
    "an extra block": (
        lambda f: weights(f, layer__3__norm1__bias=torch.zeros(32)),
        "holds tensor 'layer.3.norm1.bias'",
    ),
    "doubled": (lambda f: weights(f, model__layer__0__norm1__bias=torch.zeros(32)), "is also there as"),
    "of another shape": (lambda f: weights(f, norm__weight=torch.zeros(33)), r"shape \(33,\), not"),
    "of another rank": (lambda f: weights(f, norm__weight=torch.zeros(1, 32)), r"shape \(1, 32\), not"),
    "empty tensor": (lambda f: weights(f, norm__weight=torch.zeros(0)), r"shape \(0,\), not"),
    "of integers": (lambda f: weights(f, norm__weight=torch.zeros(32, dtype=torch.int64)), "is I64, expected one of"),
    "booleans": (lambda f: weights(f, norm__weight=torch.zeros(32, dtype=torch.bool)), "is BOOL, expected one of"),
    "of mixed dtypes": (lambda f: weights(f, norm__weight=torch.zeros(32).half()), "say which dtype you want"),
    "of another model": (
        lambda f: save_file({"encoder.layer.0.attention.query.weight": torch.zeros(3)}, f / M),
        "this is not a DINOv3 vision transformer",
    ),
    # shards
    "shard missing": (lambda f: shards(f, {"a": "model-2.safetensors"}), "shard 'model-2.safetensors' is missing"),
    "shard listed twice": (
        lambda f: (
            (f / "model-2.safetensors").write_bytes((f / M).read_bytes()),
            shards(f, {"a": "model-1.safetensors", "b": "model-2.safetensors"}),
        ),
        "is also in model-1.safetensors",
    ),
    "shard above the folder": (lambda f: shards(f, {"a": "../model.safetensors"}), "is not the name of a file"),
    "shard at an absolute path": (lambda f: shards(f, {"a": "/etc/passwd"}), "is not the name of a file"),
    "shard with a backslash": (lambda f: shards(f, {"a": "..\\model.safetensors"}), "is not the name of a file"),
    "shard no string": (lambda f: shards(f, {"a": ["model-1.safetensors"]}), "is not the name of a file"),
    "shard an empty name": (lambda f: shards(f, {"a": ""}), "is not the name of a file|is missing"),
    "weight_map a list": (lambda f: shards(f, ["model-1.safetensors"]), "no weight_map in it"),
    "weight_map empty": (lambda f: shards(f, {}), "no weight_map in it"),
    "index of a tensor that no shard has": (
        lambda f: shards(f, {"norm.bias": "model-1.safetensors", "neck.bias": "model-1.safetensors"}),
        "index.json: puts tensor 'neck.bias' into model-1.safetensors, but no shard has it",
    ),
    "index not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    # configs
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "config empty": (lambda f: (f / "config.json").write_text(""), "config.json: not valid JSON"),
    "config without a type": (lambda f: (f / "config.json").write_text("{}"), "no model_type in it"),
    "config huge": (lambda f: cut_up(f / "config.json"), "expected a JSON file of at most"),
    "config nested too deeply": (lambda f: (f / "config.json").write_text("[" * 10**6), "not valid JSON"),
    "config a number": (lambda f: (f / "config.json").write_text("7"), "holds a int, expected a JSON object"),
    "config a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config.json"),
    "dinov2": (lambda f: config(f, model_type="dinov2_with_registers"), "model_type is 'dinov2_with_registers'"),
    "convnext": (lambda f: config(f, model_type="dinov3_convnext"), "config.json: is of a ConvNeXt, and the tensors"),
    "a type that is no string": (lambda f: config(f, model_type=["dinov3_vit"]), "model_type is"),
    "negative size": (lambda f: config(f, hidden_size=-32), "hidden_size is -32: expected more than zero"),
    "fractional depth": (lambda f: config(f, num_hidden_layers=2.5), "num_hidden_layers is 2.5: expected int"),
    "size in words": (lambda f: config(f, hidden_size="thirty-two"), "hidden_size is 'thirty-two': expected int"),
    "null size": (lambda f: config(f, hidden_size=None), "hidden_size is None: expected int"),
    "infinite theta": (lambda f: config(f, rope_theta=float("inf")), "rope_theta is inf: expected float"),
    "heads that do not divide": (
        lambda f: config(f, num_attention_heads=3),
        "does not divide into num_attention_heads",
    ),
    "heads too thin for RoPE": (lambda f: config(f, num_attention_heads=16), "2D RoPE needs a multiple of 4"),
    "an unknown activation": (lambda f: config(f, hidden_act="relu6"), "hidden_act is 'relu6'"),
    "a depth of a billion": (
        lambda f: config(f, num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000: expected at most 1000",
    ),
    "a width of a billion": (lambda f: config(f, hidden_size=2 * 10**9), "hidden_size is 2000000000: expected at most"),
    # .pth
    "pth cut": (lambda f: (pth(f), cut(f / "dinov3.pth", 5_000)), "not a whole PyTorch file|beyond tensors"),
    "pth empty": (lambda f: (pth(f), cut(f / "dinov3.pth", 0)), "not a whole PyTorch file"),
    "pth a web page": (lambda f: (pth(f), (f / "dinov3.pth").write_text("<html>" * 50)), "dinov3.pth: "),
    "pth a list": (lambda f: pth(f, lambda t: list(t.values())), "no tensors in it"),
    "pth one tensor": (lambda f: pth(f, lambda t: t["cls_token"]), "no tensors in it"),
    "pth of integers": (
        lambda f: pth(f, lambda t: t | {"norm.bias": torch.zeros(32).long()}),
        "is torch.int64, expected",
    ),
    "pth lacks one": (lambda f: pth(f, without("blocks.1.ls1.gamma")), "lacks tensor 'blocks.1.ls1.gamma'"),
    "pth lacks a block": (
        lambda f: pth(f, lambda t: {k: v for k, v in t.items() if "blocks.1." not in k}),
        "lacks|holds",
    ),
    "pth with more": (lambda f: pth(f, lambda t: t | {"neck.weight": torch.zeros(2)}), "holds tensor 'neck.weight'"),
    "pth without the patch embedding": (
        lambda f: pth(f, without("patch_embed.proj.weight")),
        "lacks the patch embedding",
    ),
    "pth with a mask of nothing": (
        lambda f: pth(f, lambda t: t | {"blocks.0.attn.qkv.bias_mask": torch.full((96,), float("nan"))}),
        "'blocks.0.attn.qkv.bias_mask' holds NaN or infinity",
    ),
    "pth with a mask of another shape": (
        lambda f: pth(f, lambda t: t | {"blocks.0.attn.qkv.bias_mask": torch.ones(32)}),
        r"'blocks.0.attn.qkv.bias_mask' has shape \(32,\)",
    ),
    "pth with a sparse tensor": (
        lambda f: pth(f, lambda t: t | {"norm.bias": torch.zeros(32).to_sparse()}),
        "norm.bias",
    ),
    "two pth files": (
        lambda f: (pth(f), (f / "second.pth").write_bytes((f / "dinov3.pth").read_bytes())),
        r"holds 'dinov3.pth', 'second.pth': name the file that is meant",
    ),
}
for form in ("zip", "legacy", "plain pickle"):
    CASES[f"malicious {form}"] = (lambda f, form=form: malicious(f, form), "dinov3.pth: ")


def cut_up(file: Path) -> None:
    """Make the file 65 MB and a byte, without writing them."""
    cut(file, (64 << 20) + 1)


def test_there_are_more_than_fifty():
    assert len(CASES) > 50


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_no_output(case, tmp_path, capsys, monkeypatch):
    spoil, message = CASES[case]
    monkeypatch.setenv("DINOV3_LITE_TEST_PWNED", str(tmp_path / "pwned"))
    folder = write_checkpoint(tmp_path / "checkpoint", TINY)
    spoil(folder)
    with pytest.raises(SystemExit) as caught:
        sys.exit(main([str(folder), "--output", str(tmp_path / "out")]))
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith(f"convert: {folder}"), err
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "pwned").exists()


def test_nan_weights_are_converted_but_not_verified(tmp_path, capsys):
    folder = write_checkpoint(tmp_path, TINY)
    bias = torch.zeros(32)
    bias[3] = float("nan")
    weights(folder, norm__bias=bias)
    assert main([str(folder)]) == 0
    assert "warning" in capsys.readouterr().err
    assert main([str(folder), "--force", "--verify"]) == 1
    assert "tensor 'norm.bias' holds NaN or infinity" in capsys.readouterr().err


def test_a_read_only_target(tmp_path, capsys):
    """Also for root, to whom no folder is read-only: a file stands where the folder should be."""
    folder = write_checkpoint(tmp_path / "checkpoint", TINY)
    (tmp_path / "file").write_text("")
    assert main([str(folder), "--output", str(tmp_path / "file" / "x.safetensors")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("convert: ") and err.count("\n") == 1 and "file" in err


def test_verify_names_a_tensor_that_differs(tmp_path):
    source = write_checkpoint(tmp_path / "source", TINY)
    plan = make_plan(open_checkpoint(source), tmp_path / "hf", to="transformers")
    path = write(plan)
    tensors = load_file(path / M)
    tensors["layer.1.mlp.up_proj.weight"][3, 3] += 1e-6
    save_file(tensors, path / M)
    with pytest.raises(ValueError, match=r"tensor 'blocks.1.mlp.fc1.weight' differs from its source"):
        verify(plan)
