"""The three faces against the libraries whose names they bear, on trained-like weights.

Truth is the other library in float64. In float32 we may err 1.5 times as much as it does; in float64 both must agree but
for the float32 RoPE angles. `python benchmarks/parity.py` prints what was measured.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convnexts import made
from helpers import TINY, TINY_GATED, relative_error, run_reference, trained_like, transformers_with, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ConvNextBackbone, DINOv3ViT, DINOv3ViTBackbone, FeaturesOnly

CONFIGS = {"gelu": replace(TINY, num_hidden_layers=4), "gated": replace(TINY_GATED, num_hidden_layers=4)}


@pytest.fixture
def model(tmp_path) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, CONFIGS["gelu"]))


@pytest.fixture
def images() -> torch.Tensor:
    """Many, so that an error of CLS tokens alone is one of some hundred numbers."""
    return torch.randn(16, 3, 40, 24)


def check(face, call, ours, theirs, exact, truth):
    """float32 `ours` and `theirs`, and float64 `exact` (ours) and `truth` (theirs), lists of tensors."""
    assert len(ours) == len(theirs) == len(exact) == len(truth) > 0
    row = {"face": face, "call": call, "float32": [0.0, 0.0], "float64": 0.0}
    for a, b, c, t in zip(ours, theirs, exact, truth, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32 and c.dtype == torch.float64
        errors = [relative_error(a, t), relative_error(b, t)]
        row["float32"] = [max(pair) for pair in zip(row["float32"], errors, strict=True)]
        row["float64"] = max(row["float64"], relative_error(c, t))
        assert errors[0] <= 1.5 * errors[1], f"{face} {call}: ours {errors[0]:.3g}, {errors[1]:.3g}"
    if path := os.environ.get("PARITY_TABLE"):
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")
    assert row["float64"] < 3e-7


# ---- transformers


STAGES = [
    {},
    {"out_indices": [1, 2, 4]},
    {"out_indices": [-1, 0], "return_class_token": True},
    {"out_features": ["stem", "stage2"], "apply_layernorm": False},
    {"out_indices": [3, 4], "apply_layernorm": False, "reshape_hidden_states": False, "return_class_token": True},
]


def transformers_backbone(folder, options):
    transformers = transformers_with("DINOv3ViTBackbone")
    options = dict(options)
    return_class_token = options.pop("return_class_token", False)
    if "out_indices" in options:
        options["out_indices"] = sorted(i % 5 for i in options["out_indices"])  # refuses another order
    backbone = transformers.DINOv3ViTBackbone.from_pretrained(folder, dtype=torch.float32, **options)
    backbone.config.return_class_token = return_class_token
    return backbone.eval()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", STAGES, ids=str)
def test_transformers_backbone(config, options, tmp_path, images):
    folder = write_checkpoint(tmp_path, CONFIGS[config])
    theirs = transformers_backbone(folder, options)
    ours = DINOv3ViTBackbone.from_pretrained(folder, **options)
    exact = DINOv3ViTBackbone.from_pretrained(folder, dtype=torch.float64, **options)
    assert (ours.out_features, ours.channels) == (theirs.out_features, theirs.channels)
    assert (ours.stage_names, ours.num_features) == (theirs.stage_names, theirs.num_features)

    with torch.no_grad():
        outputs = [ours(images), theirs(images), exact(images.double()), theirs.double()(images.double())]
    check("transformers", f"DINOv3ViTBackbone({spell(options)})", *(o.feature_maps for o in outputs))
    if options.get("return_class_token"):
        check("transformers", "cls_tokens", *(o.cls_tokens for o in outputs))
    else:
        assert outputs[0].cls_tokens is None


def spell(options: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": [5]}, "out_indices has 5: expected stages from -5 to 4, 0 the stem"),
        ({"out_indices": [-6]}, "out_indices has -6: expected stages from -5 to 4"),
        ({"out_indices": [1.5]}, "out_indices has 1.5: expected stages from -5 to 4"),
        ({"out_indices": []}, "name no stage: expected at least one"),
        ({"out_features": ["stage9"]}, "out_features has 'stage9': expected stem or stage1 to stage4"),
        ({"out_indices": [1], "out_features": ["stage2"]}, "expected the same stages, or only one"),
    ],
)
def test_stages_that_there_are_not(model, options, message):
    with pytest.raises(ValueError, match=message):
        DINOv3ViTBackbone(model, **options)


# ---- Meta


@pytest.mark.parametrize("config", CONFIGS)
def test_metas_intermediate_layers(config, tmp_path, images):
    """Meta's definition of it, over the hidden states of transformers: a layer's output, normed, cut, on its grid."""
    pytest.importorskip("transformers")
    import reference

    folder = write_checkpoint(tmp_path, CONFIGS[config])
    prefix = CONFIGS[config].num_prefix_tokens
    with torch.no_grad():
        models = [reference.load(folder), reference.truth_model(folder)]
        ours = DINOv3ViT.from_pretrained(folder), DINOv3ViT.from_pretrained(folder, dtype=torch.float64)
        for n, blocks in ((2, [2, 3]), ([0, -1], [0, 3]), ("quarters", [0, 1, 2, 3])):
            for norm in (True, False):

                def definition(model, images, norm=norm, blocks=blocks):
                    states = reference.states(model, images)
                    states = [model.norm(states[b + 1]) if norm else states[b + 1] for b in blocks]
                    return [
                        part
                        for s in states
                        for part in (s[:, prefix:].mT.unflatten(-1, (5, 3)), s[:, 0], s[:, 1:prefix])
                    ]

                def face(model, images, n=n, norm=norm):
                    options = {"reshape": True, "return_class_token": True, "return_extra_tokens": True, "norm": norm}
                    return [part for output in model.get_intermediate_layers(images, n, **options) for part in output]

                if norm is False and blocks[-1] == 3 and reference.LAST_STATE_IS_NORMED:
                    continue
                outputs = [face(ours[0], images), definition(models[0], images)]
                outputs += [face(ours[1], images.double()), definition(models[1], images.double())]
                check("Meta", f"get_intermediate_layers(n={n!r}, norm={norm})", *outputs)


def test_metas_list_of_crops(model, images):
    """One packed run of all crops gives each its own dictionary."""
    crops = [images[:2], torch.randn(3, 3, 16, 16), torch.randn(1, 3, 40, 24)]
    masks = [torch.rand(2, 15) < 0.5, None, None]
    together = model.forward_features(crops, masks)
    assert [f["masks"] is m for f, m in zip(together, masks, strict=True)] == [True] * 3
    for features, crop, mask in zip(together, crops, masks, strict=True):
        alone = model.forward_features(crop, mask)
        for name in ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm"):
            assert features[name].shape == alone[name].shape and relative_error(features[name], alone[name]) < 1e-6
    assert [len(f["x_norm_clstoken"]) for f in model.forward_features(iter(crops))] == [2, 3, 1]
    with pytest.raises(ValueError, match="x is a list of 0 batches and masks of 0: expected as many, at least one"):
        model.forward_features([])
    with pytest.raises(ValueError, match="x is a list of 3 batches and masks of 1"):
        model.forward_features(crops, [None])


@pytest.mark.parametrize(("depth", "quarters", "dpt"), [
    (12, [2, 5, 8, 11], [2, 5, 8, 11]),
    (24, [5, 11, 17, 23], [4, 11, 17, 23]),
    (40, [9, 19, 29, 39], [9, 19, 29, 39]),
])  # fmt: skip
def test_named_blocks(depth, quarters, dpt):
    with torch.device("meta"):
        model = DINOv3ViT(replace(TINY, num_hidden_layers=depth))
    assert model.block_indices("quarters") == quarters and model.block_indices("dpt") == dpt


def test_names_of_blocks_that_there_are_not(model):
    with pytest.raises(
        ValueError, match="n is 'halves' and the model has 4 blocks: expected 'quarters' or 'dpt', and 4"
    ):
        model.block_indices("halves")
    with pytest.raises(ValueError, match="n is 'dpt' and the model has 3 blocks"):
        DINOv3ViT(TINY).block_indices("dpt")


# ---- timm


CALLS = [
    {"indices": [0, 5, -1]},
    {"indices": 3, "norm": True, "output_fmt": "NLC"},
    {"indices": [2, 3], "norm": True, "return_prefix_tokens": True},
    {"output_fmt": "NLC", "return_prefix_tokens": True},
    {"indices": [4], "stop_early": True},
]


def test_timms_intermediates_and_feature_info(tmp_path):
    config = replace(DINOv3Config.from_name("vits16"), num_hidden_layers=12)
    weights = trained_like(config)
    weights = {name: w.zero_() if name.endswith("mask_token") else w for name, w in weights.items()}
    source = write_checkpoint(tmp_path / "source", config, weights)
    folder = convert(source, tmp_path / "timm", to="timm")
    images = torch.randn(2, 3, 64, 96)
    save_file({"images": images}, tmp_path / "images.safetensors")
    (tmp_path / "calls.json").write_text(json.dumps(CALLS))
    files = [tmp_path / name for name in ("images.safetensors", "out.safetensors", "calls.json")]
    printed = run_reference("reference_timm.py", folder, *files, cwd=tmp_path)
    described = json.loads(printed.splitlines()[0])
    theirs = load_file(tmp_path / "out.safetensors")

    ours = {dtype: DINOv3ViT.from_pretrained(folder, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    features = FeaturesOnly(ours[torch.float32], (2, 5, 8, 11))
    assert ours[torch.float32].feature_info == described["feature_info"]
    for name in ("channels", "reduction", "module_name"):
        assert getattr(features.feature_info, name)() == described[name]

    def flat(results):
        """Maps and prefix tokens by the names under which timm's come."""
        named = {}
        for i, result in enumerate(results):
            maps, *prefix = result if isinstance(result, tuple) else (result,)
            named |= {f"{i}": maps} | {f"{i}/prefix": tokens for tokens in prefix}
        return named

    with torch.no_grad():
        calls = {
            str(i): [
                flat(m.forward_intermediates(images.to(d), intermediates_only=True, **call)) for d, m in ours.items()
            ]
            for i, call in enumerate(CALLS)
        }
        calls["features_only"] = [flat(FeaturesOnly(m, (2, 5, 8, 11))(images.to(d))) for d, m in ours.items()]
        for call, (single, double) in calls.items():
            names = {key.split("/", 2)[2] for key in theirs if key.startswith(f"float32/{call}/")}
            assert set(single) == set(double) == names
            tables = single, at(theirs, f"float32/{call}"), double, at(theirs, f"float64/{call}")
            spelt = f"forward_intermediates({spell(CALLS[int(call)])})" if call.isdigit() else call
            check("timm", spelt, *([table[name] for name in sorted(names)] for table in tables))
        last, maps = ours[torch.float32].forward_intermediates(images, [1])
        exact, _ = ours[torch.float64].forward_intermediates(images.double(), [1])
        check("timm", "last of both", [last], [theirs["float32/last"]], [exact], [theirs["float64/last"]])
        assert len(maps) == 1


