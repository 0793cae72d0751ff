"""The ConvNeXt against transformers, timm and Meta's code, live, on trained-like weights, with the reference's own error
against float64 as the yardstick.

The bounds: in float32 at most 1.5 times the reference's error, in bfloat16 and float16 at most the reference's; in float64
all agree but for its own rounding.
`make test` runs this file against two releases of transformers; `make parity-table` prints what it measured.
Meta's code is compared with where the environment variable DINOV3_REPO names a clone of its repository.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convnexts import META, TIMM, TINY_CONVNEXT, TRANSFORMERS, made, renamed, trained_like
from helpers import relative_error, run_reference, transformers_with, write_checkpoint
from safetensors.torch import load_file, save_file

from dinov3_lite import (
    DINOv3ConvNeXt,
    DINOv3ConvNextBackbone,
    DINOv3ConvNeXtConfig,
    FeaturesOnly,
    optimize_for_inference,
)

# Depth is cut so that the whole fits into memory and minutes; widths are the released ones.
DEPTHS = {"tiny": (3, 3, 9, 3), "small": (1, 1, 4, 1), "base": (1, 1, 2, 1), "large": (1, 1, 1, 1)}
SIZES = {"square": (96, 96), "odd": (70, 101), "smallest": (32, 32)}
BOUND = {torch.float32: 1.5, torch.bfloat16: 1.0, torch.float16: 1.0}
DTYPES = (torch.float64, *BOUND)
# Few blocks, but enough channels that rounding errors are a mean of many: of 8 channels, theirs is by luck the smaller.
WIDE = replace(TINY_CONVNEXT, hidden_sizes=(96, 192, 384, 768))


def check(face: str, call: str, ours: dict, theirs: dict, truth: dict) -> None:
    """What both libraries return in each dtype; `truth` is theirs in float64, of weights and images as that dtype holds them.

    So rounded weights are no error here: a mean over many pixels would have hardly another, the same in both.
    """
    errors = {}
    for dtype, exact in truth.items():
        assert len(exact) == len(ours[dtype]) == len(theirs[dtype]) > 0
        assert all(a.shape == t.shape for a, t in zip(ours[dtype], exact, strict=True))
        pairs = errors[dtype] = [
            [relative_error(x, t) for x, t in zip(of[dtype], exact, strict=True)] for of in (ours, theirs)
        ]
        for i, (mine, reference) in enumerate(zip(*pairs, strict=True)):
            told = f"{face}, {call}, {dtype}, {i}: ours {mine:.3g}, theirs {reference:.3g}"
            assert mine <= (1e-13 if dtype == torch.float64 else BOUND[dtype] * reference), told
    worst = [max(column) for column in errors[torch.float32]]
    record({"face": f"{face} (ConvNeXt)", "call": call, "float32": worst, "float64": max(errors[torch.float64][0])})


def record(row: dict) -> None:
    """For `make parity-table`, if it asked for a file of rows."""
    if path := os.environ.get("PARITY_TABLE"):
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")


# ---- transformers


@pytest.fixture(scope="module", params=DEPTHS)
def variant(request, tmp_path_factory):
    """(name, folder, config, images and float64 states by size) of one variant with trained-like weights."""
    pytest.importorskip("transformers")
    import reference_convnext as reference

    config = replace(DINOv3ConvNeXtConfig.from_name(f"convnext-{request.param}"), depths=DEPTHS[request.param])
    weights = renamed(trained_like(config), TRANSFORMERS)
    folder = write_checkpoint(tmp_path_factory.mktemp(request.param), config, weights)
    truth = reference.load(folder, torch.float64)
    cases = {}
    with torch.no_grad():
        for size, (height, width) in SIZES.items():
            images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
            cases[size] = images, reference.states(truth, images.double())
    return request.param, folder, config, cases


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_hidden_state(variant, dtype):
    import reference_convnext as reference

    name, folder, config, cases = variant
    theirs, ours = reference.load(folder, dtype), made(config, dtype)
    prepared = ours if dtype == torch.float64 else optimize_for_inference(ours)
    for size, (images, truth) in cases.items():
        states, fast, references = (reference.states(model, images.to(dtype)) for model in (ours, prepared, theirs))
        assert [state.shape for state in states] == [t.shape for t in truth]
        errors = [[relative_error(s, t) for s, t in zip(found, truth, strict=True)] for found in (states, references)]
        if dtype == torch.float64:
            assert max(errors[0]) < 1e-14
            continue
        errors.append([relative_error(s, t) for s, t in zip(fast, truth, strict=True)])
        for i, (mine, theirs_here, prepareds) in enumerate(zip(*errors, strict=True)):
            told = f"{size}, state {i}: ours {mine:.3g}, prepared {prepareds:.3g}, theirs {theirs_here:.3g}"
            assert max(mine, prepareds) <= BOUND[dtype] * theirs_here, told
        ratio = max(a / b for a, b, _ in zip(*errors, strict=True) if b)
        row = {"variant": f"convnext-{name}", "dtype": str(dtype).removeprefix("torch."), "size": size}
        record(row | {"ours": max(errors[0]), "transformers": max(errors[1]), "worst_ratio": ratio})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_more_than_transformers_does(dtype, tmp_path):
    """The sum of all states' errors: from the third stage on both do the same roundings, and single ones are by luck."""
    pytest.importorskip("transformers")
    import reference_convnext as reference

    folder = write_checkpoint(tmp_path, WIDE, renamed(trained_like(WIDE), TRANSFORMERS))
    images = torch.randn(2, 3, 70, 101, generator=torch.Generator().manual_seed(0))
    truth = reference.states(reference.load(folder, torch.float64), images.double())
    errors = []
    for model in (made(WIDE), reference.load(folder)):
        with torch.autocast("cpu", dtype):
            found = reference.states(model, images)
        errors.append(sum(relative_error(state, t) for state, t in zip(found, truth, strict=True)))
    assert 0 < errors[0] <= errors[1]


