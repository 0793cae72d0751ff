"""Saving what was trained, and the name of weights, which ends with the first change to them."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import PREPROCESSING, TINY, TINY_GATED, trained_like, write_checkpoint
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from convert import convert
from dinov3_lite import DINOv3ViT, ImageProcessor, load_weights, optimize_for_inference
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.saving import checkpoint_of
from dinov3_lite.checkpoint.spans import StoredTensor
from dinov3_lite.pretrained import WithoutWeights

CHANGED = "transformers, changed since it was loaded"
WIDE = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96)  # timm's files don't say heads


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(
        tmp_path / "source", TINY, preprocessing={**PREPROCESSING, "size": {"height": 96, "width": 160}}
    )


def train(model, steps: int = 1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(torch.randn(1, 3, 16, 16)).patch_tokens.square().mean().backward()
        optimizer.step()
    return model


def same_features(a, b) -> bool:
    images = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        return torch.equal(a(images).last_hidden_state, b(images).last_hidden_state)


@pytest.mark.parametrize("layout", ["lite", "transformers", "meta", "timm"])
def test_what_was_trained_is_saved_and_read_back(layout, tmp_path):
    weights = trained_like(WIDE)
    weights["embeddings.mask_token"].zero_()
    source = write_checkpoint(
        tmp_path / "source", WIDE, weights, {**PREPROCESSING, "size": {"height": 96, "width": 160}}
    )
    model = train(DINOv3ViT.from_pretrained(source)).eval()
    path = model.save_pretrained(tmp_path / "saved", layout=layout)
    again = DINOv3ViT.from_pretrained(path)
    assert same_features(again, model) and again.config == model.config
    assert not again.weights_id.startswith(DINOv3ViT.from_pretrained(source).weights_id)
    if layout != "meta":  # whose files say nothing of images
        assert ImageProcessor.from_pretrained(path).size == (96, 160)
    assert same_features(DINOv3ViT.from_pretrained(convert(path, tmp_path / "converted.safetensors")), model)


def test_a_file_by_its_name_a_dtype_and_another_time(folder, tmp_path):
    model = DINOv3ViT.from_pretrained(folder)
    path = model.save_pretrained(tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert path == tmp_path / "x.safetensors" and open_checkpoint(path).dtype == torch.bfloat16
    assert train(model).save_pretrained(path) == path
    assert same_features(DINOv3ViT.from_pretrained(path), model.eval())


def test_a_model_from_scratch_and_one_of_other_modules(tmp_path):
    model = DINOv3ViT(TINY_GATED).eval()
    assert same_features(DINOv3ViT.from_pretrained(model.save_pretrained(tmp_path / "scratch")), model)
    del model.blocks[1]
    again = DINOv3ViT.from_pretrained(model.save_pretrained(tmp_path / "shallow"))
    assert again.depth == 2 and same_features(again, model)
    model.blocks[0].attn.proj = torch.nn.Sequential(model.blocks[0].attn.proj)
    with pytest.raises(
        ValueError, match=r"the DINOv3ViT: lacks tensors 'blocks.0.attn.proj.bias', 'blocks.0.attn.proj.weight'"
    ):
        model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="layout is 'onnx': expected one of lite, transformers, meta, timm"):
        model.save_pretrained(tmp_path / "other", layout="onnx")
    assert not (tmp_path / "other").exists()


def test_a_layout_that_cannot_hold_it(folder, tmp_path):
    with pytest.raises(ValueError, match="the timm layout can't hold .*'mask_token': it has no mask token"):
        DINOv3ViT.from_pretrained(folder).save_pretrained(tmp_path / "timm", layout="timm")


def test_the_state_dict_alone_is_read(folder, tmp_path):
    model = train(DINOv3ViT.from_pretrained(folder)).eval()
    torch.save({"state_dict": {f"backbone.{name}": t for name, t in model.state_dict().items()}}, tmp_path / "x.ckpt")
    torch.save(model.state_dict(), tmp_path / "x.pth")
    for file in ("x.ckpt", "x.pth"):
        assert same_features(DINOv3ViT.from_pretrained(tmp_path / file), model)


def older(model: DINOv3ViT) -> dict[str, torch.Tensor]:
    """Its state dict with the names of our files, which were those of state dicts."""
    opened = checkpoint_of(model, {n: StoredTensor.in_memory(n, t) for n, t in model.state_dict().items()})
    return {name: opened.tensor(name) for name in opened.names()}


@pytest.mark.parametrize("config", [TINY, TINY_GATED, replace(TINY, key_bias=True), replace(TINY, query_bias=False)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_state_dict_is_the_model_by_its_newer_and_older_names(config, suffix, tmp_path):
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path / "source", config))
    for kind, state in (("newer", dict(model.state_dict())), ("older", older(model))):
        assert ("blocks.0.attn.qkv.bias" in state) == (kind == "newer")
        file = tmp_path / f"{kind}{suffix}"
        torch.save(state, file) if suffix == ".pth" else save_file(state, file)
        again = DINOv3ViT.from_pretrained(file)
        assert again.config == config and again.weights_id == open_checkpoint(file).weights_id
        assert again.weights_id.split()[0] == "lite" and model.weights_id.split()[1] == again.weights_id.split()[1]
        assert open_checkpoint(convert(file, tmp_path / f"{kind} converted.safetensors")).config == config
        load_weights(other := DINOv3ViT(config), file)
        for loaded in (again, other, DINOv3ViT.from_pretrained(tmp_path / f"{kind} converted.safetensors")):
            assert all(torch.equal(tensor, model.state_dict()[n]) for n, tensor in loaded.state_dict().items())


def test_a_new_models_state_dict_is_of_the_released_kind(tmp_path):
    torch.save(DINOv3ViT(TINY).state_dict(), tmp_path / "x.pth")
    assert DINOv3ViT.from_pretrained(tmp_path / "x.pth").config == TINY


def test_a_config_beside_a_state_dict_may_not_deny_what_acts(tmp_path):
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path / "source", replace(TINY, key_bias=True)))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(ValueError, match=r"x.pth: tensor 'blocks.0.attn.qkv.bias' holds a k_bias that is not zero"):
        DINOv3ViT.from_pretrained(tmp_path / "x.pth")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[32:64] = 0.0
    torch.save(model.state_dict(), tmp_path / "x.pth")
    for config in (TINY, replace(TINY, key_bias=True)):  # it says which third there is, beside zeros
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        assert DINOv3ViT.from_pretrained(tmp_path / "x.pth").config == config


CHANGES = {
    "training": train,
    "one number": lambda model: model.norm.bias.detach()[3].add_(1),
    "merging an adapter": lambda model: setattr(
        model.blocks[0].attn.proj.weight, "data", model.blocks[0].attn.proj.weight.data + 0.01
    ),
    "writing through .data": lambda model: model.blocks[1].mlp.fc1.weight.data.mul_(1.01),
    "a few numbers through .data": lambda model: model.blocks[1].mlp.fc1.weight.data.view(4, -1)[2, 15].add_(1),
    "another parameter": lambda model: setattr(model.norm, "weight", torch.nn.Parameter(torch.ones(32))),
    "a block less": lambda model: model.blocks.pop(-1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_a_change_ends_the_claim(change, copied, folder):
    model = DINOv3ViT.from_pretrained(folder)
    changed = copy.deepcopy(model) if copied else model
    CHANGES[change](changed)
    if copied and change != "one number":  # which in a copy nothing counts
        assert model.weights_id != changed.weights_id == CHANGED
    elif not copied:
        assert changed.weights_id == CHANGED


def test_what_is_no_change(folder):
    model = DINOv3ViT.from_pretrained(folder)
    name = model.weights_id
    assert name == open_checkpoint(folder).weights_id
    model(torch.randn(1, 3, 16, 16)).last_hidden_state.sum().backward()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), optimize_for_inference(model)):
        assert other.weights_id == name
    assert model.bfloat16().weights_id == name
    assert DINOv3ViT(TINY).weights_id == "random" and f"weights {name}" in repr(model)


def test_a_state_dict_from_elsewhere_has_no_name(folder):
    model = DINOv3ViT.from_pretrained(folder)
    model.load_state_dict(DINOv3ViT(TINY).state_dict())
    assert model.weights_id == "from a state dict"


def test_licence_and_note_stay(folder, tmp_path):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dinov3_lite_note": "made, not trained"}))
    card = open_checkpoint(DINOv3ViT.from_pretrained(folder).save_pretrained(tmp_path / "saved")).card
    assert (card.license, card.note) == ("dinov3-license", "made, not trained")


# ---- other channels


@pytest.mark.parametrize("rule", ["repeat", "mean"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_a_patch_of_equal_channels_is_projected_as_before(count, rule, folder):
    model = DINOv3ViT.from_pretrained(folder)
    other = DINOv3ViT.from_pretrained(folder, num_channels=count, channel_rule=rule)
    assert other.config.num_channels == other.num_channels == count
    grey = torch.randn(2, 1, 24, 40)
    with torch.no_grad():
        expected = model(grey.expand(-1, 3, -1, -1)).last_hidden_state
        found = other(grey.expand(-1, count, -1, -1)).last_hidden_state
    if rule == "mean" or count in (1, 3):  # "repeat" of a number that is no multiple of three prefers the first
        assert torch.allclose(found, expected, atol=2e-5)
    assert (other.weights_id == model.weights_id) == (count == 3)


def test_the_rules_are_those_of_timm_and_of_meta(folder):
    red, green, blue = (DINOv3ViT.from_pretrained(folder).patch_embed.proj.weight[:, i] for i in range(3))
    mean = (red + green + blue) / 3

    def weight(count, rule):
        return DINOv3ViT.from_pretrained(folder, num_channels=count, channel_rule=rule).patch_embed.proj.weight

    expected = {
        (1, "repeat"): [red + green + blue],
        (4, "repeat"): [0.75 * channel for channel in (red, green, blue, red)],
        (1, "mean"): [3 * mean],
        (5, "mean"): [0.6 * channel for channel in (red, green, blue, mean, mean)],
    }
    for (count, rule), channels in expected.items():
        assert torch.allclose(weight(count, rule), torch.stack(channels, dim=1), atol=1e-7), (count, rule)


def test_statistics_follow_the_rule(folder):
    def processor(count, rule):
        return ImageProcessor.from_pretrained(folder, num_channels=count, channel_rule=rule)

    mean, std = PREPROCESSING["image_mean"], PREPROCESSING["image_std"]
    assert processor(4, "repeat").mean == (*mean, mean[0]) and processor(4, "repeat").std == (*std, std[0])
    assert processor(5, "mean").mean == pytest.approx((*mean, *[sum(mean) / 3] * 2))
    assert processor(1, "repeat").mean == pytest.approx((sum(mean) / 3,))
    pixels = processor(4, "mean")(torch.zeros(4, 30, 30, dtype=torch.uint8))["pixel_values"]
    assert DINOv3ViT.from_pretrained(folder, num_channels=4, channel_rule="mean")(pixels).grid == (12, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 0}, "num_channels is 0: expected a whole number from 1 on"),
        ({"num_channels": 4, "channel_rule": "sum"}, "channel_rule is 'sum': expected one of repeat, mean"),
    ],
)
def test_channels_that_there_are_not(options, message, folder):
    for door in (DINOv3ViT, ImageProcessor):
        with pytest.raises(ValueError, match=message):
            door.from_pretrained(folder, **options)


def test_a_model_of_other_channels_is_saved(folder, tmp_path):
    model = DINOv3ViT.from_pretrained(folder, num_channels=5)
    again = DINOv3ViT.from_pretrained(model.save_pretrained(tmp_path / "five"))
    assert again.config.num_channels == 5
    assert torch.equal(again.patch_embed.proj.weight, model.patch_embed.proj.weight)


@pytest.mark.parametrize(
    "said", [{"resample": "x" * 10**6}, {"image_mean": ["x" * 10**6] * 3}, {"size": {"w": "x" * 10**6}}]
)
def test_a_message_is_no_longer_than_a_few_lines(said, folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="preprocessor_config.json: ") as error:
        ImageProcessor.from_pretrained(folder)
    assert len(str(error.value)) < 600


def test_an_index_with_a_name_that_no_file_can_have(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 10**5}}))
    with pytest.raises(ValueError, match="index.json: shard .* is not the name of a file") as error:
        DINOv3ViT.from_pretrained(folder)
    assert len(str(error.value)) < 600


def test_a_load_initialises_nothing(folder):
    """What would draw random numbers on the meta device takes longer than the modules, and sympy in older PyTorch."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    called = set()
    with Watch():
        DINOv3ViT.from_pretrained(folder)
    assert torch.ops.aten.empty in called
    assert not called & {
        torch.ops.aten.uniform_,
        torch.ops.aten.normal_,
        torch.ops.aten.uniform,
        torch.ops.prims.uniform,
    }


def test_a_skeleton_is_the_model_without_its_weights():
    with WithoutWeights():
        skeleton = DINOv3ViT(TINY_GATED)
    model, state = DINOv3ViT(TINY_GATED), skeleton.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        name: (t.shape, t.dtype) for name, t in model.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in state.values()) and not torch.empty(1).is_meta
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert same_features(skeleton.eval(), model.eval())