def at(tensors, prefix):
    return {key.removeprefix(f"{prefix}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}/")}


def test_timms_face_stops_where_timm_does_and_earlier(model, images):
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert ran == [0, 1]
    last, (maps,) = model.forward_intermediates(images, [2], stop_early=True, output_fmt="NLC", norm=True)
    assert ran == [0, 1, 0, 1, 2] and torch.equal(last[:, 5:], maps)
    model.forward_intermediates(images, [0])
    assert ran[5:] == [0, 1, 2, 3]
    FeaturesOnly(model, [1])(images)
    assert ran[9:] == [0, 1]
    DINOv3ViTBackbone(model, out_indices=[0, 1])(images)
    assert ran[11:] == [0]
    DINOv3ViTBackbone(model, out_indices=[0])(images)
    assert ran[12:] == []


def test_timms_bad_options(model, images):
    with pytest.raises(ValueError, match="output_fmt is 'NHWC': expected 'NCHW' or 'NLC'"):
        model.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(ValueError, match=r"indices is \[4\]: expected block indices from -4 to 3"):
        model.forward_intermediates(images, [4])


def test_a_backbone_is_loaded_as_asked_for_and_in_evaluation_mode(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIGS["gelu"])
    backbone = DINOv3ViTBackbone.from_pretrained(folder, dtype=torch.float16, attention="eager", out_indices=[2])
    assert not backbone.training and not backbone.model.training
    assert (backbone.model.dtype, backbone.model.attention, backbone.out_indices) == (torch.float16, "eager", [2])
    assert DINOv3ViTBackbone.from_pretrained(folder, device="meta").model.device.type == "meta"


