from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED, trained_like, write_checkpoint

from dinov3_lite import DINOv3ViT, freeze_but_last, parameter_groups, trainable_summary

DEEP = replace(TINY, num_hidden_layers=5)


@pytest.fixture
def model() -> DINOv3ViT:
    return DINOv3ViT(DEEP)


def saved_numbers(model: DINOv3ViT) -> int:
    """How many numbers autograd keeps of a forward, parameters aside."""
    own = {p.data_ptr() for p in model.parameters()}
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(0 if t.data_ptr() in own else t.numel()) or t, lambda t: t
    ):
        model(torch.randn(1, 3, 40, 24))
    return sum(sizes)


@pytest.mark.parametrize("n", range(6))
def test_freeze_but_last(model, n):
    freeze_but_last(model, n)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    names = [name for name, _ in model.named_parameters()]
    expected = {name for name in names if name.startswith(tuple(f"blocks.{i}." for i in range(5 - n, 5)))}
    assert trains == (expected | {"norm.weight", "norm.bias"} if n else set())


def test_frozen_blocks_keep_no_activations(model):
    kept = []
    for n in (0, 1, 2, 5):
        freeze_but_last(model, n)
        kept.append(saved_numbers(model))
    assert kept[0] == 0
    assert kept[2] - kept[1] == pytest.approx((kept[3] - kept[2]) / 3)  # as much for each block that trains


@pytest.mark.parametrize("n", [-1, 6])
def test_blocks_that_there_are_not(model, n):
    with pytest.raises(ValueError, match=f"n is {n}: expected a number of blocks from 0 to 5"):
        freeze_but_last(model, n)


@pytest.mark.parametrize("config", [DEEP, TINY_GATED], ids=["plain", "gated"])
def test_parameter_groups_hold_each_trained_parameter_once(config):
    model = DINOv3ViT(config)
    freeze_but_last(model, 2)
    groups = parameter_groups(model, lr=1e-3, layer_decay=0.5)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_rates_fall_with_depth_and_only_matrices_decay(model):
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    named = {name: of[id(p)] for name, p in model.named_parameters()}
    rates = {name: group["lr"] for name, group in named.items()}
    assert rates["norm.weight"] == 1e-3
    assert rates["blocks.4.attn.qkv.weight"] == rates["blocks.4.ls2.gamma"] == 0.5e-3
    assert rates["blocks.0.mlp.fc1.bias"] == 1e-3 * 0.5**5
    assert rates["patch_embed.proj.weight"] == rates["cls_token"] == rates["register_tokens"] == 1e-3 * 0.5**6
    decaying = {name for name, group in named.items() if group["weight_decay"]}
    matrices = {
        f"blocks.{i}.{part}.weight" for i in range(5) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert decaying == matrices | {"patch_embed.proj.weight"}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    torch.optim.AdamW(groups).step()


def test_summary(model):
    freeze_but_last(model, 1)
    lines = trainable_summary(model).splitlines()
    total = sum(p.numel() for p in model.parameters())
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lines[0].split() == ["part", "parameters", "trainable"]
    assert lines[-1].split() == ["total", f"{total:,}", f"{trains:,}", f"({100 * trains / total:.2f}", "%)"]
    table = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:3]] for line in lines[1:]}
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert table["blocks.3"] == [block, 0] and table["blocks.4"] == [block, block]
    assert table["patch_embed.proj"][1] == 0 and table["norm"] == [64, 64]
    nested = trainable_summary(torch.nn.ModuleDict({"backbone": model, "head": torch.nn.Linear(32, 2)}))
    assert "backbone.blocks.4" in nested and "head" in nested


# ---- precision of training


