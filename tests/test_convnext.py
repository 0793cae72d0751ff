"""The ConvNeXt apart from its references: names, sizes, refusals, training, memory formats. Parity: test_convnext_parity.py."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from convnexts import TINY_CONVNEXT, made
from helpers import TINY, relative_error
from torch.func import functional_call, grad, vmap

from dinov3_lite import (
    DINOv3Config,
    DINOv3ConvNeXt,
    DINOv3ConvNextBackbone,
    DINOv3ConvNeXtConfig,
    DINOv3ViT,
    DINOv3ViTBackbone,
    FeaturesOnly,
    optimize_for_inference,
)
from dinov3_lite.config import CONVNEXTS
from dinov3_lite.convnext import ConvNeXtBlock, Downsample

# Parameters counted on transformers' own models; tensors of the files on the hub.
SIZES = {
    "convnext-tiny": (27_820_128, 180),
    "convnext-small": (49_454_688, 342),
    "convnext-base": (87_566_464, 342),
    "convnext-large": (196_230_336, 342),
}


# ---- config


@pytest.mark.parametrize("name", SIZES)
def test_variants_have_the_released_number_of_parameters(name):
    with torch.device("meta"):
        model = DINOv3ConvNeXt.from_name(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == SIZES[name]
    assert model.config.name == name and CONVNEXTS.keys() == SIZES.keys()


@pytest.mark.parametrize("name", [*SIZES, TINY_CONVNEXT.name])
def test_dict_round_trip(name):
    config = CONVNEXTS.get(name, TINY_CONVNEXT)
    assert DINOv3ConvNeXtConfig.from_dict(config.to_dict()) == config and config.name == name
    assert name in SIZES or name == "convnext-c8-16-24-32-d1-2-3-1"


def test_the_dict_is_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1, 2, 3, 1], "hidden_sizes": [8, 16, 24, 32], "architectures": ["DINOv3ConvNextModel"]}
    theirs = transformers.DINOv3ConvNextConfig(**sizes).to_dict()
    ours = TINY_CONVNEXT.to_dict()
    written_since_5 = {"out_features", "out_indices", "stage_names"}
    assert {key: ours[key] for key in ours.keys() & theirs.keys()} == {
        key: theirs[key] for key in ours.keys() & theirs.keys()
    }
    assert ours.keys() - theirs.keys() <= written_since_5
    read = transformers.DINOv3ConvNextConfig(**ours)
    assert DINOv3ConvNeXtConfig.from_dict(read.to_dict()) == TINY_CONVNEXT


def test_from_hub_id():
    for name in CONVNEXTS:
        for hub_id in (f"facebook/dinov3-{name}-pretrain-lvd1689m", f"dinov3-{name}"):
            assert DINOv3ConvNeXtConfig.from_name(hub_id) == CONVNEXTS[name]
    assert DINOv3ConvNeXtConfig.from_name("facebook/EUPE-ConvNeXt-B") == CONVNEXTS["convnext-base"]


def test_missing_keys_take_transformers_defaults():
    d = {
        "model_type": "dinov3_convnext",
        "hidden_sizes": None,
        "depths": None,
        "image_size": [224, 224],
        "dtype": "float32",
    }
    assert DINOv3ConvNeXtConfig.from_dict(d) == DINOv3ConvNeXtConfig() == CONVNEXTS["convnext-tiny"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DINOv3ConvNeXtConfig().depths = (1, 1, 1, 1)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [3, 3, 9]}, r"depths is \[3, 3, 9\]: expected four numbers, one for each stage"),
        ({"depths": 3}, "depths is 3: expected four numbers"),
        ({"depths": [3, 3, 0, 3]}, "depths is 0: expected more than zero"),
        ({"depths": [3, 3, 10**6, 3]}, "depths is 1000000: expected at most 1000"),
        ({"hidden_sizes": [96, 192.5, 384, 768]}, "hidden_sizes is 192.5: expected int"),
        ({"hidden_sizes": "tiny"}, "hidden_sizes is 'tiny': expected four numbers"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0: expected more than zero"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu': expected one of gelu, silu"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0: expected a probability below 1"),
        ({"image_size": [224, 256]}, r"image_size is \[224, 256\]: expected int"),
        ({"model_type": "convnext"}, "model_type is 'convnext': expected 'dinov3_convnext', a DINOv3 ConvNeXt"),
        ({"model_type": "dinov3_vit"}, "expected 'dinov3_convnext', a DINOv3 ConvNeXt: DINOv3Config reads it"),
    ],
)
def test_contradictions_are_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        DINOv3ConvNeXtConfig.from_dict({"model_type": "dinov3_convnext", **change})


def test_names_of_the_other_architecture():
    with pytest.raises(ValueError, match="'convnext-tiny' is a ConvNeXt: use DINOv3ConvNeXtConfig"):
        DINOv3Config.from_name("convnext-tiny")
    with pytest.raises(ValueError, match="pretrain-lvd1689m' is a ConvNeXt: use DINOv3ConvNeXtConfig"):
        DINOv3Config.from_name("facebook/dinov3-convnext-base-pretrain-lvd1689m")
    with pytest.raises(ValueError, match="expected 'dinov3_vit', .*: DINOv3ConvNeXtConfig reads it"):
        DINOv3Config.from_dict({"model_type": "dinov3_convnext"})
    for name in ("vitb16", "facebook/dinov3-vitb16-pretrain-lvd1689m", "facebook/EUPE-ViT-B"):
        with pytest.raises(ValueError, match="is a vision transformer: use DINOv3Config"):
            DINOv3ConvNeXtConfig.from_name(name)
    with pytest.raises(ValueError, match="unknown DINOv3 ConvNeXt 'convnext-huge': expected one of convnext-tiny, "):
        DINOv3ConvNeXtConfig.from_name("convnext-huge")


def test_classes_of_the_other_architecture():
    with pytest.raises(ValueError, match="config is a DINOv3Config: expected a DINOv3ConvNeXtConfig, as its from_name"):
        DINOv3ConvNeXt(TINY)
    with pytest.raises(ValueError, match="config is a DINOv3ConvNeXtConfig: expected a DINOv3Config, as its from_name"):
        DINOv3ViT(TINY_CONVNEXT)
    with pytest.raises(ValueError, match="model is a DINOv3ViT: expected a DINOv3ConvNeXt"):
        DINOv3ConvNextBackbone(DINOv3ViT(TINY))
    with pytest.raises(ValueError, match="model is a DINOv3ConvNeXt: expected a DINOv3ViT"):
        DINOv3ViTBackbone(made())


# ---- outputs


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 63), (70, 101), (224, 256)])
def test_the_parts_of_an_output(size):
    """Grids are rounded down stage by stage; the CLS token is the normed mean of the last map."""
    model = made()
    images = torch.randn(2, 3, *size)
    out = model(images, output_hidden_states=True)
    h, w = size[0] // 32, size[1] // 32
    assert out.hidden_states[0] is images
    for state, channels, stride in zip(out.hidden_states[1:], model.embed_dims, model.strides, strict=True):
        assert state.shape == (2, channels, size[0] // stride, size[1] // stride)
    last = out.hidden_states[-1]
    assert out.grid == (h, w) and out.feature_map.shape == (2, 32, h, w) and out.register_tokens.shape == (2, 0, 32)
    torch.testing.assert_close(out.feature_map, model.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    torch.testing.assert_close(out.cls_token, model.norm(last.mean((2, 3))))
    assert torch.equal(out.cls_token, out.pooler_output)
    plain = model(images, return_dict=False)
    assert len(plain) == 2 and torch.equal(plain[0], out.last_hidden_state)
    assert len(model(images, output_hidden_states=True, return_dict=False)) == 3


@torch.no_grad()
def test_intermediate_layers_as_asked_for():
    model = made()
    images = torch.randn(2, 3, 70, 101)
    maps = model(images, output_hidden_states=True).hidden_states[1:]
    outputs = model.get_intermediate_layers(images, n="quarters", reshape=True, norm=False)
    assert all(torch.equal(a, b) for a, b in zip(outputs, maps, strict=True))
    tokens, mean, registers = model.get_intermediate_layers(
        images, [1], return_class_token=True, return_extra_tokens=True
    )[0]
    assert torch.equal(tokens, maps[1].flatten(2).mT) and registers.shape == (2, 0, 16)  # only the last stage is normed
    torch.testing.assert_close(mean, maps[1].mean((2, 3)))
    resized = model.get_intermediate_layers(images, n=4, reshape=True, patch_size=16)
    assert [tuple(m.shape) for m in resized] == [(2, channels, 4, 6) for channels in model.embed_dims]
    model.patch_size = 16
    assert all(torch.equal(a, b) for a, b in zip(model.get_intermediate_layers(images, 4, True), resized, strict=True))
    with pytest.raises(ValueError, match="patch_size is 71: expected 1 to 70 for images of 70 x 101 pixels"):
        model.get_intermediate_layers(images, patch_size=71)
    for size in (0, 16.0, (16, 16), "16", True):
        with pytest.raises(ValueError, match=r"patch_size is .*: expected a whole number from 1 up"):
            model.get_intermediate_layers(images, patch_size=size)


@torch.no_grad()
def test_maps_narrower_than_pytorch_resizes():
    model, images = made(dtype=torch.bfloat16), torch.randn(2, 3, 70, 101)
    exact = made(dtype=torch.float64).get_intermediate_layers(images, 4, reshape=True, patch_size=16)
    for residual in (None, torch.bfloat16):
        model.residual_dtype = residual
        resized = model.get_intermediate_layers(images, 4, reshape=True, patch_size=16)
        assert {m.dtype for m in resized} == {torch.bfloat16}
        assert all(relative_error(m, e) < 2e-2 for m, e in zip(resized, exact, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images_at_all(dtype):
    model, images = made(dtype=dtype), torch.zeros(0, 3, 70, 101)
    for each in (model, optimize_for_inference(model)):
        out = each(images, output_hidden_states=True)
        assert out.last_hidden_state.shape == (0, 7, 32) and out.pooler_output.shape == (0, 32)
        assert [state.shape[0] for state in out.hidden_states] == [0] * 5


def test_gradients_of_each_sample_by_vmap():
    """torch.func maps over samples what is written for a batch: no operator here asks what it can't tell there."""
    model, images = made(), torch.randn(3, 3, 32, 64)

    def loss(parameters, image):
        return functional_call(model, parameters, (image.unsqueeze(0),)).pooler_output.square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        model(image.unsqueeze(0)).pooler_output.square().sum().backward()
        assert all(relative_error(found[name][i], p.grad) < 2e-5 for name, p in model.named_parameters())


