"""Every hidden state against transformers, live, with transformers' own error against float64 as the yardstick.

The bounds: in float32 at most 1.5 times the reference's error, in bfloat16 and float16 at most the reference's.
`make test` runs this file against two releases of transformers; `python benchmarks/parity.py` prints what it measured.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("transformers")

import reference
from helpers import TINY, TINY_GATED, ByFirstWord, relative_error, trained_like, write_checkpoint

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT, attention, optimize_for_inference
from dinov3_lite.attention_ways import ways_of_attention
from dinov3_lite.checkpoint.layouts import TRANSFORMERS
from dinov3_lite.folding import fold
from dinov3_lite.prepacked import available, ways_of_products
from dinov3_lite.prepared import PreparedViT

# Depth is cut so that the whole fits into memory and minutes; widths, heads and MLPs are the released ones.
DEPTHS = {"vits16": 12, "vits16plus": 12, "vitb16": 12, "vitl16": 6, "vitl16plus": 4, "vith16plus": 3, "vit7b16": 2}
SIZES = {"square": (96, 96), "wide": (64, 112)}
BOUND = {torch.float32: 1.5, torch.bfloat16: 1.0, torch.float16: 1.0}


@pytest.fixture(scope="module", params=DEPTHS)
def variant(request, tmp_path_factory):
    """(folder, config, images and float64 states by size) of one variant with trained-like weights."""
    name = request.param
    config = replace(DINOv3Config.from_name(name), num_hidden_layers=DEPTHS[name])
    folder = write_checkpoint(tmp_path_factory.mktemp(name), config)
    truth = reference.truth_model(folder)
    cases = {}
    with torch.no_grad():
        for size, (height, width) in SIZES.items():
            images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
            cases[size] = images, reference.states(truth, images.double())
    yield name, folder, cases


@pytest.mark.parametrize("dtype", BOUND, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_hidden_state(variant, dtype):
    name, folder, cases = variant
    theirs = reference.load(folder, dtype)
    ours = DINOv3ViT.from_pretrained(folder, dtype=dtype)
    known: dict[str, list[float]] = {}
    for what, model in paths(ours, dtype):
        for size, (images, truth) in cases.items():
            errors = errors_of(model, images, truth)
            their_errors = errors_of(theirs, images, truth) if what == "ours" else known[size]
            if what == "ours":
                known[size] = their_errors
                record(name, dtype, size, list(zip(errors, their_errors, strict=True))[:-1])
            for i, (error, theirs_here) in enumerate(zip(errors, their_errors, strict=True)):
                assert error <= BOUND[dtype] * theirs_here, f"{size}, state {i}: {what} {error:.3g}, {theirs_here:.3g}"


def paths(ours: DINOv3ViT, dtype: torch.dtype) -> Iterator[tuple[str, DINOv3ViT]]:
    """Every path of a model, one at a time: as loaded, folded, and prepared, for the usual widths in every way that
    there is to choose.
    """
    yield "ours", ours
    folded = copy.deepcopy(ours)
    folded.blocks = torch.nn.ModuleList(map(fold, ours.blocks))
    yield "folded", folded
    del folded
    yield "prepared for all sizes", optimize_for_inference(ours)
    if not available(torch.empty(0, dtype=dtype)) or ours.config.hidden_size > 768:
        return
    for i, way in enumerate(ways_of_attention(dtype)):
        products = ways_of_products(dtype, for_any_rows=False, terms=ours.config.intermediate_size)
        product = products[i % len(products)]
        model = optimize_for_inference(ours, dynamic=False, choices=ByFirstWord(product=product, attention=way))
        yield f"{product}; {way}", model
    if dtype == torch.bfloat16:
        with patch.object(attention, "has", lambda instructions: instructions == "avx512_bf16"):
            yield "ours, as without AMX", ours


@torch.no_grad()
def errors_of(model, images: torch.Tensor, truth: list[torch.Tensor]) -> list[float]:
    """The relative error of each hidden state; and last that of the normed CLS and registers, which a prepared model
    can compute alone.
    """
    states = reference.states(model, images)
    exact = truth[-1][:, : 1 + model.config.num_register_tokens]
    prefix = states[-1][:, : exact.shape[1]]
    if isinstance(model, PreparedViT):
        prefix = model.norm(model.run_prefix(model.embed(images)[0], [model.depth - 1])[0])
    return [relative_error(x, t) for x, t in zip([*states, prefix], [*truth, exact], strict=True)]


@pytest.mark.parametrize("name", ["vits16", "vits16plus"])
def test_float16_survives_register_outliers(name, tmp_path):
    """Released weights take the residual stream of registers to 155,000: the reference's float16 overflows, ours must not."""
    config = replace(DINOv3Config.from_name(name), num_hidden_layers=6)
    folder = write_checkpoint(tmp_path, config, trained_like(config, outliers=True))
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        truth = reference.states(reference.truth_model(folder), images.double())
        theirs = reference.states(reference.load(folder, torch.float16), images)
        ours = reference.states(DINOv3ViT.from_pretrained(folder, dtype=torch.float16), images)
        halved = reference.states(DINOv3ViT.from_pretrained(folder).half(), images)
    assert truth[1][:, 2].abs().max() > 65504 and truth[1][:, 5:].abs().max() < 1000
    assert not all(state.isfinite().all() for state in theirs)
    errors = [relative_error(a, t) for a, t in zip(ours, truth, strict=True)]
    errors += [relative_error(a, t) for a, t in zip(halved, truth, strict=True)]
    # the outlier dominates a norm over all tokens: look at the others by themselves, too
    errors += [relative_error(a[:, 5:], t[:, 5:]) for a, t in zip(ours, truth, strict=True)]
    record(f"{name}, outliers", torch.float16, "wide", [(error, float("inf")) for error in errors])
    assert max(errors) < 3e-3