STAGES = [{}, {"out_indices": [0, 2, 4]}, {"out_features": ["stage1", "stage2", "stage3", "stage4"]}]


@torch.no_grad()
@pytest.mark.parametrize("options", STAGES, ids=str)
def test_transformers_backbone(options, tmp_path):
    transformers = transformers_with("DINOv3ConvNextBackbone")
    folder = write_checkpoint(tmp_path, WIDE, renamed(trained_like(WIDE), TRANSFORMERS))
    theirs = transformers.DINOv3ConvNextBackbone.from_pretrained(folder, dtype=torch.float32, **options).eval()
    images = torch.randn(2, 3, 70, 101)
    found: list[dict] = [{}, {}, {}]
    for dtype in DTYPES:
        ours, rounded = DINOv3ConvNextBackbone(made(WIDE, dtype), **options), copy.deepcopy(theirs).to(dtype)
        for name in ("out_features", "out_indices", "stage_names", "num_features", "channels"):
            assert list(getattr(ours, name)) == list(getattr(theirs, name)), name
        for maps, model in zip(found, (ours, rounded, copy.deepcopy(rounded).double()), strict=True):
            maps[dtype] = model(images.to(dtype).to(next(model.parameters()).dtype)).feature_maps
    check("transformers", f"DINOv3ConvNextBackbone({options})", *found)


def test_gradients_of_input_and_weights(tmp_path):
    pytest.importorskip("transformers")
    import reference_convnext as reference

    folder = write_checkpoint(tmp_path, TINY_CONVNEXT, renamed(trained_like(TINY_CONVNEXT), TRANSFORMERS))
    images = torch.randn(2, 3, 64, 96)
    target = torch.randn(2, 7, TINY_CONVNEXT.hidden_sizes[-1])

    def gradients(model, dtype):
        x = images.to(dtype, copy=True).requires_grad_()
        (model(x).last_hidden_state * target.to(dtype)).sum().backward()
        by_name = {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}
        return {"pixel_values": x.grad} | (
            renamed(by_name, TRANSFORMERS) if isinstance(model, DINOv3ConvNeXt) else by_name
        )

    truth = gradients(reference.load(folder, torch.float64), torch.float64)
    exact = gradients(made(dtype=torch.float64), torch.float64)
    theirs, ours = gradients(reference.load(folder), torch.float32), gradients(made(), torch.float32)
    assert ours.keys() == exact.keys() == truth.keys()
    for name, t in truth.items():
        assert relative_error(exact[name], t) < 1e-13, name
    norms = [sum(relative_error(g[name], t) for name, t in truth.items()) for g in (ours, theirs)]
    assert norms[0] <= 1.5 * norms[1]


@torch.no_grad()
def test_float16_survives_what_its_range_cannot_hold(tmp_path):
    """A residual stream beyond 65,504, which released ViTs have: the reference's float16 overflows, ours must not."""
    pytest.importorskip("transformers")
    import reference_convnext as reference

    weights = trained_like(TINY_CONVNEXT)
    weights["stages.0.blocks.0.mlp.fc2.bias"][5] = 30000.0
    weights["stages.0.blocks.0.ls.gamma"][5] = 4.0
    folder = write_checkpoint(tmp_path, TINY_CONVNEXT, renamed(weights, TRANSFORMERS))
    images = torch.randn(2, 3, 64, 96)
    truth = reference.states(reference.load(folder, torch.float64), images.double())
    assert truth[1].abs().max() > 65504
    assert not all(s.isfinite().all() for s in reference.states(reference.load(folder, torch.float16), images.half()))
    ours = DINOv3ConvNeXt(TINY_CONVNEXT)
    ours.load_state_dict(weights)
    states = reference.states(ours.half().eval(), images)
    assert max(relative_error(state, t) for state, t in zip(states, truth, strict=True)) < 3e-3


