"""ConvNeXts on disk: every layout, both ways, bit for bit, and the one door for both architectures."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convnexts import META, TIMM, TINY_CONVNEXT, TRANSFORMERS, made, renamed, trained_like
from helpers import PREPROCESSING, TINY, relative_error, run_reference, write_checkpoint
from safetensors.torch import load_file, save_file

import dinov3_lite
from convert import convert
from convert.plan import make_plan
from convert.verify import verify
from convert.writer import write
from dinov3_lite import DINOv3ConvNeXt, DINOv3ConvNextBackbone, DINOv3ConvNeXtConfig, DINOv3ViT, ImageProcessor
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.layouts import LAYOUTS, detect, model_tensors, rename
from dinov3_lite.checkpoint.layouts.table import Card
from dinov3_lite.checkpoint.layouts.timm import ungated_copy
from dinov3_lite.config import CONVNEXTS

SUBSTITUTIONS = {"lite": [], "transformers": TRANSFORMERS, "meta": META, "timm": TIMM}
META_COUNTS = {"convnext-tiny": 182, "convnext-small": 344, "convnext-base": 344, "convnext-large": 344}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint as from the hub."""
    return write_checkpoint(tmp_path / "source", TINY_CONVNEXT, renamed(trained_like(TINY_CONVNEXT), TRANSFORMERS))


def same(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


# ---- tables


@pytest.mark.parametrize("name", CONVNEXTS)
def test_our_table_is_the_state_dict(name):
    with torch.device("meta"):
        state = DINOv3ConvNeXt.from_name(name).state_dict()
    table = {name: shape for name, (shape, _) in model_tensors(CONVNEXTS[name]).items()}
    assert table == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", CONVNEXTS)
def test_transformers_table_is_its_state_dict(name):
    transformers = pytest.importorskip("transformers")
    config = CONVNEXTS[name]
    with torch.device("meta"):
        model = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**config.to_dict()))
        ours = DINOv3ConvNeXt(config).state_dict()
    theirs = {key.removeprefix("model."): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in rename(ours, LAYOUTS["transformers"], config).items()} == theirs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layouts_names_are_those_that_a_user_would_write(layout):
    weights = trained_like(TINY_CONVNEXT)
    by_table, by_hand = rename(weights, LAYOUTS[layout], TINY_CONVNEXT), renamed(weights, SUBSTITUTIONS[layout])
    assert by_table.keys() == by_hand.keys()
    assert all(torch.equal(by_table[name], by_hand[name]) for name in by_hand)
    assert detect(by_hand) == (LAYOUTS[layout], DINOv3ConvNeXtConfig)


@pytest.mark.parametrize("name", CONVNEXTS)
def test_metas_file_has_its_name_and_all_that_its_strict_loader_wants(name, tmp_path):
    config = replace(CONVNEXTS[name], hidden_sizes=(8, 16, 24, 32))
    folder = write_checkpoint(tmp_path, config, renamed(trained_like(config), TRANSFORMERS))
    file = convert(folder, tmp_path / "meta", to="meta")
    written = torch.load(file)
    assert len(written) == META_COUNTS[name]
    for part in ("weight", "bias"):
        assert torch.equal(written[f"norms.3.{part}"], written[f"norm.{part}"])
    released = LAYOUTS["meta"].file_name(Card(config=CONVNEXTS[name]), ())
    assert released.startswith(f"dinov3_{name.replace('-', '_')}_pretrain_lvd1689m-") and released.endswith(".pth")


# ---- round trips


@pytest.mark.parametrize("chain", list(itertools.permutations(LAYOUTS, 3)), ids="-".join)
def test_chains_come_back_bit_for_bit(chain, folder, tmp_path):
    path = folder
    for i, layout in enumerate((*chain, "transformers")):
        path = convert(path, tmp_path / str(i), to=layout)
        assert same(DINOv3ConvNeXt.from_pretrained(path), trained_like(TINY_CONVNEXT)), layout
    written, original = (load_file(f / "model.safetensors") for f in (path, folder))
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)
    assert json.loads((path / "config.json").read_text()) == TINY_CONVNEXT.to_dict()


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_while_converting(to, dtype, folder, tmp_path):
    written = DINOv3ConvNeXt.from_pretrained(convert(folder, tmp_path / "out", to=to, dtype=dtype))
    assert same(written, {name: tensor.to(dtype) for name, tensor in trained_like(TINY_CONVNEXT).items()})
    assert same(DINOv3ConvNeXt.from_pretrained(folder, dtype=dtype), written.state_dict())


