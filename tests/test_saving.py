"""Saving into folders that hold something, and what a layout of one dtype would round."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import TINY, trained_like, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from convert import convert
from dinov3_lite import DINOv3ViT, ImageProcessor
from dinov3_lite.checkpoint import CONVERTED, open_checkpoint
from dinov3_lite.checkpoint.layouts import tensors_of
from dinov3_lite.extraction.compute import weights_digest
from dinov3_lite.extraction.job import checkpoint_digest
from dinov3_lite.sample import write_sample

WIDE = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96)  # timm's files don't say heads


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "source", TINY)


def trained(folder) -> DINOv3ViT:
    model = DINOv3ViT.from_pretrained(folder)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    return model


# ---- beside other weights


@pytest.mark.parametrize("layout", ["lite", "meta"])
def test_a_folder_of_other_weights_is_not_saved_into(layout, folder):
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=r"source/model.safetensors: other weights lie where the model is to be saved"):
        trained(folder).save_pretrained(folder, layout=layout)
    assert sorted(folder.iterdir()) == before
    file = folder / ("tuned.safetensors" if layout == "lite" else "tuned.pth")
    assert DINOv3ViT.from_pretrained(trained(folder).save_pretrained(file, layout=layout)).norm.weight[0] != 0


def test_a_folder_with_our_file_of_other_weights_is_not_saved_into(folder, tmp_path):
    model = trained(folder)
    saved = model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", layout="transformers")  # the same weights
    assert torch.equal(DINOv3ViT.from_pretrained(tmp_path / "saved").norm.weight, model.norm.weight)
    with pytest.raises(ValueError, match=rf"saved/{CONVERTED}: other weights lie where"):
        DINOv3ViT.from_pretrained(folder).save_pretrained(tmp_path / "saved", layout="transformers")
    assert torch.equal(DINOv3ViT.from_pretrained(saved).norm.weight, model.norm.weight)


def test_the_same_weights_are_saved_beside_themselves(folder):
    model = DINOv3ViT.from_pretrained(folder)
    assert model.save_pretrained(folder) == folder / CONVERTED
    assert torch.equal(DINOv3ViT.from_pretrained(folder).norm.weight, model.norm.weight)


def test_nobody_is_told_to_replace_what_a_model_was_saved_to(folder):
    trained(folder).save_pretrained(folder / CONVERTED)  # by its name
    with pytest.raises(ValueError, match="a model was saved here, beside other weights: load one of them") as error:
        DINOv3ViT.from_pretrained(folder)
    assert "--force" not in str(error.value)


def test_what_is_left_of_an_earlier_checkpoint_goes(folder, tmp_path):
    shards = convert(folder, tmp_path / "shards", to="transformers", max_shard_size=20_000)
    assert len(list(shards.glob("model-*"))) > 2 and ImageProcessor.from_pretrained(shards)
    model = trained(write_checkpoint(tmp_path / "plain", TINY, preprocessing=None))
    model.save_pretrained(shards, layout="transformers")
    assert {file.name for file in shards.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert torch.equal(DINOv3ViT.from_pretrained(shards).norm.weight, model.norm.weight)


def test_a_card_that_somebody_wrote_stays(folder, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").write_text("Of my own.")
    DINOv3ViT.from_pretrained(folder).save_pretrained(tmp_path / "saved", layout="transformers")
    assert (tmp_path / "saved" / "README.md").read_text() == "Of my own."


@pytest.mark.parametrize(("name", "layout"), [("x.pth", "lite"), ("x.bin", "lite"), ("x.pt", "meta")])
def test_a_file_called_as_those_of_another_layout_are(name, layout, folder, tmp_path):
    model = DINOv3ViT.from_pretrained(folder)
    for write in (model.save_pretrained, lambda path, layout: convert(folder, path, to=layout)):
        with pytest.raises(ValueError, match=rf"{name}: a file of the {layout} layout ends in \.\w+, not \.\w+"):
            write(tmp_path / name, layout)
    assert not (tmp_path / name).exists()


def test_a_sample_is_not_made_where_a_model_was_saved(tmp_path):
    DINOv3ViT(TINY).save_pretrained(tmp_path / "saved")
    with pytest.raises(FileExistsError, match=f"saved: holds a {CONVERTED} already"):
        write_sample(tmp_path / "saved")


# ---- dtypes


@pytest.mark.parametrize("to", ["transformers", "meta"])
def test_tokens_are_not_rounded_unasked(to, folder, tmp_path):
    half = convert(folder, tmp_path / "half.safetensors", dtype="float16")  # its tokens are float32
    with pytest.raises(ValueError, match=r"can't hold .*'cls_token': it is torch.float32 among weights of torch.float"):
        convert(half, tmp_path / "out", to=to)
    with pytest.raises(ValueError, match="'cls_token': it is torch.float32 among weights of torch.float16.*say which"):
        DINOv3ViT.from_pretrained(half).save_pretrained(tmp_path / "out", layout=to)
    out = convert(half, tmp_path / "out", to=to, dtype="float16", allow_loss=to == "meta")
    assert open_checkpoint(out).tensor("cls_token").dtype == torch.float16
    wide = convert(half, tmp_path / "wide", to="transformers", dtype="float32")
    assert open_checkpoint(wide).digest(torch.float16) == open_checkpoint(half).digest()


@pytest.mark.parametrize("layout", ["transformers", "meta"])
def test_weights_in_float16_are_the_same_in_every_layout(layout, tmp_path):
    weights = {name: w.half() for name, w in trained_like(TINY).items()}
    folder = write_checkpoint(tmp_path / "half", TINY, weights)
    ours = convert(folder, tmp_path / "x.safetensors")
    opened = [open_checkpoint(path) for path in (folder, ours, convert(ours, tmp_path / "other", to=layout))]
    assert len({checkpoint.digest() for checkpoint in opened}) == 1
    assert len({checkpoint.card.digest or checkpoint.digest() for checkpoint in opened}) == 1
    state = DINOv3ViT.from_pretrained(folder).state_dict()
    expected = weights_digest(sorted(tensors_of(state, TINY).items()))
    assert [checkpoint_digest(checkpoint) for checkpoint in opened] == [expected] * 3


def test_a_copy_of_another_mask_token_is_stale(folder):
    convert(folder)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.mask_token"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{CONVERTED}: was converted from other weights"):
        DINOv3ViT.from_pretrained(folder)


def test_a_copy_of_weights_that_are_no_numbers_is_not_stale(tmp_path):
    weights = trained_like(TINY)
    weights["embeddings.mask_token"][..., :2] = torch.nan
    weights["norm.weight"][3] = torch.nan
    folder = write_checkpoint(tmp_path / "nan", TINY, weights)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        convert(folder)
    model = DINOv3ViT.from_pretrained(folder)
    assert "changed" not in model.weights_id
    nn.init.ones_(model.norm.weight)
    assert "changed" in model.weights_id