@torch.no_grad()
def test_lists_of_batches():
    model = made()
    crops = [torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 40)]
    together = model.forward_features(crops)
    assert [f["masks"] for f in together] == [None, None] and len(model.forward_features(crops, [None, None])) == 2
    for features, crop in zip(together, crops, strict=True):
        for name, value in model.forward_features(crop).items():
            assert features[name] is value is None or torch.equal(features[name], value)
    with pytest.raises(ValueError, match="x is a list of 0 batches"):
        model.forward_features([])
    with pytest.raises(ValueError, match="x is a list of 2 batches: expected at least one, and as many masks"):
        model.forward_features(crops, [None])


@torch.no_grad()
def test_channels_are_last_in_memory():
    """Norms and matrix products then need no copy; only the convolutions of the stem and of the steps down do."""
    model, copied = made(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: None if inputs[0].is_contiguous() else copied.append(name)
            )
    model(torch.randn(2, 3, 64, 96))
    assert copied == []


@torch.no_grad()
def test_nothing_runs_after_the_last_stage_wanted():
    model, images, ran = made(), torch.randn(1, 3, 64, 64), []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.get_intermediate_layers(images, [1])
    FeaturesOnly(model, [0])(images)
    DINOv3ConvNextBackbone(model, out_indices=[0, 2])(images)
    model.forward_intermediates(images, [0], stop_early=True)
    assert ran == [0, 1, 0, 0, 1, 0]
    model.forward_intermediates(images, [0])
    assert ran[6:] == [0, 1, 2, 3]


