"""The ConvNeXt against transformers, timm and Meta's code, live, on trained-like weights, with the reference's own error
against float64 as the yardstick.

The bounds: in float32 at most 1.5 times the reference's error, in bfloat16 and float16 at most the reference's; in float64
all agree but for its own rounding.
`make test` runs this file against two releases of transformers; `make parity-table` prints what it measured.
Meta's code is compared with where the environment variable DINOV3_REPO names a clone of its repository.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convnexts import META, TIMM, TINY_CONVNEXT, TRANSFORMERS, made, renamed, trained_like
from helpers import relative_error, run_reference, write_checkpoint
from safetensors.torch import load_file, save_file

from dinov3_lite import DINOv3ConvNeXt, DINOv3ConvNextBackbone, DINOv3ConvNeXtConfig, FeaturesOnly

# Depth is cut so that the whole fits into memory and minutes; widths are the released ones.
DEPTHS = {"tiny": (3, 3, 9, 3), "small": (1, 1, 4, 1), "base": (1, 1, 2, 1), "large": (1, 1, 1, 1)}
SIZES = {"square": (96, 96), "odd": (70, 101), "smallest": (32, 32)}
BOUND = {torch.float32: 1.5, torch.bfloat16: 1.0, torch.float16: 1.0}


def check(face: str, call: str, ours: list, theirs: list, exact: list, truth: list) -> None:
    """float32 `ours` and `theirs`, and float64 `exact` (ours) and `truth` (theirs)."""
    assert len(ours) == len(theirs) == len(exact) == len(truth) > 0
    errors, doubles = [], []
    for i, (a, b, c, t) in enumerate(zip(ours, theirs, exact, truth, strict=True)):
        assert a.shape == b.shape == c.shape == t.shape, f"{call}, {i}: {tuple(a.shape)}, {tuple(b.shape)}"
        errors.append((relative_error(a, t), relative_error(b, t)))
        doubles.append(relative_error(c, t))
        mine, reference = errors[-1]
        assert mine <= 1.5 * reference, f"{face}, {call}, {i}: ours {mine:.3g}, theirs {reference:.3g}"
    assert max(doubles) < 1e-13
    worst = [max(column) for column in zip(*errors, strict=True)]
    record({"face": f"{face} (ConvNeXt)", "call": call, "float32": worst, "float64": max(doubles)})


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
@pytest.mark.parametrize("dtype", [torch.float64, *BOUND], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_hidden_state(variant, dtype):
    import reference_convnext as reference

    name, folder, config, cases = variant
    theirs, ours = reference.load(folder, dtype), made(config, dtype)
    for size, (images, truth) in cases.items():
        states, references = (reference.states(model, images.to(dtype)) for model in (ours, theirs))
        assert [state.shape for state in states] == [t.shape for t in truth]
        errors = [[relative_error(s, t) for s, t in zip(found, truth, strict=True)] for found in (states, references)]
        if dtype == torch.float64:
            assert max(errors[0]) < 1e-14
            continue
        for i, (mine, theirs_here) in enumerate(zip(*errors, strict=True)):
            assert mine <= BOUND[dtype] * theirs_here, f"{size}, state {i}: ours {mine:.3g}, theirs {theirs_here:.3g}"
        ratio = max(a / b for a, b in zip(*errors, strict=True) if b)
        row = {"variant": f"convnext-{name}", "dtype": str(dtype).removeprefix("torch."), "size": size}
        record(row | {"ours": max(errors[0]), "transformers": max(errors[1]), "worst_ratio": ratio})


STAGES = [{}, {"out_indices": [0, 2, 4]}, {"out_features": ["stage1", "stage2", "stage3", "stage4"]}]


@torch.no_grad()
@pytest.mark.parametrize("options", STAGES, ids=str)
def test_transformers_backbone(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DINOv3ConvNextBackbone"):
        pytest.skip(f"transformers {transformers.__version__} has no DINOv3ConvNextBackbone")
    folder = write_checkpoint(tmp_path, TINY_CONVNEXT, renamed(trained_like(TINY_CONVNEXT), TRANSFORMERS))
    theirs = transformers.DINOv3ConvNextBackbone.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ours, exact = (DINOv3ConvNextBackbone(made(dtype=dtype), **options) for dtype in (torch.float32, torch.float64))
    for name in ("out_features", "out_indices", "stage_names", "num_features", "channels"):
        assert list(getattr(ours, name)) == list(getattr(theirs, name)), name
    images = torch.randn(2, 3, 70, 101)
    outputs = ours(images), theirs(images), exact(images.double()), theirs.double()(images.double())
    check("transformers", f"DINOv3ConvNextBackbone({options})", *(o.feature_maps for o in outputs))


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
    config = replace(TINY_CONVNEXT, hidden_sizes=(96, 192, 384, 768))
    sizes = {"depths": list(config.depths), "dims": list(config.hidden_sizes)}
    weights = renamed(trained_like(config), META)
    norms = {f"norms.3.{name}": weights[f"norm.{name}"] for name in ("weight", "bias")}
    models = [module.ConvNeXt(**sizes, patch_size=patch_size).eval() for _ in range(2)]
    for model in models:
        model.load_state_dict(weights | norms, strict=True)
    models = [made(config), models[0], made(config, torch.float64), models[1].double()]
    models[0].patch_size = models[2].patch_size = patch_size
    images = torch.randn(2, 3, *SIZES[size])
    inputs = [images, images, images.double(), images.double()]

    features = [model.forward_features(x) for model, x in zip(models, inputs, strict=True)]
    assert features[0].keys() == features[1].keys()
    names = [name for name in features[0] if name not in ("masks", "x_storage_tokens")]
    check("Meta", "forward_features", *([f[name] for name in names] for f in features))
    assert features[0]["x_storage_tokens"].shape == features[1]["x_storage_tokens"].shape == (2, 0, 768)
    for call in METAS_CALLS:
        results = []
        for model, x in zip(models, inputs, strict=True):
            outputs = model.get_intermediate_layers(x, **call)
            results.append([part for output in outputs for part in (output if isinstance(output, tuple) else [output])])
        check("Meta", f"get_intermediate_layers({call}, patch_size={patch_size})", *results)


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
    save_file(renamed(trained_like(TINY_CONVNEXT), TIMM), tmp_path / "weights.safetensors")
    save_file(images, tmp_path / "images.safetensors")
    sizes = {"depths": TINY_CONVNEXT.depths, "dims": TINY_CONVNEXT.hidden_sizes}
    files = [tmp_path / f"{name}.safetensors" for name in ("weights", "images", "out")]
    arguments = *files, json.dumps(sizes), json.dumps(TIMMS_CALLS)
    printed = run_reference("reference_timm_convnext.py", *arguments, cwd=tmp_path)
    described, theirs = json.loads(printed), load_file(files[-1])

    ours = {dtype: made(dtype=getattr(torch, dtype)) for dtype in ("float32", "float64")}
    model = ours["float32"]
    assert model.feature_info == described["feature_info"]
    info = FeaturesOnly(model, (0, 2, 3)).feature_info
    assert info.channels() == described["channels"] == [8, 24, 32]
    assert info.reduction() == described["reduction"] == [4, 16, 32]

    def results(model, x):
        found = {"features": [model.forward_intermediates(x)[0]], "pooled": [model(x).pooler_output]}
        found["features_only"] = FeaturesOnly(model, (0, 2, 3))(x)
        for i, call in enumerate(TIMMS_CALLS):
            result = model.forward_intermediates(x, **call)
            found[str(i)] = result if call.get("intermediates_only") else [result[0], *result[1]]
        return found

    for size, x in images.items():
        single, double = results(model, x), results(ours["float64"], x.double())
        for name in single:
            count = sum(key.startswith(f"{size}/float32/{name}/") for key in theirs)
            at = [[theirs[f"{size}/{dtype}/{name}/{i}"] for i in range(count)] for dtype in ours]
            call = f"forward_intermediates({TIMMS_CALLS[int(name)]})" if name.isdigit() else name
            check("timm", call, single[name], at[0], double[name], at[1])