# ---- Meta


METAS_CALLS = [
    {"n": 1},
    {"n": 4, "reshape": True},
    {"n": [1, 3], "return_class_token": True},
    {"n": [0, 3], "reshape": True, "return_class_token": True, "norm": False},
]


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [None, 16])
@pytest.mark.parametrize("size", SIZES)
def test_metas_code(patch_size, size):
    import reference_convnext as reference

    module = reference.metas_module()
    weights = renamed(trained_like(WIDE), META)
    norms = {f"norms.3.{name}": weights[f"norm.{name}"] for name in ("weight", "bias")}
    images = torch.randn(2, 3, *SIZES[size])
    found: list[dict] = [{}, {}, {}]
    for dtype in DTYPES if patch_size is None else (torch.float64, torch.float32):  # PyTorch resizes in those alone
        theirs = module.ConvNeXt(depths=list(WIDE.depths), dims=list(WIDE.hidden_sizes), patch_size=patch_size)
        theirs.load_state_dict(weights | norms, strict=True)
        ours = made(WIDE, dtype)
        ours.patch_size = patch_size
        theirs = theirs.eval().to(dtype)
        for results, model in zip(found, (ours, theirs, copy.deepcopy(theirs).double()), strict=True):
            results[dtype] = metas_results(model, images.to(dtype).to(model.norm.weight.dtype), patch_size)
    for name in found[0][torch.float32]:
        check("Meta", name, *({dtype: results[name] for dtype, results in of.items()} for of in found))


def metas_results(model, images: torch.Tensor, patch_size: int | None) -> dict[str, list[torch.Tensor]]:
    """What forward_features and every call of get_intermediate_layers return."""
    features = model.forward_features(images)
    assert set(features) == {"x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm", "masks"}
    assert features.pop("x_storage_tokens").shape == (2, 0, 768)
    found = {"forward_features": [value for name, value in features.items() if name != "masks"]}
    for call in METAS_CALLS:
        outputs = model.get_intermediate_layers(images, **call)
        parts = [part for output in outputs for part in (output if isinstance(output, tuple) else [output])]
        found[f"get_intermediate_layers({call}, patch_size={patch_size})"] = parts
    return found


# ---- timm


TIMMS_CALLS = [
    {},
    {"indices": [0, 2], "norm": True},
    {"indices": 2, "intermediates_only": True},
    {"indices": [1], "stop_early": True},
    {"indices": [-1, 0], "norm": True, "intermediates_only": True},
]


@torch.no_grad()
def test_timms_methods(tmp_path):
    images = {size: torch.randn(2, 3, *sides) for size, sides in SIZES.items()}
    save_file(renamed(trained_like(WIDE), TIMM), tmp_path / "weights.safetensors")
    save_file(images, tmp_path / "images.safetensors")
    sizes = {"depths": WIDE.depths, "dims": WIDE.hidden_sizes}
    files = [tmp_path / f"{name}.safetensors" for name in ("weights", "images", "out")]
    arguments = *files, json.dumps(sizes), json.dumps(TIMMS_CALLS)
    printed = run_reference("reference_timm_convnext.py", *arguments, cwd=tmp_path)
    described, theirs = json.loads(printed), load_file(files[-1])

    ours = {dtype: made(WIDE, dtype) for dtype in DTYPES}
    model = ours[torch.float32]
    assert model.feature_info == described["feature_info"]
    info = FeaturesOnly(model, (0, 2, 3)).feature_info
    assert info.channels() == described["channels"] == [96, 384, 768]
    assert info.reduction() == described["reduction"] == [4, 16, 32]

    for size, x in images.items():
        found = {dtype: timms_results(model, x.to(dtype)) for dtype, model in ours.items()}
        for name in found[torch.float32]:
            results = {dtype: of[name] for dtype, of in found.items()}
            call = f"forward_intermediates({TIMMS_CALLS[int(name)]})" if name.isdigit() else name
            check("timm", call, results, *(read(theirs, f"{size}/{name}/{of}") for of in ("theirs", "truth")))


def read(tensors: dict[str, torch.Tensor], where: str) -> dict[torch.dtype, list[torch.Tensor]]:
    """The tensors of that place, by dtype."""
    count = sum(name.startswith(f"{where}/{torch.float32}/") for name in tensors)
    return {dtype: [tensors[f"{where}/{dtype}/{i}"] for i in range(count)] for dtype in DTYPES}


def timms_results(model, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What forward_features, forward and every call of forward_intermediates return."""
    found = {"features": [model.forward_intermediates(x)[0]], "pooled": [model(x).pooler_output]}
    found["features_only"] = FeaturesOnly(model, (0, 2, 3))(x)
    for i, call in enumerate(TIMMS_CALLS):
        result = model.forward_intermediates(x, **call)
        found[str(i)] = result if call.get("intermediates_only") else [result[0], *result[1]]
    return found
