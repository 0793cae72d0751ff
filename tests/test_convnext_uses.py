"""What else takes a ConvNeXt: the encoder, preparation for inference, export, the commands, the published numbers."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from convnexts import TINY_CONVNEXT, TRANSFORMERS, made, renamed, trained_like
from helpers import relative_error, run_python, transformers_with, write_checkpoint
from safetensors.torch import load_file

from dinov3_lite import (
    DINOv3ConvNextBackbone,
    DINOv3ViT,
    FeaturesOnly,
    ImageProcessor,
    build_dinov3_encoder,
    load,
    optimize_for_inference,
    sliding_window_features,
)
from dinov3_lite.config import CONVNEXTS
from dinov3_lite.export import export
from dinov3_lite.sample import made_weights


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "source", TINY_CONVNEXT, renamed(trained_like(TINY_CONVNEXT), TRANSFORMERS))


# ---- encoder


@pytest.mark.parametrize("size", [(64, 96), (70, 101), (32, 32)])
def test_the_pyramid_is_the_four_stages(size, folder):
    encoder = build_dinov3_encoder(pretrained_path=folder)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = made()(images, output_hidden_states=True).hidden_states[1:]
    assert encoder.channels == (8, 16, 24, 32) and encoder.strides == (4, 8, 16, 32)
    for feature_map, e in zip(encoder(images), expected, strict=True):
        assert torch.equal(feature_map, e) and not feature_map.requires_grad
    parent = torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in parent[0].modules())


def test_the_pyramid_of_a_convnext_is_fine_tuned_or_refused(folder):
    encoder = build_dinov3_encoder(pretrained_path=folder, freeze=False).train()
    sum(m.square().mean() for m in encoder(torch.randn(1, 3, 32, 64))).backward()
    blocks = [block for stage in encoder.backbone.stages for block in stage.blocks]
    assert all(block.mlp.fc1.weight.grad.abs().sum() > 0 for block in blocks)
    with pytest.raises(ValueError, match="simple keeps a vision transformer's one grid: a ConvNeXt has four"):
        build_dinov3_encoder(pretrained_path=folder, simple=True)


@torch.no_grad()
def test_transformers_upernet_takes_our_backbone_for_its_own(folder):
    transformers = transformers_with("DINOv3ConvNextBackbone")
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    config = transformers.UperNetConfig(
        backbone_config=transformers.DINOv3ConvNextConfig.from_pretrained(folder, **stages),
        hidden_size=16,
        num_labels=3,
        auxiliary_in_channels=24,
        auxiliary_channels=8,
    )
    decoder, images = transformers.UperNetForSemanticSegmentation(config).double().eval(), torch.randn(2, 3, 70, 101)
    backbone = transformers.DINOv3ConvNextBackbone.from_pretrained(folder, dtype=torch.float64, **stages)
    ours = DINOv3ConvNextBackbone.from_pretrained(folder, dtype=torch.float64, **stages)
    logits = []
    for decoder.backbone in (backbone.double(), ours):
        logits.append(decoder(images.double()).logits)
    assert logits[0].shape == (2, 3, 70, 101) and relative_error(*logits) < 1e-13
    with pytest.raises(ValueError, match="feature maps alone: name the stages that are wanted in out_indices"):
        decoder(images.double(), output_hidden_states=True)


def test_the_maps_of_features_only_are_described_one_by_one():
    info = FeaturesOnly(made(), (3, 1)).feature_info
    assert len(info) == 2 and info[1] == {"num_chs": 32, "reduction": 32, "module": "stages.3"}
    assert [entry["num_chs"] for entry in info] == info.channels() == [16, 32]


# ---- preparation for inference


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_model_computes_the_same(dynamic, dtype):
    model = made(dtype=dtype)
    prepared = optimize_for_inference(model, dynamic=dynamic)
    truth = made(dtype=torch.float64)
    for size in ((64, 96), (70, 101)):
        images = torch.randn(2, 3, *size)
        t, plain, fast = (m(images.double() if m is truth else images) for m in (truth, model, prepared))
        bound = 1.5 * relative_error(plain.last_hidden_state, t.last_hidden_state)
        assert relative_error(fast.last_hidden_state, t.last_hidden_state) <= bound
    assert isinstance(prepared, type(model)) and not prepared.train().training
    with pytest.raises(ValueError, match="a prepared model does not train"):
        prepared.requires_grad_(True)
    assert (
        relative_error(prepared.forward_features(images)["x_prenorm"], model.forward_features(images)["x_prenorm"])
        < 2e-2
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_go_into_the_stem(dtype):
    model, processor = made(dtype=dtype), ImageProcessor(size=None)
    pixels = torch.randint(0, 256, (2, 3, 70, 101), dtype=torch.uint8)
    prepared = optimize_for_inference(model, processor)
    images = torch.cat([processor(p)["pixel_values"] for p in pixels])
    expected = model(images).last_hidden_state
    assert relative_error(prepared(pixels).last_hidden_state, expected) < (3e-6 if dtype == torch.float32 else 2e-2)
    with pytest.raises(ValueError, match="pixel_values is torch.float32: expected torch.uint8 pixels"):
        prepared(images)
    with pytest.raises(ValueError, match="image height 31 and width 64 must be at least 32"):
        prepared(torch.zeros(1, 3, 31, 64, dtype=torch.uint8))


@torch.no_grad()
def test_what_somebody_looks_at_or_changes_runs_as_it_is():
    model = made()
    prepared, images = optimize_for_inference(model), torch.randn(1, 3, 64, 64)
    seen = []
    prepared.stages[1].blocks[0].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    prepared.stages[2].register_forward_hook(lambda *_: seen.append("stage"))
    expected = model(images).last_hidden_state
    assert relative_error(prepared(images).last_hidden_state, expected) < 3e-6 and seen == ["mlp", "stage"]
    prepared = optimize_for_inference(model)
    prepared(images)
    model.stages[3].blocks[0].mlp.fc2.weight.mul_(3)
    assert relative_error(prepared(images).last_hidden_state, model(images).last_hidden_state) < 3e-6
    assert relative_error(model(images).last_hidden_state, expected) > 1e-3
    backbone = DINOv3ConvNextBackbone(model, out_indices=[0, 2, 4]).eval()
    for a, b in zip(optimize_for_inference(backbone)(images).feature_maps, backbone(images).feature_maps, strict=True):
        assert relative_error(a, b) < 3e-6


@torch.no_grad()
@torch.no_grad()
def test_settings_made_anew_are_followed():
    model = made()
    images, fast = torch.randn(1, 3, 64, 64), optimize_for_inference(model)
    for name, settings in (
        ("stages.0.blocks.0.dwconv", {"dilation": (2, 2), "padding": (6, 6)}),
        ("stages.2.blocks.1.dwconv", {"padding_mode": "circular"}),
        ("stages.1.downsample.norm", {"eps": 1.0}),
        ("stages.2.blocks.0.mlp", {"act": "silu"}),
    ):
        before = fast(images).last_hidden_state
        for each in (fast, model):
            for setting, value in settings.items():
                setattr(each.get_submodule(name), setting, value)
        expected = model(images).last_hidden_state
        assert relative_error(before, expected) > 1e-3, name
        assert relative_error(fast(images).last_hidden_state, expected) < 2e-6, name


def test_graphs_of_a_convnext():
    model = made(replace(TINY_CONVNEXT, depths=(1, 1, 1, 1)))
    prepared = optimize_for_inference(model, backend="inductor")
    for size in ((2, 3, 64, 96), (3, 3, 96, 128)):
        images = torch.randn(size)
        out, expected = prepared(images, output_hidden_states=True), model(images, output_hidden_states=True)
        for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
            assert relative_error(a, b) < 3e-6
    assert [made is not None for made in prepared._graphs.made.values()] == [True]


# ---- export


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_exported_file_takes_any_size(format, tmp_path):
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    errors = export(made(), tmp_path / f"model.{format}", format)
    assert list(errors) == [(1, 3, 69, 229), (3, 3, 197, 133)] and max(errors.values()) < 5e-6
    if format == "onnx":
        import onnx

        file = onnx.load(tmp_path / "model.onnx")
        assert {entry.key: entry.value for entry in file.metadata_props}["stride"] == "32"
        dims = file.graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param for d in dims[2:]] == ["height", "width"]


# ---- commands


def test_commands_take_a_convnext(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(tmp_path / "photo.png")
    code = """
