"""A fifth layout is one file: here it is, with other names, another container and a side file of its own."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from helpers import PREPROCESSING, TINY, trained_like, write_checkpoint

from convert import convert
from convert.__main__ import main
from dinov3_lite import DINOv3Config, DINOv3ViT, ImageProcessor
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.layouts import LAYOUTS, detect
from dinov3_lite.checkpoint.layouts.table import Beside, Card, Layout, Row, Table
from dinov3_lite.checkpoint.layouts.vit import NO_MASK_TOKEN, TENSORS, VIT

RENAMED = {
    tensor.name: tensor.name.replace("blocks.{i}", "encoder.stage.{i}.body").replace("cls_token", "summary")
    for tensor in TENSORS
    if "qkv.weight" not in tensor.name and tensor.name != "mask_token"
}
ROWS = (
    *(Row((ours,), (theirs,)) for ours, theirs in RENAMED.items()),
    Row(("blocks.{i}.attn.qkv.weight",), tuple(f"encoder.stage.{{i}}.body.{part}" for part in ("wq", "wk", "wv"))),
)


def read_card(beside: Beside) -> Card:
    said = beside.files.get("about.json", {})
    config = DINOv3Config.from_dict(said["shape"]) if "shape" in said else None
    return Card(config, said.get("pictures"), beside.license, said.get("remark", ""))


def write_card(card: Card) -> Beside:
    content = {"shape": card.config.to_dict(), "pictures": card.preprocessing, "remark": card.note}
    return Beside(files={"about.json": content}, license=card.license)


NEW = Layout(
    name="new",
    tables={DINOv3Config: Table(VIT, ROWS, assumed={"mask_token": NO_MASK_TOKEN})},
    container=".pt",
    files=("network.pt",),
    read_card=read_card,
    write_card=write_card,
    file_name=lambda card, carried: "network.pt",
    side_files=("about.json",),
    is_folder=True,
)
WIDE = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "new", NEW)


@pytest.fixture
def source(tmp_path):
    weights = trained_like(WIDE)
    weights["embeddings.mask_token"].zero_()
    preprocessing = {**PREPROCESSING, "size": {"height": 96, "width": 160}}
    return write_checkpoint(tmp_path / "source", WIDE, weights, preprocessing)


@pytest.mark.parametrize(
    "chain", list(itertools.permutations(["lite", "transformers", "meta", "timm"], 2)), ids="-".join
)
def test_it_goes_through_all_others_and_back(chain, source, tmp_path):
    expected = open_checkpoint(source)
    path = source
    for i, to in enumerate(["new", chain[0], "new", chain[1], "new", "transformers"]):
        path = convert(path, tmp_path / str(i), to=to)
        result = open_checkpoint(path)
        assert result.config == expected.config and result.digest() == expected.digest()
        for name in expected.names():
            assert torch.equal(result.tensor(name), expected.tensor(name)), (to, name)


def test_its_files_are_as_it_says(source, tmp_path):
    folder = convert(source, tmp_path / "out", to="new", dtype=torch.bfloat16)
    assert sorted(p.name for p in folder.iterdir()) == ["about.json", "network.pt"]
    tensors = torch.load(folder / "network.pt", weights_only=True)
    assert tensors["encoder.stage.2.body.wk"].shape == (128, 128) and tensors["summary"].dtype == torch.bfloat16
    assert json.loads((folder / "about.json").read_text())["pictures"]["size"]["width"] == 160
    assert detect(tensors) == (NEW, DINOv3Config)
    assert DINOv3ViT.from_pretrained(folder).weights_id.startswith("new ")
    assert ImageProcessor.from_pretrained(folder).size == (96, 160)


def test_it_is_told_what_it_can_not_hold_and_offered_by_the_command(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "source", WIDE)
    assert main([str(source), "--to", "new", "--output", str(tmp_path / "out")]) == 1
    assert "the new layout can't hold 'mask_token': it has no mask token" in capsys.readouterr().err
    assert main([str(source), "--to", "new", "--output", str(tmp_path / "out"), "--allow-loss", "--verify"]) == 0
    assert f"verified: {len(open_checkpoint(source).names()) - 1} tensors equal" in capsys.readouterr().out


def test_within_a_bigger_model_it_is_found_by_its_names(source, tmp_path):
    folder = convert(source, tmp_path / "out", to="new")
    tensors = torch.load(folder / "network.pt", weights_only=True)
    bigger = {f"module.net.{name}": tensor for name, tensor in tensors.items()} | {"head.bias": torch.zeros(3)}
    torch.save(bigger, folder / "network.pt")
    opened = open_checkpoint(folder)
    assert opened.layout is NEW and opened.left_out == {"head.bias": "outside of 'module.net.'"}