def test_config_and_preprocessing_survive_our_file(tmp_path):
    config = replace(TINY_CONVNEXT, drop_path_rate=0.25, image_size=512, layer_norm_eps=1e-5)
    preprocessing = {**PREPROCESSING, "size": {"height": 96, "width": 160}}
    weights = renamed(trained_like(config), TRANSFORMERS)
    back = convert(
        convert(write_checkpoint(tmp_path, config, weights, preprocessing)), tmp_path / "back", to="transformers"
    )
    assert DINOv3ConvNeXtConfig.from_dict(json.loads((back / "config.json").read_text())) == config
    assert ImageProcessor.from_pretrained(back).size == (96, 160)
    with pytest.raises(ValueError, match="'layer_norm_eps' 1e-05: its files don't say it, and its readers take 1e-06"):
        convert(back, tmp_path / "meta", to="meta")
    said = open_checkpoint(convert(back, tmp_path / "timm", to="timm")).config
    assert said == replace(TINY_CONVNEXT, layer_norm_eps=1e-5)


@torch.no_grad()
def test_what_other_libraries_make_of_what_we_write(folder, tmp_path):
    """Transformers opens it, timm and Meta's class load it strictly, and all compute what ours does."""
    images = torch.randn(2, 3, 70, 101)
    ours = made()(images)
    if "DINOV3_REPO" in os.environ:
        import reference_convnext as reference

        model = reference.metas_module().ConvNeXt(
            depths=list(TINY_CONVNEXT.depths), dims=list(TINY_CONVNEXT.hidden_sizes)
        )
        model.load_state_dict(torch.load(convert(folder, tmp_path / "meta", to="meta")), strict=True)
        assert relative_error(model.eval()(images), ours.pooler_output) < 2e-6
    written = convert(convert(folder), tmp_path / "transformers", to="transformers")
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.DINOv3ConvNextModel.from_pretrained(
        written, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative_error(theirs.eval()(images).last_hidden_state, ours.last_hidden_state) < 2e-6
    timm = convert(folder, tmp_path / "timm", to="timm")
    save_file({"odd": images}, tmp_path / "images.safetensors")
    sizes = {"depths": TINY_CONVNEXT.depths, "dims": TINY_CONVNEXT.hidden_sizes}
    files = timm / "model.safetensors", tmp_path / "images.safetensors", tmp_path / "out.safetensors"
    run_reference("reference_timm_convnext.py", *files, json.dumps(sizes), "[]", cwd=tmp_path)
    assert relative_error(load_file(files[2])["odd/pooled/theirs/torch.float32/0"], ours.pooler_output) < 2e-6


def test_timms_config_names_its_model():
    layout = LAYOUTS["timm"]
    for name, config in CONVNEXTS.items():
        said = layout.write_card(Card(config=config)).files["config.json"]
        assert said["architecture"] == name.replace("-", "_") and said["num_features"] == config.hidden_sizes[-1]
    assert ungated_copy("facebook/dinov3-convnext-tiny-pretrain-lvd1689m") == "timm/convnext_tiny.dinov3_lvd1689m"
    assert ungated_copy("facebook/dinov3-vitb16-pretrain-lvd1689m") == "timm/vit_base_patch16_dinov3.lvd1689m"


def test_verify_runs_both(folder, tmp_path):
    pytest.importorskip("transformers")
    for to in ("lite", "meta", "timm", "transformers"):
        plan = make_plan(open_checkpoint(folder, original=True), tmp_path / to, to=to)
        write(plan)
        verified = verify(plan)
        assert verified.tensors == len(trained_like(TINY_CONVNEXT)) and max(verified.errors) < 2e-6


# ---- files as people have them


def test_eupes_files_with_what_they_add(tmp_path):
    weights = renamed(trained_like(TINY_CONVNEXT), META)
    extra = {
        "projectors.0.fc1.weight": torch.randn(3, 4),
        "norms.0.weight": torch.randn(8),
        "norms.3.bias": torch.randn(32),
    }
    torch.save(weights | extra, tmp_path / "EUPE-ConvNeXt-T.pt")
    opened = open_checkpoint(tmp_path / "EUPE-ConvNeXt-T.pt")
    assert same(DINOv3ConvNeXt.from_pretrained(tmp_path / "EUPE-ConvNeXt-T.pt"), trained_like(TINY_CONVNEXT))
    assert list(opened.left_out) == list(extra) and not opened.carried
    vit = tmp_path / "EUPE-ViT-T.pt"
    source = write_checkpoint(tmp_path / "vit", TINY)
    (meta,) = (convert(source, tmp_path / "meta", to="meta"),)
    torch.save(torch.load(meta) | {"projectors.0.fc1.weight": torch.randn(3, 4)}, vit)
    assert DINOv3ViT.from_pretrained(vit).weights_id == DINOv3ViT.from_pretrained(meta).weights_id


@pytest.mark.parametrize("prefix", ["backbone.", "module.", "model.backbone."])
@pytest.mark.parametrize("layout", ["transformers", "meta", "timm"])
def test_a_backbone_in_a_bigger_model(layout, prefix, folder, tmp_path):
    weights = renamed(trained_like(TINY_CONVNEXT), SUBSTITUTIONS[layout])
    bigger = {prefix + name: tensor for name, tensor in weights.items()} | {"decoder.stem.0.weight": torch.randn(3)}
    save_file(bigger, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONVNEXT.to_dict()))
    assert same(DINOv3ConvNeXt.from_pretrained(tmp_path), trained_like(TINY_CONVNEXT))