def test_the_reduction_of_a_map_is_the_patch_size():
    for size in (8, 14):
        model = DINOv3ViT(replace(CONFIGS["gelu"], patch_size=size))
        assert FeaturesOnly(model, [0, 2]).feature_info.reduction() == [size, size]


@torch.no_grad()
def test_normed_features_are_the_normed_layers(model, images):
    maps = FeaturesOnly(model, [0, 2], norm=True)(images)
    for actual, expected in zip(maps, model.get_intermediate_layers(images, [0, 2], reshape=True), strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(maps[0], FeaturesOnly(model, [0, 2])(images)[0])


@torch.no_grad()
def test_the_stem_of_a_convnext_is_the_images_and_its_stages_are_the_hidden_states():
    model, images = made().eval(), torch.randn(2, 3, 64, 96)
    states = model(images, output_hidden_states=True).hidden_states
    for stages in ([0], [0, 2], [1, 4], [0, 1, 2, 3, 4]):
        maps = DINOv3ConvNextBackbone(model, out_indices=stages)(images).feature_maps
        assert len(maps) == len(stages)
        assert all(torch.equal(actual, states[stage]) for actual, stage in zip(maps, stages, strict=True))
    assert torch.equal(states[0], images)


def test_options_of_another_library_are_not_ours(tmp_path):
    """A config.json of timm's has no model_type: what is called as an option of transformers' backbones is its own."""
    config = replace(TINY, hidden_size=128, num_attention_heads=2, pos_embed_rescale=None)
    weights = trained_like(config)
    weights["embeddings.mask_token"].zero_()
    folder = convert(write_checkpoint(tmp_path / "source", config, weights), tmp_path / "timm", to="timm")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"reshape_hidden_states": False}))
    (feature_map,) = DINOv3ViTBackbone.from_pretrained(folder)(torch.zeros(1, 3, 16, 24)).feature_maps
    assert feature_map.shape == (1, 128, 2, 3)