from dinov3_lite.__main__ import main
assert not main(["sample", "checkpoint", "--variant", "convnext-tiny"])
assert not main(["features", "photo.png", "--model", "checkpoint", "--size", "100x150", "--picture", "pca.png"])
assert main(["sample", "other", "--variant", "convnext-huge"]) == 1
"""
    done = run_python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / "features.safetensors")
    assert tensors["feature_map"].shape == (1, 768, 3, 4) and tensors["register_tokens"].shape == (1, 0, 768)
    assert (
        "1 photo at 100 x 150 px: 1 CLS + 0 registers + 3 x 4 patches = 13 tokens of 768" in done.stdout + done.stderr
    )
    assert "unknown DINOv3 variant 'convnext-huge': expected one of" in done.stderr
    model = load(tmp_path / "checkpoint")
    assert model.config == CONVNEXTS["convnext-tiny"] and "made, not trained" in model.weights_id
    made_again = made_weights(model.config)
    assert all(torch.equal(tensor, made_again[name]) for name, tensor in model.state_dict().items())


# ---- published numbers


def test_published_numbers_are_compared(tmp_path, monkeypatch, capsys):
    spec = importlib.util.find_spec("published_outputs")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert len(tool.published()) == 12 and all(len(numbers) == 10 for numbers in tool.published().values())
    assert list(tool.published("vitl16")) == ["vitl16", "vitl16-satellite"]
    assert tool.published("convnext-base")["convnext-base"][4:6] == [0.015095, 3.039118]

    model = DINOv3ViT.from_name("vits16", num_hidden_layers=1)
    numbers = tool.published("vits16")["vits16"]

    class Known(torch.nn.Module):
        def __init__(self, error):
            super().__init__()
            self.error = error
            self.config = DINOv3ViT.from_name("vits16", num_hidden_layers=12).config
            self.weights_id = "known"

        def forward(self, pixel_values):
            out = model(pixel_values)
            out.last_hidden_state[0, 0, :5] = torch.tensor(numbers[:5]) + self.error
            out.last_hidden_state[0, 5, :5] = torch.tensor(numbers[5:])
            return out

    monkeypatch.setattr(
        tool, "ImageProcessor", lambda size: lambda photo: {"pixel_values": torch.zeros(1, 3, size, size)}
    )
    for error, status, verdict in ((5e-4, 0, "the same as vits16"), (5e-3, 1, "others than vits16")):
        monkeypatch.setattr(tool, "load", lambda source, dtype, error=error: Known(error))
        assert tool.main("checkpoint", "photo.jpg") == status
        assert verdict in capsys.readouterr().out


# ---- windows


@torch.no_grad()
@pytest.mark.parametrize("block", [-1, 1])
def test_windows_of_a_convnext_are_blended_at_its_stages_stride(block):
    model, images = made(), torch.randn(1, 3, 96, 128)
    stride, (whole,) = model.strides[block], model.get_intermediate_layers(images, n=[block], reshape=True)
    assert torch.equal(sliding_window_features(model, images, 128, block=block), whole)
    blended = sliding_window_features(model, images, (96, 64), 32, block=block)
    expected, total = torch.zeros_like(whole).double(), torch.zeros(whole.shape[-2:]).double()
    rows, columns = 96 // stride, 64 // stride
    y, x = (torch.arange(n).double() for n in (rows, columns))
    tent = torch.outer(torch.minimum(y + 1, rows - y), torch.minimum(x + 1, columns - x))
    for left in (0, 32, 64):
        (part,) = model.get_intermediate_layers(images[..., left : left + 64], n=[block], reshape=True)
        expected[..., left // stride : left // stride + columns] += tent * part
        total[:, left // stride : left // stride + columns] += tent
    assert relative_error(blended, expected / total) < 1e-6
    with pytest.raises(ValueError, match="image width is 100: expected a multiple of 32, the pixels of a patch"):
        sliding_window_features(model, images[..., :100], 64)