def test_float16_survives_outliers_in_the_tokens_themselves(tmp_path):
    weights = trained_like(TINY)
    weights["embeddings.register_tokens"][0, 1, 7] = 90000.0
    folder = write_checkpoint(tmp_path, TINY, weights)
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        truth = reference.states(reference.truth_model(folder), images.double())
        for ours in (
            DINOv3ViT.from_pretrained(folder, dtype=torch.float16),
            DINOv3ViT.from_pretrained(folder).half(),
            DINOv3ViT.from_pretrained(convert(folder, tmp_path / "half.safetensors", dtype=torch.float16, force=True)),
        ):
            for state, t in zip(reference.states(ours, images), truth, strict=True):
                assert relative_error(state, t) < 3e-3


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_positions(config, attention, tmp_path):
    folder = write_checkpoint(tmp_path, config)
    images = torch.randn(3, 3, 40, 24)
    mask = torch.rand(3, 15) < 0.4
    with torch.no_grad():
        truth = reference.states(reference.truth_model(folder), images.double(), mask)
        theirs = reference.states(reference.load(folder, attention=attention), images, mask)
        ours = reference.states(DINOv3ViT.from_pretrained(folder, attention=attention), images, mask)
        unmasked = reference.states(DINOv3ViT.from_pretrained(folder, attention=attention), images)
    assert relative_error(unmasked[0], truth[0]) > 0.1
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert relative_error(a, t) <= 1.5 * relative_error(b, t)


@torch.no_grad()
def test_sharp_attention_in_bfloat16(tmp_path):
    """As loaded and prepared, with scores of some tens, where rounding them to bfloat16 shows in every state."""
    config = replace(DINOv3Config.from_name("vits16"), num_hidden_layers=2)
    weights = trained_like(config)
    for name in weights:
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weights[name] *= 8**0.5
    folder, images = write_checkpoint(tmp_path, config, weights), torch.randn(1, 3, 224, 224)
    truth = reference.states(reference.truth_model(folder), images.double())
    theirs = reference.states(reference.load(folder, torch.bfloat16), images.bfloat16())
    model = DINOv3ViT.from_pretrained(folder, dtype=torch.bfloat16)
    for ours in (model, optimize_for_inference(model)):
        states = reference.states(ours, images.bfloat16())
        for a, b, t in list(zip(states, theirs, truth, strict=True))[1:]:  # the first has seen no attention
            assert relative_error(a, t) <= relative_error(b, t)