def test_transformers_state_dict_as_it_is_in_memory(folder, tmp_path):
    """Since release 5.4 its stages have another name in memory than on disk."""
    weights = renamed(trained_like(TINY_CONVNEXT), TRANSFORMERS)
    save_file(
        {f"model.{k}" if k.startswith("stages") else k: t for k, t in weights.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONVNEXT.to_dict()))
    assert same(DINOv3ConvNeXt.from_pretrained(tmp_path), trained_like(TINY_CONVNEXT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("stages.2.layers.1.gamma"), "lacks tensor 'stages.2.layers.1.gamma', which the config"),
        (
            lambda w: w.update({"stages.0.layers.9.gamma": torch.zeros(8)}),
            "holds tensor 'stages.0.layers.9.gamma', which",
        ),
        (
            lambda w: w.update({"layer_norm.bias": torch.zeros(7)}),
            r"tensor 'layer_norm.bias' has shape \(7,\), not \(32,\)",
        ),
    ],
)
def test_damaged_files(change, message, tmp_path):
    weights = renamed(trained_like(TINY_CONVNEXT), TRANSFORMERS)
    change(weights)
    with pytest.raises(ValueError, match=message):
        DINOv3ConvNeXt.from_pretrained(write_checkpoint(tmp_path, TINY_CONVNEXT, weights))


# ---- one door


def test_load_tells_by_the_tensors(folder, tmp_path):
    vit = write_checkpoint(tmp_path / "vit", replace(TINY, hidden_size=128))
    for to in LAYOUTS:
        convnext_file, vit_file = (
            convert(source, tmp_path / f"{name}-{to}", to=to, allow_loss=True)
            for name, source in (("convnext", folder), ("vit", vit))
        )
        assert same(dinov3_lite.load(convnext_file), trained_like(TINY_CONVNEXT))
        assert type(dinov3_lite.load(convnext_file)) is DINOv3ConvNeXt and type(dinov3_lite.load(vit_file)) is DINOv3ViT
    model = dinov3_lite.load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training and model.weights_id.startswith("transformers ")
    assert dinov3_lite.load(vit, attention="eager").attention == "eager"
    with pytest.raises(ValueError, match="attention is 'sdpa' and .* holds a ConvNeXt, which has none"):
        dinov3_lite.load(folder, attention="sdpa")
    backbone = DINOv3ConvNextBackbone.from_pretrained(folder, out_indices=[1, 3])
    assert backbone.channels == [8, 24] and same(backbone.model, trained_like(TINY_CONVNEXT))
    assert DINOv3ConvNeXt.from_pretrained(folder, patch_size=16).patch_size == 16


