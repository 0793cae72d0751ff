"""timm's files: what they can't hold, and what timm itself makes of ours."""

from __future__ import annotations

import json
from dataclasses import replace

import convnexts
import pytest
import torch
from convnexts import TINY_CONVNEXT
from helpers import PREPROCESSING, TINY, relative_error, run_reference, trained_like, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ConvNeXtConfig, DINOv3ViT, ImageProcessor, load
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.layouts import LAYOUTS
from dinov3_lite.checkpoint.layouts.table import Card
from dinov3_lite.config import CONVNEXTS, VARIANTS

# A width of which timm's layout can tell the head dim (64).
WIDE = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96)


def holdable(config: DINOv3Config) -> dict[str, torch.Tensor]:
    """Weights that every layout can hold: without a mask token, which timm has not."""
    weights = trained_like(config)
    weights["embeddings.mask_token"].zero_()
    return weights


def test_timm_has_no_mask_token(tmp_path):
    source = write_checkpoint(tmp_path / "source", WIDE)
    with pytest.raises(
        ValueError, match="the timm layout can't hold 'mask_token': it has no mask token: use --allow-loss"
    ):
        convert(source, tmp_path / "timm", to="timm")
    back = convert(convert(source, tmp_path / "timm", to="timm", allow_loss=True))
    assert (DINOv3ViT.from_pretrained(back).mask_token == 0).all()


# Loads each folder as its model card says, strictly; saves its features and, as timm does it, the model.
LOADED_BY_TIMM = """
import json, pathlib, timm, torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

for folder in pathlib.Path().iterdir():
    if (folder / "images.safetensors").exists():
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            features = model.forward_features(load_file(folder / "images.safetensors")["images"])
        save_file({"features": features.contiguous()}, folder / "features.out")
        save_for_hf(model, folder / "again", safe_serialization=True)
"""
GATED = replace(WIDE, use_gated_mlp=True, hidden_act="silu")
# None is of a size that timm has a model of; what makes each one worth trying.
ANY_SIZE = {
    "heads of 16 channels, patches of 8": TINY,
    "heads of 16 channels, of a width that released heads divide": replace(WIDE, num_attention_heads=8),
    "no registers": replace(TINY, num_register_tokens=0),
    "no query and value bias": replace(WIDE, query_bias=False, value_bias=False),
    "four channels": replace(WIDE, num_channels=4, patch_size=16),
    "other RoPE periods": replace(WIDE, rope_theta=31.5),
    "patches that don't divide 224": replace(WIDE, patch_size=12),
    "a width that a quotient misses": replace(WIDE, hidden_size=196, num_attention_heads=7, intermediate_size=107),
    "gated, no registers": replace(GATED, num_register_tokens=0),
    "gated, a width that is rounded up": replace(GATED, intermediate_size=85),
    "LingBot's giant, cut": replace(DINOv3Config.from_name("vitg16"), num_hidden_layers=1, intermediate_size=4096),
    "EUPE's tiny, cut": replace(DINOv3Config.from_name("vitt16"), num_hidden_layers=2),
    "ConvNeXt": TINY_CONVNEXT,
    "ConvNeXt, silu": replace(TINY_CONVNEXT, hidden_act="silu", layer_norm_eps=1e-4, num_channels=1),
}


@torch.no_grad()
def test_timm_loads_models_of_any_size_and_we_what_it_saves(tmp_path):
    ours = {}
    for i, (name, config) in enumerate(ANY_SIZE.items()):
        if isinstance(config, DINOv3ConvNeXtConfig):
            weights = {
                n: t for n, t in convnexts.renamed(convnexts.trained_like(config), convnexts.TRANSFORMERS).items()
            }
        else:
            weights = holdable(config)
        source = write_checkpoint(tmp_path / "source" / name, config, weights, (PREPROCESSING, None)[i % 2])
        folder = convert(source, tmp_path / "timm" / name, to="timm")
        assert open_checkpoint(folder).config == config, name
        assert open_checkpoint(folder / "model.safetensors").config == config, name
        side = 4 * getattr(config, "patch_size", 16)
        images = torch.randn(2, config.num_channels, side, 2 * side)
        save_file({"images": images}, folder / "images.safetensors")
        ours[name] = load(source)(images).last_hidden_state
    (tmp_path / "code.py").write_text(LOADED_BY_TIMM)
    run_reference("run_with_timm.py", tmp_path / "code.py", cwd=tmp_path / "timm")
    for name, config in ANY_SIZE.items():
        folder = tmp_path / "timm" / name
        theirs = load_file(folder / "features.out")["features"]
        if isinstance(
            config, DINOv3ConvNeXtConfig
        ):  # its last map comes before the norm, and without the mean as a token
            model = load(folder)
            theirs = model.norm(theirs.flatten(2).mT)
            ours[name] = ours[name][:, 1:]
        assert relative_error(theirs, ours[name]) < 5e-6, name
        again, first = open_checkpoint(folder / "again"), open_checkpoint(folder)
        assert again.config == first.config, name
        assert all(torch.equal(again.tensor(n), first.tensor(n)) for n in first.names()), name