@pytest.mark.parametrize("name", ["vits16", "vits16plus"])
def test_gradients_of_input_and_weights(name, tmp_path):
    """In float64 both are exact but for the float32 RoPE angles; in float32 ours may err 1.5 times as much as theirs."""
    config = replace(DINOv3Config.from_name(name), num_hidden_layers=3)
    folder = write_checkpoint(tmp_path, config)
    images = torch.randn(2, 3, 48, 80)
    target = torch.randn(2, 1 + config.num_register_tokens + 15, config.hidden_size)

    def gradients(model, dtype):
        x = images.to(dtype, copy=True).requires_grad_()
        (model(x).last_hidden_state * target.to(dtype)).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name in [name for name in grads if name.endswith("qkv.bias")]:  # ours
            thirds = dict(zip(("q_bias", "k_bias", "v_bias"), grads.pop(name).chunk(3), strict=True))
            assert not thirds.pop("k_bias").any()
            grads |= {name.replace("bias", third): grad for third, grad in thirds.items()}
        return {"pixel_values": x.grad, **grads}

    def as_ours(grads):
        """Transformers' gradients under our names, by the table that loading goes by."""
        on_disk = {name.replace("model.layer.", "layer."): g for name, g in grads.items()}
        result = {"pixel_values": on_disk["pixel_values"]}
        for theirs, ((name, _),), _ in TRANSFORMERS.table(config).equations(config):
            if theirs[0][0] in on_disk:
                result[name] = torch.cat([on_disk[source] for source, _ in theirs])
        return result

    truth = as_ours(gradients(reference.truth_model(folder), torch.float64))
    theirs = as_ours(gradients(reference.load(folder), torch.float32))
    ours = gradients(DINOv3ViT.from_pretrained(folder), torch.float32)
    exact = gradients(DINOv3ViT.from_pretrained(folder, dtype=torch.float64), torch.float64)
    assert ours.keys() == exact.keys() == truth.keys() and "mask_token" not in truth
    for name, t in truth.items():
        assert relative_error(exact[name], t) < 1e-6, name
        assert relative_error(ours[name], t) <= 1.5 * relative_error(theirs[name], t), name


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
def test_converted_and_unconverted_loading_agree_to_the_bit(config, tmp_path):
    """Also as this release of transformers saves a model itself, whatever it calls its layers in memory."""
    folder = write_checkpoint(tmp_path / "made", config)
    saved = tmp_path / "saved"
    reference.load(folder).save_pretrained(saved)
    images = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        expected = reference.states(DINOv3ViT.from_pretrained(folder), images)
        for source in (saved, convert(folder), convert(saved)):
            for a, b in zip(reference.states(DINOv3ViT.from_pretrained(source), images), expected, strict=True):
                assert torch.equal(a, b)


def test_training_mode_augments_rope_as_the_reference(tmp_path):
    """Equal seeds give equal augmentations: shift, jitter and rescale, in that order."""
    config = replace(TINY, pos_embed_shift=0.3, pos_embed_jitter=1.5, pos_embed_rescale=2.0)
    folder = write_checkpoint(tmp_path, config)
    theirs, ours = reference.load(folder).train(), DINOv3ViT.from_pretrained(folder).train()
    images = torch.randn(2, 3, 40, 24)
    outputs = []
    for seed in (0, 1):
        with torch.no_grad():
            torch.manual_seed(seed)
            expected = theirs(images).last_hidden_state
            torch.manual_seed(seed)
            outputs.append(ours(images).last_hidden_state)
        assert relative_error(outputs[-1], expected) < 2e-6
    assert relative_error(outputs[0], outputs[1]) > 1e-2


def record(name: str, dtype: torch.dtype, size: str, errors: list[tuple[float, float]]) -> None:
    """Append the worst errors to the file that `make parity-table` reads, if it asked for one."""
    if "PARITY_TABLE" in os.environ:
        theirs = max(theirs for _, theirs in errors)
        row = {
            "variant": name,
            "dtype": str(dtype).removeprefix("torch."),
            "size": size,
            "ours": max(ours for ours, _ in errors),
            "transformers": theirs if theirs < float("inf") else "overflow",
            "worst_ratio": max(ours / theirs for ours, theirs in errors),
        }
        with Path(os.environ["PARITY_TABLE"]).open("a") as file:
            file.write(json.dumps(row) + "\n")
