"""Fine-tuning a ConvNeXt: what freezes, which rate each block has, LoRA, saving what came of it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from convnexts import TINY_CONVNEXT, TRANSFORMERS, made, renamed, trained_like
from helpers import relative_error, write_checkpoint

from dinov3_lite import (
    DINOv3ConvNeXt,
    freeze_but_last,
    load,
    optimize_for_inference,
    parameter_groups,
    trainable_summary,
)

# The blocks of TINY_CONVNEXT, first to last, with what runs right before each alone.
LAYERS = [
    ("stages.0.downsample", "stages.0.blocks.0"),
    ("stages.1.downsample", "stages.1.blocks.0"),
    ("stages.1.blocks.1",),
    ("stages.2.downsample", "stages.2.blocks.0"),
    ("stages.2.blocks.1",),
    ("stages.2.blocks.2",),
    ("stages.3.downsample", "stages.3.blocks.0"),
]


def within(name: str, layers: list[tuple[str, ...]]) -> bool:
    return any(name.startswith(f"{part}.") for layer in layers for part in layer)


@pytest.mark.parametrize("n", range(8))
def test_the_last_blocks_train_with_the_steps_down_before_them(n):
    model = made()
    freeze_but_last(model, n)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    norm = {"norm.weight", "norm.bias"} if n else set()
    assert trains == {name for name, _ in model.named_parameters() if within(name, LAYERS[7 - n :])} | norm
    out = model(torch.randn(1, 3, 32, 64)).last_hidden_state
    assert out.requires_grad == (n > 0)
    if n:
        out.square().mean().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("n", [-1, 8, True, 1.5])
def test_numbers_of_blocks_that_there_are_not(n):
    with pytest.raises(ValueError, match=f"n is {n}: expected a number of blocks from 0 to 7"):
        freeze_but_last(made(), n)


def test_rates_fall_with_depth_through_the_stages():
    model = torch.nn.ModuleDict({"backbone": made(), "head": torch.nn.Linear(32, 2)})
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    named = {name.removeprefix("backbone."): of[id(p)] for name, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(named)
    for name, group in named.items():
        found = [i for i, layer in enumerate(LAYERS) if within(name, [layer])]
        following = 7 - found[0] if found else 8 if name.startswith("stem.") else 0
        assert group["lr"] == 1e-3 * 0.5**following, name
        matrix = name.endswith("weight") and "norm" not in name
        assert group["weight_decay"] == (0.1 if matrix else 0.0), name
    torch.optim.AdamW(groups).step()


def test_the_summary_names_blocks_of_stages():
    model = made()
    freeze_but_last(model, 1)
    rows = {line.split()[0]: line.split()[2] for line in trainable_summary(model).splitlines()[1:]}
    assert rows["stages.2.blocks.2"] == "0" and rows["stages.3.blocks.0"] != "0" and rows["stem.conv"] == "0"


def test_lora_trains_merges_and_is_saved(tmp_path):
    peft = pytest.importorskip("peft")
    images = torch.randn(2, 3, 32, 64)
    wrapped = peft.get_peft_model(made(), peft.LoraConfig(r=4, target_modules=["fc1", "fc2", "conv"]))
    before = made()(images).last_hidden_state
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    for _ in range(3):
        loss = wrapped(images).last_hidden_state.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    wrapped.eval()
    with torch.no_grad():
        adapted = wrapped(images).last_hidden_state
        prepared = optimize_for_inference(wrapped.base_model.model)
        assert relative_error(prepared(images).last_hidden_state, adapted) < 3e-6
        merged = wrapped.merge_and_unload()
        assert relative_error(merged(images).last_hidden_state, adapted) < 1e-5
        assert relative_error(adapted, before) > 1e-3
    again = DINOv3ConvNeXt.from_pretrained(merged.save_pretrained(tmp_path / "merged", "transformers"))
    assert torch.equal(again(images).last_hidden_state, merged(images).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_depthwise_convolutions(dtype):
    """The library peft makes its two convolutions by the class of the one that it adapts, with nn.Conv2d's arguments."""
    peft = pytest.importorskip("peft")
    model, images = made(dtype=dtype), torch.randn(2, 3, 64, 64)
    expected = model(images).last_hidden_state.detach()
    with warnings.catch_warnings(action="ignore"):  # adapters of grouped convolutions can't be merged
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=r"stages\.0\..*dwconv"))
    assert relative_error(adapted(images).last_hidden_state, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    adapted(images).last_hidden_state.square().sum().backward()
    (trained,) = (name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any())
    assert trained.endswith("stages.0.blocks.0.dwconv.lora_B.default.weight")  # zero at first: A gets no gradient yet


@pytest.mark.parametrize("layout", ["lite", "transformers", "meta", "timm"])
def test_save_pretrained_and_the_weights_name(layout, tmp_path):
    folder = write_checkpoint(tmp_path / "source", TINY_CONVNEXT, renamed(trained_like(TINY_CONVNEXT), TRANSFORMERS))
    model = load(folder)
    name = model.weights_id
    assert name.startswith("transformers ") and "changed" not in name
    again = load(model.save_pretrained(tmp_path / layout, layout))
    assert again.weights_id.split()[1] == name.split()[1] and again.config == model.config
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        model.stages[2].blocks[1].mlp.fc1.weight.mul_(1.01)
    assert model.weights_id == "transformers, changed since it was loaded"
    changed = load(model.save_pretrained(tmp_path / f"changed {layout}", layout))
    assert changed.weights_id.split()[1] != name.split()[1]
    assert DINOv3ConvNeXt(replace(TINY_CONVNEXT)).weights_id == "random"