# ---- refusals


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 31, 64), "image height 31 and width 64 must be at least 32, the stride of the last stage"),
        (torch.zeros(3, 64, 64), r"pixel_values has shape \(3, 64, 64\): expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 4, 64, 64), r"pixel_values has shape \(1, 4, 64, 64\): expected \(batch, 3, height, width\)"),
        (
            torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
            "pixel_values is torch.uint8: expected normalised floating-point",
        ),
        ([torch.zeros(3, 64, 64)], r"pixel_values is a list: expected a tensor \(batch, 3, height, width\), which"),
        (np.zeros((1, 3, 64, 64), np.float32), "pixel_values is a ndarray: expected a tensor"),
    ],
)
def test_images_that_it_does_not_take(images, message):
    with pytest.raises(ValueError, match=message):
        made()(images)


def test_what_only_a_vit_has():
    model, images = made(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="bool_masked_pos is given: a ConvNeXt has no tokens to mask or leave out"):
        model(images, torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep_indices is given: a ConvNeXt has no tokens"):
        model(images, keep_indices=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="masks is given: a ConvNeXt has no tokens"):
        model.forward_features(images, torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="a ConvNeXt has no attention"):
        model.attention_maps(images)
    with pytest.raises(ValueError, match="a ConvNeXt can't run images of different sizes as one sequence"):
        model.forward_packed([images[0]])


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (0, "n is 0: expected a count of blocks from 1 to 4, or a list of indices"),
        (5, "n is 5: expected a count of blocks"),
        ([4], r"n is \[4\]: expected block indices from -4 to 3"),
        ([], r"n is \[\]: expected block indices"),
        ("halves", "n is 'halves' and the model has 4 blocks: expected 'quarters' or 'dpt'"),
    ],
)
def test_stages_that_there_are_not(n, message):
    with pytest.raises(ValueError, match=message):
        made().get_intermediate_layers(torch.zeros(1, 3, 32, 32), n)


