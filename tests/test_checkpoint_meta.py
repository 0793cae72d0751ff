"""Meta's own class writes files and strictly loads ours: run where DINOV3_REPO names a clone of facebookresearch/dinov3.

git clone https://github.com/facebookresearch/dinov3 && DINOV3_REPO=dinov3 pytest tests/test_checkpoint_meta.py
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import relative_error, write_checkpoint

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.config import VARIANTS

REPOSITORY = os.environ.get("DINOV3_REPO", "")
pytestmark = pytest.mark.skipif(not Path(REPOSITORY, "dinov3").is_dir(), reason="DINOV3_REPO names no clone of Meta's")

SATELLITE = "vitl16, satellite"
OTHERS = ("vitt16", "vitg16")  # EUPE's and LingBot's: Meta's hub code has no function for them
METAS = [name for name in VARIANTS if name not in OTHERS]
CASES = [*METAS, SATELLITE]
# The hub functions build the released sizes: deep models are cut, the 7B's feed-forward layer too.
CUTS = {"vit7b16": {"depth": 1, "ffn_ratio": 1 / 32}}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function of a variant's name, and of the weights to load, that calls Meta's hub function for two blocks."""
    monkeypatch.syspath_prepend(REPOSITORY)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))  # where Meta's loader copies what it loads
    from dinov3.hub import backbones
    from dinov3.models import vision_transformer

    whole = vision_transformer.DinoVisionTransformer

    def load(name: str, weights: object = None):
        variant = name.split(",")[0]
        cut = CUTS.get(variant, {"depth": 2})
        monkeypatch.setattr(vision_transformer, "DinoVisionTransformer", lambda **kwargs: whole(**{**kwargs, **cut}))
        if weights is None and name == SATELLITE:  # what makes the hub function give it the norm of local crops
            return getattr(backbones, f"dinov3_{variant}")(pretrained=False, weights=backbones.Weights.SAT493M).eval()
        options = {"pretrained": False} if weights is None else {"weights": str(weights)}
        return getattr(backbones, f"dinov3_{variant}")(**options).eval()

    return load


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Statistics of trained weights: no bias is zero, no gain is one."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(torch.exp(0.7 * torch.randn_like(parameter)))
        elif "gamma" in name:
            parameter.copy_(10 ** (2 * torch.rand_like(parameter) - 2))
        elif parameter.ndim > 1 and "token" not in name:
            parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("masks", ["one, zero, one", "zeros, as released", "ones"])
@pytest.mark.parametrize("name", CASES)
def test_both_ways(name, masks, hub, tmp_path):
    theirs = hub(name)
    randomize(theirs)
    for key, buffer in theirs.named_buffers():
        if key.endswith("bias_mask") and not masks.startswith("one, "):
            buffer.fill_(float(masks == "ones"))
    state = theirs.state_dict()
    torch.save(state, tmp_path / "theirs.pth")
    ours = DINOv3ViT.from_pretrained(tmp_path / "theirs.pth")
    assert masks == "ones" or ours.config.key_bias is False

    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        features = {"ours": ours(images).last_hidden_state, "theirs": tokens(theirs(images, is_training=True))}
        truth = tokens(theirs.double()(images.double(), is_training=True))
    theirs.float()
    errors = {who: relative_error(x, truth) for who, x in features.items()}
    assert errors["ours"] <= 1.5 * errors["theirs"], errors

    back = convert(convert(tmp_path / "theirs.pth", tmp_path / "lite"), tmp_path / "back", to="meta")
    if masks == "ones" and ours.config.key_bias:
        return  # Meta's hub models have a mask, which a model with a key bias is written without
    if name.startswith("vitl16"):  # cut models have no released name, and Meta's function for ViT-L looks for its end
        back = back.rename(back.with_name(f"dinov3_vitl16-{'eadcf0ff' if name == SATELLITE else '8aa4cbdd'}.pth"))
    loaded = hub(name, back).state_dict()
    assert loaded.keys() == state.keys()
    for key, tensor in state.items():
        if not key.endswith(("attn.qkv.bias", "attn.qkv.bias_mask")):
            assert torch.equal(loaded[key], tensor), key
        elif key.endswith("bias"):
            a, b = (s[key] * s[f"{key}_mask"] for s in (loaded, state))
            assert torch.equal(a, b), key


def tokens(out: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = (out["x_norm_clstoken"].unsqueeze(1), out["x_storage_tokens"], out["x_norm_patchtokens"])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", METAS)
def test_its_strict_loader_takes_what_we_make_of_a_transformers_folder(name, hub, tmp_path):
    config = replace(VARIANTS[name], num_hidden_layers=CUTS.get(name, {"depth": 2})["depth"])
    if name == "vit7b16":
        config = replace(config, intermediate_size=128)
    path = convert(write_checkpoint(tmp_path / "source", config), tmp_path / "meta", to="meta")
    named = path.rename(path.with_name("dinov3-8aa4cbdd.pth"))
    theirs, ours = hub(name, named), DINOv3ViT.from_pretrained(tmp_path / "source")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(ours(images).last_hidden_state, tokens(theirs(images, is_training=True))) < 5e-6


def test_the_names_of_whole_models_are_those_that_the_hub_code_expects(hub, tmp_path):
    del hub
    from dinov3.hub import backbones

    source = Path(backbones.__file__).read_text()
    from dinov3_lite.checkpoint.layouts.meta import HASHES

    assert all(f'"{digits}"' in source for digits in (*HASHES.values(), "eadcf0ff"))
    assert DINOv3Config.from_name("vitl16") == VARIANTS["vitl16"]


def test_models_without_registers(hub, tmp_path):
    """Its class has no `storage_tokens` then: an empty tensor of that name is one too many for its strict loader."""
    del hub
    from dinov3.models.vision_transformer import DinoVisionTransformer

    config = replace(VARIANTS["vits16"], num_hidden_layers=2, num_register_tokens=0)
    source = write_checkpoint(tmp_path / "source", config)
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 2, "num_heads": 6, "ffn_ratio": 4, "n_storage_tokens": 0}
    released = {
        "layerscale_init": 1e-5,
        "mask_k_bias": True,
        "pos_embed_rope_dtype": "fp32",
        "norm_layer": "layernormbf16",
    }
    theirs = DinoVisionTransformer(**sizes, **released).eval()
    theirs.load_state_dict(torch.load(convert(source, tmp_path / "meta", to="meta"), weights_only=True), strict=True)
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        ours = DINOv3ViT.from_pretrained(source)(images).last_hidden_state
        assert relative_error(ours, tokens(theirs(images, is_training=True))) < 5e-6
