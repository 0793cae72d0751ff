"""timm's files: what they can't hold, and what timm itself makes of ours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import TINY, relative_error, run_reference, trained_like, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT, ImageProcessor
from dinov3_lite.checkpoint import open_checkpoint

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


WITH_HEADS = """
import sys, timm, torch
from safetensors.torch import load_file

try:
    timm.create_model("local-dir:timm", pretrained=True)
except KeyError as error:
    print("refused, no", error)
images = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
sizes = {"embed_dim": 32, "depth": 3, "patch_size": 8, "mlp_ratio": 2, "img_size": 64, "num_classes": 0}
outputs = []
for heads in (2, 4):
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", num_heads=heads, **sizes).eval()
    model.load_state_dict(load_file("timm/model.safetensors"), strict=True)
    with torch.no_grad():
        outputs.append(model(images))
print("apart by", ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item())
"""


def test_heads_of_another_width_are_said_nowhere(tmp_path):
    """No reader could tell them: timm refuses the folder, and takes its tensors with any number of heads."""
    source = write_checkpoint(tmp_path / "source", TINY, holdable(TINY))
    why = "its width 32 is no multiple of 64, the head dim of released models: it has no RoPE periods"
    with pytest.raises(ValueError, match=f"the timm layout can't hold the config: its files don't say it, .*{why}"):
        convert(source, tmp_path / "timm", to="timm")
    folder = convert(source, tmp_path / "timm", to="timm", allow_loss=True)
    with pytest.raises(ValueError, match=why):
        DINOv3ViT.from_pretrained(folder)
    (tmp_path / "code.py").write_text(WITH_HEADS)
    first, second = run_reference("run_with_timm.py", tmp_path / "code.py", cwd=tmp_path).splitlines()[-2:]
    assert first == "refused, no 'architecture'"
    assert float(second.removeprefix("apart by ")) > 0.01


@pytest.mark.parametrize("preprocessing", [None, {"size": {"shortest_edge": 7}}, {"size": 5, "image_mean": 0.5}])
def test_preprocessing_that_timm_is_not_told(preprocessing, tmp_path):
    source = write_checkpoint(tmp_path / "source", WIDE, holdable(WIDE), preprocessing)
    folder = convert(source, tmp_path / "timm", to="timm")
    assert "pretrained_cfg" not in json.loads((folder / "config.json").read_text())


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