def test_options_that_timms_convnext_has_not():
    with pytest.raises(ValueError, match="output_fmt is 'NLC': expected 'NCHW', all that timm's ConvNeXt has"):
        made().forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")
    with pytest.raises(ValueError, match="out_indices has 5: expected stages from -5 to 4, 0 the stem"):
        DINOv3ConvNextBackbone(made(), out_indices=[5])


# ---- training


def test_stochastic_depth_grows_by_block():
    model = DINOv3ConvNeXt(replace(TINY_CONVNEXT, drop_path_rate=0.3))
    rates = [block.drop_path.p for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(rates, torch.linspace(0, 0.3, 7, dtype=torch.float64).tolist())


def test_stochastic_depth_drops_whole_branches_of_samples():
    """A sample's branch is lost with the block's probability, else scaled so that the mean stays."""
    model = DINOv3ConvNeXt(replace(TINY_CONVNEXT, drop_path_rate=0.5)).train()
    model.load_state_dict(made().state_dict())
    block = model.stages[3].blocks[0]
    x = torch.randn(1, 2, 3, 32).expand(400, -1, -1, -1)
    with torch.no_grad():
        branches = block(x) - x
        whole = 2 * (block.eval()(x[:1]) - x[:1])
    lost = (branches == 0).flatten(1).all(1)
    torch.testing.assert_close(branches[~lost], whole.expand(int((~lost).sum()), -1, -1, -1), rtol=1e-4, atol=1e-5)
    assert 150 < lost.sum() < 250


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = made().train()
        model.gradient_checkpointing = recompute
        calls = []
        model.stages[2].blocks[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        model(images).last_hidden_state.square().sum().backward()
        assert len(calls) == 1 + recompute
        gradients.append([images.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_initial_weights():
    model = DINOv3ConvNeXt(replace(TINY_CONVNEXT, layer_scale_init_value=0.25, initializer_range=0.5))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("gamma"):
            assert (parameter == 0.25).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            assert 0.4 < parameter.std() < 0.6, name


# ---- dtypes and memory formats


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last(dtype):
    """Images or weights whose channels are last in memory give the same features."""
    model, images = made(dtype=dtype), torch.randn(2, 3, 70, 101)
    expected = model(images, output_hidden_states=True)
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    for moved in (model, made(dtype=dtype).to(memory_format=torch.channels_last)):
        out = moved(images.to(memory_format=torch.channels_last), output_hidden_states=True)
        assert relative_error(out.last_hidden_state, expected.last_hidden_state) < bound
        assert all(relative_error(a, b) < bound for a, b in zip(out.hidden_states, expected.hidden_states, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_gradients_nor_hooks_change_a_bit(dtype):
    model, images = made(dtype=dtype), torch.randn(1, 3, 64, 64)
    with_gradients = model(images).last_hidden_state
    with torch.no_grad():
        without = model(images).last_hidden_state
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
        watched = model(images).last_hidden_state
    assert torch.equal(with_gradients, without) and torch.equal(without, watched)


@pytest.mark.parametrize("residual", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_written_in_place_only_where_nobody_holds_them(dtype, residual, monkeypatch):
    """Without gradients a block writes into what the one before it returned. Whoever kept that must find it unchanged."""
    model, images, written = made(dtype=dtype), torch.randn(1, 3, 64, 96), []
    model.residual_dtype = residual
    add_to = ConvNeXtBlock.add_to
    monkeypatch.setattr(ConvNeXtBlock, "add_to", lambda block, x: written.append(block) or add_to(block, x))
    expected = model(images, output_hidden_states=True)
    assert written == []
    with torch.no_grad():
        out = model(images, output_hidden_states=True)
    assert [len(stage.blocks) - 1 for stage in model.stages] == [0, 1, 2, 0]
    assert written == [model.stages[1].blocks[1], *model.stages[2].blocks[1:]]
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, expected.hidden_states, strict=True))

    blocks = model.stages[2].blocks
    places = [*blocks, *(module for block in blocks for module in (block.dwconv, block.ls)), model.stages[2].downsample]
    for module in (*places, model.stages[2], model.stages[2].downsample.conv):
        kept: list[list[torch.Tensor]] = []
        handle = module.register_forward_hook(lambda _, inputs, output, kept=kept: kept.append([*inputs[:1], output]))
        for mode in (True, False):
            with torch.set_grad_enabled(mode):
                out = model(images)
            assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
        handle.remove()
        assert len(kept) == 2 and all(torch.equal(a, b) for a, b in zip(*kept, strict=True)), module


@torch.no_grad()
def test_weights_of_one_block_mapped_over():
    """What is mapped over can not be written into what is not: vmap refuses."""
    model, images = made(), torch.randn(1, 3, 32, 64)
    name = "stages.2.blocks.1.mlp.fc2.weight"
    weights = torch.stack([model.get_parameter(name) * factor for factor in (1, 2)])
    found = vmap(lambda weight: functional_call(model, {name: weight}, (images,)).last_hidden_state)(weights)
    for weight, result in zip(weights, found, strict=True):
        expected = functional_call(model, {name: weight}, (images,)).last_hidden_state
        assert relative_error(result, expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "raw"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_dtypes_of_outputs(dtype, raw):
    model, images = made(dtype=dtype), torch.randn(1, 3, 64, 64)
    out = model(images, output_hidden_states=True)
    assert out.last_hidden_state.dtype == out.pooler_output.dtype == dtype
    assert {state.dtype for state in out.hidden_states[1:]} == {raw}
    assert model.forward_features(images)["x_prenorm"].dtype == raw
    assert model.get_intermediate_layers(images, 2, norm=True)[0].dtype == raw


@torch.no_grad()
def test_every_norm_has_the_configs_epsilon():
    """One so large that a single norm with PyTorch's own shows; the prepared model's are the same."""
    model = DINOv3ConvNeXt(replace(TINY_CONVNEXT, layer_norm_eps=0.5)).eval()
    model.load_state_dict(made().state_dict())
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 3 + 7 + 1 and all(model.get_submodule(name).eps == 0.5 for name in norms)
    images = torch.randn(1, 3, 64, 96)
    expected = model(images).last_hidden_state
    assert relative_error(optimize_for_inference(model)(images).last_hidden_state, expected) < 3e-6
    assert relative_error(made()(images).last_hidden_state, expected) > 1e-2


@torch.no_grad()
def test_a_step_down_errs_as_little_as_with_channels_first():
    """Sums as long as a ConvNeXt-Tiny's: no tiny model has them."""
    step = Downsample(384, 768, 1e-6)
    torch.nn.init.trunc_normal_(step.conv.weight, std=0.02)
    x = torch.randn(1, 28, 28, 384)
    first = step.conv(step.norm(x).permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
    actual, truth = step(x), step.double()(x.double())
    assert relative_error(actual, truth) <= 1.1 * relative_error(first, truth)


@torch.no_grad()
def test_residual_dtype_follows_the_references():
    """A residual stream in bfloat16 errs more than ours in float32, as the references do: the more, the more blocks."""
    images, deep = (
        torch.randn(2, 3, 64, 96),
        replace(TINY_CONVNEXT, hidden_sizes=(32, 64, 96, 128), depths=(2, 2, 9, 2)),
    )
    truth = made(deep, torch.float64)(images).last_hidden_state
    model = made(deep, torch.bfloat16)
    wide = relative_error(model(images).last_hidden_state, truth)
    model.residual_dtype = torch.bfloat16
    narrow = model(images, output_hidden_states=True)
    assert 1.02 * wide < relative_error(narrow.last_hidden_state, truth) < 3 * wide
    assert narrow.hidden_states[-1].dtype == torch.bfloat16


def test_autocast_trains():
    model = made().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 64, 64)).last_hidden_state
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_a_forward_is_one_graph():
    """Nothing in a forward breaks torch.compile's graph."""
    model, images = made(), torch.randn(1, 3, 64, 96)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(images).last_hidden_state, model(images).last_hidden_state) < 1e-6