def test_a_class_says_which_other_class_a_file_wants(folder, tmp_path):
    vit = write_checkpoint(tmp_path / "vit", TINY)
    with pytest.raises(
        ValueError, match=r"holds a ConvNeXt \(convnext-c8.*load it with DINOv3ConvNeXt.from_pretrained"
    ):
        DINOv3ViT.from_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"holds a vision transformer .*with DINOv3ViT.from_pretrained, or with dinov3_lite.l"
    ):
        DINOv3ConvNeXt.from_pretrained(vit)
    (vit / "config.json").write_text(json.dumps(TINY_CONVNEXT.to_dict()))
    with pytest.raises(ValueError, match="config.json: is of a ConvNeXt, and the tensors beside it are those of a v"):
        dinov3_lite.load(vit)


# ---- the arguments of the one door


@pytest.mark.parametrize("rule", ["repeat", "mean"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_other_channels_through_every_door(count, rule, folder, tmp_path):
    stem = trained_like(TINY_CONVNEXT)["stem.conv.weight"]
    alike = torch.randn(1, 1, 64, 96)
    expected = made()(alike.expand(-1, 3, -1, -1)).last_hidden_state
    options = {"num_channels": count, "channel_rule": rule}
    model = dinov3_lite.load(folder, **options)
    assert model.num_channels == model.config.num_channels == count and model.card.preprocessing is None
    if rule == "mean" or count == 1:  # "repeat" of a number that is no multiple of three prefers the first
        assert relative_error(model(alike.expand(-1, count, -1, -1)).last_hidden_state, expected) < 2e-6
    if (count, rule) == (5, "repeat"):
        assert torch.equal(model.stem.conv.weight, stem[:, [0, 1, 2, 0, 1]] * (3 / 5))
    for other in (
        DINOv3ConvNeXt.from_pretrained(folder, **options),
        DINOv3ConvNextBackbone.from_pretrained(folder, **options).model,
        dinov3_lite.build_dinov3_encoder(pretrained_path=folder, **options).backbone,
    ):
        assert torch.equal(other.stem.conv.weight, model.stem.conv.weight)
    again = dinov3_lite.load(model.save_pretrained(tmp_path / "again", "transformers"))
    assert same(again, model.state_dict())
    processor = ImageProcessor.from_pretrained(folder, **options)
    assert processor.num_channels == count


def test_prefix_and_subfolder_through_every_door(folder, tmp_path):
    wanted, other = trained_like(TINY_CONVNEXT), trained_like(TINY_CONVNEXT, seed=1)
    several = {f"student.{name}": tensor for name, tensor in renamed(other, META).items()}
    several |= {f"teacher.{name}": tensor for name, tensor in renamed(wanted, META).items()}
    torch.save(several, tmp_path / "both.pth")
    (tmp_path / "repository").mkdir()
    folder.rename(tmp_path / "repository" / "inside")
    doors = (
        dinov3_lite.load,
        DINOv3ConvNeXt.from_pretrained,
        lambda *a, **k: DINOv3ConvNextBackbone.from_pretrained(*a, **k).model,
        lambda source, **k: dinov3_lite.build_dinov3_encoder(pretrained_path=source, **k).backbone,
    )
    for door in doors:
        assert same(door(tmp_path / "both.pth", prefix="teacher"), wanted)
        assert same(door(tmp_path / "both.pth", prefix="student"), other)
        assert same(door(tmp_path / "repository", subfolder="inside", local_files_only=True), wanted)
        with pytest.raises(TypeError, match="revison"):
            door(tmp_path / "both.pth", prefix="teacher", revison="main")


def test_a_backbone_has_the_stages_that_its_config_says(folder):
    config = json.loads((folder / "config.json").read_text())
    said = config | {"out_indices": [1, 3], "out_features": ["stage1", "stage3"]}
    (folder / "config.json").write_text(json.dumps(said))
    assert DINOv3ConvNextBackbone.from_pretrained(folder).out_features == ["stage1", "stage3"]
    assert DINOv3ConvNextBackbone.from_pretrained(folder, out_indices=[-1]).channels == [32]
    half = DINOv3ConvNextBackbone.from_pretrained(folder, out_features=["stem", "stage2"], dtype=torch.bfloat16)
    assert half.channels == [3, 16] and half.model.dtype == torch.bfloat16 and not half.training
    assert DINOv3ConvNextBackbone.from_pretrained(folder, patch_size=16).model.patch_size == 16
    (folder / "config.json").write_text(json.dumps(said | {"out_indices": "last"}))
    with pytest.raises(ValueError, match="config.json: out_indices is 'last': expected a list of int"):
        DINOv3ConvNextBackbone.from_pretrained(folder)