@pytest.mark.parametrize("way", ["autocast", "pure bfloat16"])
@pytest.mark.parametrize("outliers", [False, True], ids=["", "outliers"])
def test_bfloat16_trains_as_float32_does(way, outliers, tmp_path):
    """The loss falls along the float32 curve, in autocast and with bfloat16 weights.

    With register outliers it falls too, and no gradient overflows. It can't follow float32's curve there: the made
    outlier hangs on the tail of a GELU, whose bfloat16 error turns gradients around, in transformers' autocast alike.
    """
    config = replace(TINY, pos_embed_rescale=None)
    folder = write_checkpoint(tmp_path, config, trained_like(config, outliers=outliers))
    images, target = torch.randn(8, 3, 40, 24), torch.randn(8, 15, 32)

    def losses(dtype: torch.dtype, autocast: bool) -> list[float]:
        model = DINOv3ViT.from_pretrained(folder, dtype=dtype).train()
        model.norm.requires_grad_(False)  # which could fit the target by itself
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=3e-3, layer_decay=0.9))
        curve = []
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (model(images).patch_tokens.float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            curve.append(loss.item())
        return curve

    half = losses(torch.float32 if way == "autocast" else torch.bfloat16, autocast=way == "autocast")
    assert half[-1] < 0.9 * half[0]
    if not outliers:
        assert half == pytest.approx(losses(torch.float32, autocast=False), rel=0.02)


# ---- LoRA


def lora(model: DINOv3ViT, *targets: str):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
def test_lora_on_all_our_projections_trains_and_merges(config):
    mlp = ("mlp.w12", "mlp.w3") if config.use_gated_mlp else ("mlp.fc1", "mlp.fc2")
    original = DINOv3ViT(config).eval()
    base = {name: p.detach().clone() for name, p in original.named_parameters()}
    model = lora(original, "attn.qkv", "attn.proj", *mlp)
    images = torch.randn(2, 3, 40, 24)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert len([p for p in model.parameters() if p.requires_grad]) == 3 * 4 * 2
    start = model(images).cls_token.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).cls_token.square().sum().backward()
        optimizer.step()
    trained = model(images).cls_token
    assert not torch.allclose(trained, start, rtol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(images).cls_token, trained, rtol=1e-4, atol=1e-5)
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, base[name])}
    assert changed == {f"blocks.{i}.{part}.weight" for i in range(3) for part in ("attn.qkv", "attn.proj", *mlp)}
    assert type(merged) is DINOv3ViT


@pytest.mark.parametrize("wrap", ["compile", "sequential", "ddp-like", "shared"])
def test_groups_of_a_wrapped_model_have_its_rates(wrap):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = DINOv3ViT(TINY)
    expected = {id(p): g["lr"] for g in parameter_groups(model, 1e-3, layer_decay=0.5) for p in g["params"]}
    assert len(set(expected.values())) == TINY.num_hidden_layers + 2
    if wrap == "shared":
        model.blocks[2] = model.blocks[1]
    wrapped = {"compile": torch.compile, "sequential": torch.nn.Sequential}.get(wrap, Wrapper)(model)
    groups = parameter_groups(wrapped, 1e-3, layer_decay=0.5)
    actual = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert actual.keys() == {id(p) for p in model.parameters()}
    assert all(expected[p] == rate for p, rate in actual.items())


def test_a_head_beside_the_model_trains_at_the_full_rate():
    model = DINOv3ViT(TINY)
    detector = torch.nn.ModuleDict({"backbone": model, "head": torch.nn.Linear(32, 2)})
    groups = {group["name"]: group for group in parameter_groups(detector, 1e-3, 0.05, layer_decay=0.5)}
    weight, bias = groups["head, decay"], groups["head, no decay"]
    assert weight["params"] == [detector["head"].weight] and bias["params"] == [detector["head"].bias]
    assert (weight["lr"], weight["weight_decay"], bias["lr"], bias["weight_decay"]) == (1e-3, 0.05, 1e-3, 0.0)
    freeze_but_last(detector, 1)
    assert detector["head"].weight.requires_grad and not model.cls_token.requires_grad
    with pytest.raises(ValueError, match="model is a Linear without a DINOv3ViT or DINOv3ConvNeXt inside"):
        parameter_groups(torch.nn.Linear(2, 2), 1e-3)
    with pytest.raises(ValueError, match="layer_decay is 0: expected a number above zero"):
        parameter_groups(model, 1e-3, layer_decay=0)


@pytest.mark.parametrize("n", [True, 1.5, 2.0, "1"])
def test_counts_of_blocks_that_are_none(n):
    with pytest.raises(ValueError, match="expected a number of blocks from 0 to 3"):
        freeze_but_last(DINOv3ViT(TINY), n)