def test_models_that_timm_has_by_name_are_written_without_arguments():
    """As the released config.json files are; it has no gated L, and LingBot's giant has other widths."""
    for name, config in (VARIANTS | CONVNEXTS).items():
        said = LAYOUTS["timm"].write_card(Card(config=config)).files["config.json"]
        assert ("model_args" in said) == (name in ("vitl16plus", "vitg16")), name
    said = LAYOUTS["timm"].write_card(Card(config=VARIANTS["vitl16plus"])).files["config.json"]
    assert said == {
        "num_classes": 0,
        "num_features": 1024,
        "architecture": "vit_small_plus_patch16_dinov3_qkvb",
        "model_args": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "swiglu_align_to": 1},
        "pretrained_cfg": {},  # without it, timm takes all of this for one
    }


UNSAYABLE = {"proj_bias": False}, {"mlp_bias": False}, {"value_bias": False}, {"hidden_act": "silu"}


@pytest.mark.parametrize("changes", UNSAYABLE, ids=lambda changes: next(iter(changes)))
def test_a_model_that_none_of_timms_can_be_is_not_named(changes, tmp_path):
    """Its heads are said nowhere then, and readers can't tell them unless they are of the released width."""
    config = replace(TINY, **changes)
    assert "architecture" not in LAYOUTS["timm"].write_card(Card(config=config)).files["config.json"]
    source = write_checkpoint(tmp_path / "source", config, holdable(config))
    why = "its width 32 is no multiple of 64, the head dim of released models: it has no RoPE periods"
    with pytest.raises(ValueError, match=f"the timm layout can't hold the config: its files don't say it, .*{why}"):
        convert(source, tmp_path / "timm", to="timm")
    folder = convert(source, tmp_path / "timm", to="timm", allow_loss=True)
    with pytest.raises(ValueError, match=why):
        DINOv3ViT.from_pretrained(folder)


ARGUMENTS = {
    "another network": ({"rope_rotate_half": False}, "model_args says 'rope_rotate_half': False, and whether that is"),
    "no number": ({"mlp_ratio": "4"}, "model_args says mlp_ratio: '4'.*expected numbers"),
    "infinite": ({"mlp_ratio": 1e400}, "model_args says mlp_ratio: inf"),
    "text": ({"embed_dim": "wide"}, "hidden_size is 'wide': expected int"),
    "contradiction": ({"num_heads": 7}, "hidden_size 32 does not divide into num_attention_heads 7"),
    "other tensors": ({"depth": 2}, "blocks.2"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_believed_as_far_as_they_are_known(name, tmp_path):
    arguments, message = ARGUMENTS[name]
    folder = convert(write_checkpoint(tmp_path / "source", TINY, holdable(TINY)), tmp_path / "timm", to="timm")
    content = json.loads((folder / "config.json").read_text())
    content["model_args"] |= arguments
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        DINOv3ViT.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_what_is_said_of_an_unknown_model_is_left_to_the_tensors(tmp_path):
    folder = convert(write_checkpoint(tmp_path / "source", WIDE, holdable(WIDE)), tmp_path / "timm", to="timm")
    content = json.loads((folder / "config.json").read_text())
    for said in ({"architecture": "vit_next_patch16_dinov4"}, {"model_args": None}, {"architecture": 5}):
        (folder / "config.json").write_text(json.dumps(content | said))
        assert open_checkpoint(folder).config == WIDE


@pytest.mark.parametrize("preprocessing", [None, {"size": {"shortest_edge": 7}}, {"size": 5, "image_mean": 0.5}])
def test_preprocessing_that_timm_is_not_told(preprocessing, tmp_path):
    source = write_checkpoint(tmp_path / "source", WIDE, holdable(WIDE), preprocessing)
    folder = convert(source, tmp_path / "timm", to="timm")
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"] == {}


def test_timm_has_no_key_bias(tmp_path):
    config = replace(WIDE, key_bias=True)
    source = write_checkpoint(tmp_path / "source", config, holdable(config))
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv.k_bias' \(and 2 more\): it has no key bias"):
        convert(source, tmp_path / "timm", to="timm")


@pytest.mark.parametrize(
    ("name", "changes", "architecture"),
    [
        ("vits16", {}, "vit_small_patch16_dinov3_qkvb"),
        ("vits16", {"query_bias": False, "value_bias": False}, "vit_small_patch16_dinov3"),
        ("vits16plus", {}, "vit_small_plus_patch16_dinov3_qkvb"),
    ],
)
def test_timm_itself_loads_what_we_write_and_agrees(name, changes, architecture, tmp_path):
    config = replace(DINOv3Config.from_name(name), **changes)
    source = write_checkpoint(tmp_path / "source", config, holdable(config))
    folder = convert(source, tmp_path / "timm", to="timm")
    images = torch.randn(2, 3, 64, 96)
    save_file({"images": images}, tmp_path / "images.safetensors")
    files = tmp_path / "images.safetensors", tmp_path / "out.safetensors"
    printed = run_reference("reference_timm.py", folder, *files, cwd=tmp_path)
    assert printed.strip() == architecture
    theirs = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        ours = DINOv3ViT.from_pretrained(folder)(images).last_hidden_state
    assert relative_error(theirs["features"], ours) < 5e-6
    assert ImageProcessor.from_pretrained(folder).size == (224, 224)


@pytest.mark.parametrize("to", ["meta", "timm"])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_number_of_channels_is_read_off_the_tensors(channels, to, tmp_path):
    config = replace(WIDE, num_channels=channels)
    source = write_checkpoint(tmp_path / "source", config, holdable(config))
    out = convert(source, tmp_path / "out", to=to)
    assert open_checkpoint(out).config == config
    if to == "timm":
        said = json.loads((out / "config.json").read_text())["pretrained_cfg"]
        assert said["input_size"] == [channels, 224, 224]
