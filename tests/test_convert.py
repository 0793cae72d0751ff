"""`convert`: what is written, from which arguments, and what goes along."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PREPROCESSING, TINY, TINY_GATED, trained_like, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from convert import convert
from convert.plan import parse_size
from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.checkpoint import CONVERTED, json_files, open_checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", TINY)


TIMMS = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96, key_bias=True)


def test_the_file_describes_itself(folder):
    path = convert(folder)
    assert path == folder / CONVERTED
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert DINOv3Config.from_dict(json.loads(metadata["config"])) == TINY
    assert json.loads(metadata["preprocessing"]) == PREPROCESSING
    assert metadata["source_layout"] == "transformers"
    assert metadata["source_digest"] == metadata["digest"]
    assert metadata["rope"] == "computed"


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_the_file_loads_as_the_source_does(config, dtype, tmp_path):
    folder = write_checkpoint(tmp_path, config)
    expected = DINOv3ViT.from_pretrained(folder, dtype=dtype).state_dict()
    state = DINOv3ViT.from_pretrained(convert(folder, tmp_path / "x.safetensors", dtype=dtype)).state_dict()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def test_every_tensor_is_aligned_for_its_dtype_and_the_data_for_a_cache_line(folder):
    path = convert(folder, dtype=torch.float16)
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header_size) % 64 == 0
    header = json.loads(path.read_bytes()[8 : 8 + header_size])
    del header["__metadata__"]
    assert {entry["dtype"] for entry in header.values()} == {"F32", "F16"}
    for entry in header.values():
        assert entry["data_offsets"][0] % {"F32": 4, "F16": 2}[entry["dtype"]] == 0


def test_a_converted_file_can_be_cast_again(folder, tmp_path):
    half = convert(convert(folder), tmp_path, dtype=torch.bfloat16)
    assert half == tmp_path / CONVERTED
    opened = open_checkpoint(half)
    assert opened.dtype == torch.bfloat16
    assert opened.card.source_layout == "transformers"
    assert opened.card.source_digest == open_checkpoint(folder).digest() != opened.digest()


def test_an_existing_output_is_kept_unless_forced(folder):
    path = convert(folder)
    before = path.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=f"{path}: exists already: use --force to replace it"):
        convert(folder)
    assert path.stat().st_mtime_ns == before
    convert(folder, force=True)
    assert path.stat().st_mtime_ns > before


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
@pytest.mark.parametrize("size", ["20KB", 20_000, "0.02MB", "20000"])
def test_arguments_as_the_command_line_and_transformers_take_them(folder, tmp_path, dtype, size):
    out = convert(str(folder), str(tmp_path / "out"), to="transformers", dtype=dtype, max_shard_size=size)
    assert DINOv3ViT.from_pretrained(out).dtype == torch.bfloat16
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1 and all(sum(t.nbytes for t in load_file(s).values()) <= 20_000 for s in shards)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), ("1.5 mb", 1_500_000), ("2TB", 2 * 10**12), (7, 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "int8"}, "dtype is 'int8': expected one of float32, float16, bfloat16, or None"),
        ({"dtype": torch.int8}, "dtype is torch.int8: expected one of"),
        ({"max_shard_size": "5 bananas"}, "max_shard_size is '5 bananas': expected a number of bytes"),
        ({"max_shard_size": 0}, "max_shard_size is 0: expected"),
        ({"max_shard_size": -5}, "max_shard_size is -5: expected"),
        ({"max_shard_size": True}, "max_shard_size is True: expected"),
        ({"max_shard_size": None}, "max_shard_size is None: expected"),
        ({"to": None}, "to is None: expected one of lite"),
    ],
    ids=str,
)
def test_other_arguments_are_refused_before_anything_begins(arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        convert("org/nowhere", **arguments)


def test_an_unknown_layout(folder):
    with pytest.raises(ValueError, match="to is 'keras': expected one of lite, transformers, meta, timm"):
        convert(folder, to="keras")


@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_overwritten(folder, force):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"model.safetensors: is the source itself: give another --output"):
        convert(folder, to="timm", force=force, allow_loss=True)
    with pytest.raises(FileExistsError, match=r"dinov3_lite.safetensors: is the source itself"):
        convert(convert(folder), force=force)
    assert (folder / "model.safetensors").read_bytes() == before


def test_weights_that_are_not_numbers_survive(tmp_path):
    weights = trained_like(TINY)
    weights["norm.bias"][0] = float("nan")
    folder = write_checkpoint(tmp_path, TINY, weights)
    with pytest.warns(UserWarning, match="NaN or infinity in tensor 'norm.bias': kept as it is"):
        path = convert(folder, dtype=torch.float16)
    state = DINOv3ViT.from_pretrained(path).state_dict()
    assert state["norm.bias"][0].isnan() and state["norm.bias"][1:].isfinite().all()


def test_the_licence_goes_along(folder, tmp_path):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    path = convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "DINOv3 License Agreement"
    assert open_checkpoint(path).card.license == "dinov3-license"
    assert open_checkpoint(convert(path, tmp_path / "again")).card.license == "dinov3-license"


def test_the_source_behind_a_link_is_not_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"out.model.safetensors: is the source itself"):
        convert(folder, out, to="transformers", force=True)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_licence_that_is_there_stays(folder, tmp_path):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    out = tmp_path / "out"
    out.mkdir()
    (out / "LICENSE.md").write_text("another's")
    convert(folder, out)
    assert (out / "LICENSE.md").read_text() == "another's"


@pytest.mark.parametrize("to", ["transformers", "timm"])
def test_a_layout_that_is_a_folder_makes_one_of_any_name(to, tmp_path):
    folder = write_checkpoint(tmp_path / "source", TIMMS)
    out = convert(folder, tmp_path / "dots.safetensors", to=to, allow_loss=True)
    assert out == tmp_path / "dots.safetensors" and (out / "model.safetensors").is_file()


def test_the_british_licence_goes_along_too(folder, tmp_path):
    (folder / "LICENCE").write_text("DINOv3 License Agreement")
    assert open_checkpoint(convert(folder, tmp_path / "out")).card.license == "dinov3-license"
    assert (tmp_path / "out" / "LICENCE").exists()


def test_an_index_of_many_megabytes_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 500)
    assert (folder / "config.json").stat().st_size > 500
    with pytest.raises(ValueError, match=r"config.json: \d+ bytes, expected a JSON file of at most 500"):
        open_checkpoint(folder)


def test_what_is_carried_along_keeps_its_own_dtype(folder, tmp_path):
    meta = convert(folder, tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    norm = {f"local_cls_norm.{part}": torch.randn(32).bfloat16() for part in ("weight", "bias")}
    torch.save(tensors | norm, meta)
    back = torch.load(convert(convert(meta, tmp_path / "lite"), tmp_path / "back", to="meta"), weights_only=True)
    for name, tensor in norm.items():
        assert back[name].dtype == torch.bfloat16 and torch.equal(back[name], tensor)


def test_tokens_of_our_own_float16_file_stay_float32(tmp_path):
    """Where float16 is too narrow: released registers reach tens of thousands in a stream that adds to them."""
    weights = trained_like(TINY)
    weights["embeddings.register_tokens"][0, 1, 7] = 90000.0
    file = convert(write_checkpoint(tmp_path / "model", TINY, weights), tmp_path / "half", dtype=torch.float16)
    tensors = load_file(file)
    wide = {"cls_token", "register_tokens", "mask_token", "rope_embed.periods"}
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float32} == wide
    assert tensors["register_tokens"][0, 1, 7] == DINOv3ViT.from_pretrained(file).register_tokens[0, 1, 7] == 90000.0


def test_the_index_of_shards_that_are_gone_is_not_of_the_file_beside_it(folder):
    """An index that transformers' own save leaves behind."""
    index = {"weight_map": dict.fromkeys(trained_like(TINY), "model-00001-of-00002.safetensors")}
    expected = open_checkpoint(folder).weights_id
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).weights_id == expected


def test_the_source_is_remembered_through_a_cast_and_another_conversion(folder, tmp_path):
    half = convert(folder, tmp_path / "half", dtype=torch.bfloat16)
    assert open_checkpoint(convert(half, tmp_path / "again")).card.source_digest == open_checkpoint(folder).digest()


def test_what_lies_beside_a_file_that_was_named_is_not_about_it_if_it_is_of_other_sizes(folder, tmp_path):
    meta = convert(folder, tmp_path / "meta", to="meta")
    write_checkpoint(meta.parent, replace(TINY, hidden_size=64), {"x": torch.zeros(1)})
    opened = open_checkpoint(meta)
    assert opened.config == TINY and opened.card.preprocessing is None
