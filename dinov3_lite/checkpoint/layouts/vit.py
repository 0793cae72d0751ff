"""The vision transformers' tensors, and how their config is read off tensors that come without one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...config import FLOAT32_UNDER_HALF, MODEL_TYPE, DINOv3Config
from ...rope import rope_periods
from .table import Assumed, Family, ModelTensor, Read, Shape, Table, masked

PLAIN, GATED = {"use_gated_mlp": False}, {"use_gated_mlp": True}
MLP_BIAS = {"mlp_bias": True}

# C hidden_size, F intermediate_size, R num_register_tokens, I num_channels, p patch_size, E a quarter of the head dim
# fmt: off
TENSORS = (
    ModelTensor("cls_token",                    ("1", "1", "C")),
    ModelTensor("register_tokens",              ("1", "R", "C")),
    ModelTensor("mask_token",                   ("1", "1", "C")),
    ModelTensor("patch_embed.proj.weight",      ("C", "I", "p", "p")),
    ModelTensor("patch_embed.proj.bias",        ("C",)),
    ModelTensor("rope_embed.periods",           ("E",)),
    ModelTensor("blocks.{i}.norm1.weight",      ("C",)),
    ModelTensor("blocks.{i}.norm1.bias",        ("C",)),
    ModelTensor("blocks.{i}.attn.qkv.weight",   ("C", "C"), fused=3),
    ModelTensor("blocks.{i}.attn.qkv.q_bias",   ("C",),     {"query_bias": True}),
    ModelTensor("blocks.{i}.attn.qkv.k_bias",   ("C",),     {"key_bias": True}),
    ModelTensor("blocks.{i}.attn.qkv.v_bias",   ("C",),     {"value_bias": True}),
    ModelTensor("blocks.{i}.attn.proj.weight",  ("C", "C")),
    ModelTensor("blocks.{i}.attn.proj.bias",    ("C",),     {"proj_bias": True}),
    ModelTensor("blocks.{i}.ls1.gamma",         ("C",)),
    ModelTensor("blocks.{i}.norm2.weight",      ("C",)),
    ModelTensor("blocks.{i}.norm2.bias",        ("C",)),
    ModelTensor("blocks.{i}.mlp.fc1.weight",    ("F", "C"), PLAIN),
    ModelTensor("blocks.{i}.mlp.fc1.bias",      ("F",),     PLAIN | MLP_BIAS),
    ModelTensor("blocks.{i}.mlp.fc2.weight",    ("C", "F"), PLAIN),
    ModelTensor("blocks.{i}.mlp.fc2.bias",      ("C",),     PLAIN | MLP_BIAS),
    ModelTensor("blocks.{i}.mlp.w12.weight",    ("F", "C"), GATED, fused=2),
    ModelTensor("blocks.{i}.mlp.w12.bias",      ("F",),     GATED | MLP_BIAS, fused=2),
    ModelTensor("blocks.{i}.mlp.w3.weight",     ("C", "F"), GATED),
    ModelTensor("blocks.{i}.mlp.w3.bias",       ("C",),     GATED | MLP_BIAS),
    ModelTensor("blocks.{i}.ls2.gamma",         ("C",)),
    ModelTensor("norm.weight",                  ("C",)),
    ModelTensor("norm.bias",                    ("C",)),
)
# fmt: on

QKV = "blocks.{i}.attn.qkv"
SWITCHES = "query_bias", "key_bias", "value_bias"
BIASES = f"{QKV}.q_bias", f"{QKV}.k_bias", f"{QKV}.v_bias"
COMPUTED_PERIODS = Assumed(
    rope_periods, "it computes RoPE periods from the config, and these are others (Meta's are rounded)"
)
NO_MASK_TOKEN = Assumed(lambda config: torch.zeros(1, 1, config.hidden_size, device="cpu"), "it has no mask token")
NO_KEY_BIAS = Assumed(lambda config: torch.zeros(config.hidden_size, device="cpu"), "it has no key bias")


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of weights in `dtype` holds the tensor of that name."""
    if name == "rope_embed.periods" or (name in FLOAT32_UNDER_HALF and dtype == torch.float16):
        return torch.float32
    return dtype


def _sizes(config: DINOv3Config) -> dict[str, int]:
    return {
        "C": config.hidden_size,
        "F": config.intermediate_size,
        "R": config.num_register_tokens,
        "I": config.num_channels,
        "p": config.patch_size,
        "E": config.head_dim // 4,
    }


def _numbers(name: str, config: DINOv3Config) -> list[dict[str, int]]:
    return [{"i": i} for i in range(config.num_hidden_layers)] if "{i}" in name else [{}]


def infer_config(table: Table, shapes: Mapping[str, Shape], read: Read) -> DINOv3Config:
    """The config of tensors that come without one: every size can be read off a shape, heads off the RoPE periods.

    Where a layout stores no periods the head dim is that of the released models: 128 for the 7B's width, else 64.
    Reads the periods, and the key biases with their masks. Raises ValueError if sizes can't be told or contradict.
    """

    def shape(ours: str) -> Shape | None:
        return shapes.get(name.format(i=0)) if (name := next(iter(table.theirs(ours)), "")) else None

    patch = shape("patch_embed.proj.weight")
    if patch is None or len(patch) != 4:
        raise ValueError("it lacks the patch embedding, from which the model's sizes are read")
    C = patch[0]
    registers = shape("register_tokens")
    gated = shape("blocks.{i}.mlp.w12.weight")
    # gated and plain MLPs share a name for the second matrix in some layouts: the first one tells
    hidden = gated or shape("blocks.{i}.mlp.fc1.weight")
    if hidden is None:
        gates, plain = table.theirs("blocks.{i}.mlp.w12.weight")[0], table.theirs("blocks.{i}.mlp.fc1.weight")[0]
        raise ValueError(f"it has neither {plain.format(i=0)!r} nor {gates.format(i=0)!r}: this is no DINOv3 model")
    block = re.compile(re.escape(table.theirs("blocks.{i}.norm1.weight")[0].split("{i}")[0]) + r"(\d+)\.")
    depth = len({match[1] for name in shapes if (match := block.match(name))})
    periods = _periods(table, shapes, read)
    head_dim = 4 * len(periods) if periods is not None else 128 if C >= 4096 else 64
    biases = {}
    for switch, name in zip(SWITCHES, BIASES, strict=True):
        ours = next((row.ours for row in table.rows if name in row.ours), ())
        biases[switch] = bool(ours) and shape(ours[0]) is not None  # where they are fused, the first names the tensor
    if C % head_dim:
        whose = "that its RoPE periods show" if periods is not None else "of released models: it has no RoPE periods"
        raise ValueError(f"its width {C} is no multiple of {head_dim}, the head dim {whose}")
    config = DINOv3Config(
        patch_size=patch[2],
        num_channels=patch[1],
        hidden_size=C,
        intermediate_size=hidden[0] // (2 if gated and len(table.theirs("blocks.{i}.mlp.w12.weight")) == 1 else 1),
        num_hidden_layers=depth,
        num_attention_heads=C // head_dim,
        num_register_tokens=registers[1] if registers and len(registers) == 3 else 0,
        use_gated_mlp=gated is not None,
        hidden_act="silu" if gated is not None else "gelu",
        **biases,
        proj_bias=shape("blocks.{i}.attn.proj.bias") is not None,
        mlp_bias=shape("blocks.{i}.mlp.w12.bias" if gated else "blocks.{i}.mlp.fc1.bias") is not None,
    )
    if periods is not None:
        config = replace(config, rope_theta=_theta(periods, config))
    return replace(config, **_fused_biases(table, config, shapes, read))  # type: ignore[arg-type]


def _periods(table: Table, shapes: Mapping[str, Shape], read: Read) -> Tensor | None:
    """The RoPE periods that a file stores, (D/4,) float32, or None where it stores none."""
    name = next(iter(table.theirs("rope_embed.periods")), "")
    if name not in shapes:
        return None
    if len(shapes[name]) != 1 or not shapes[name][0]:
        raise ValueError(
            f"tensor {name!r} has shape {shapes[name]}: expected the RoPE periods, a quarter of a head dim"
        )
    periods = read(name).float()
    if not (periods.isfinite() & (periods > 0)).all():
        raise ValueError(f"tensor {name!r} holds {periods.tolist()}: expected RoPE periods, finite and above zero")
    return periods


def _theta(periods: Tensor, config: DINOv3Config) -> float:
    """The base of the periods: the roundest number that gives them, as they are or rounded to 16 bits."""
    if len(periods) < 2:
        return config.rope_theta
    theta = periods[-1].double().item() ** (len(periods) / (len(periods) - 1))
    for digits in range(1, 8):
        rounded = float(f"{theta:.{digits}g}")
        expected = rope_periods(replace(config, rope_theta=rounded))
        halves = (expected.to(dtype).float() for dtype in (torch.bfloat16, torch.float16))
        if torch.allclose(periods, expected, rtol=1e-6, atol=0) or any(torch.equal(periods, half) for half in halves):
            return rounded
    return theta


def _fused_biases(table: Table, config: DINOv3Config, shapes: Mapping[str, Shape], read: Read) -> dict[str, bool]:
    """Which biases there are of those that lie fused in one tensor, by their switches, as far as their numbers tell.

    In a file with masks a key bias of which they leave zeros is none. In a state dict of ours no bias is what is zero
    in all blocks, but for a model all of whose are zero, which has not been trained: it is taken for one of the
    released kind, as a new one is.
    """
    equations = [e for e in table.equations(config) if [shapes.get(name) for name, _ in e.theirs] == [e.theirs[0][1]]]
    fused = [e for e in equations if len(e.ours) > 1]
    if not fused or (fused[0].mask and not any(e.mask in shapes for e in fused)):
        return {}
    acts = dict.fromkeys(SWITCHES, False)
    for equation in fused:
        bias = read(equation.theirs[0][0])
        if equation.mask in shapes:
            bias = masked(bias, read(equation.mask), equation.mask)
        for switch, third in zip(SWITCHES, bias.chunk(3), strict=True):
            acts[switch] |= bool(third.any())
    if fused[0].mask:
        return {"key_bias": acts["key_bias"]}
    return acts if any(acts.values()) else {"key_bias": False}


VIT = Family(
    name="vision transformer",
    model_type=MODEL_TYPE,
    loader="DINOv3ViT",
    tensors=TENSORS,
    sizes=_sizes,
    numbers=_numbers,
    infer=infer_config,
    anchor="cls_token",
    weight="patch_embed.proj.weight",
    counts=("num_hidden_layers", "num_register_tokens"),
    unseen=("num_attention_heads", "layer_norm_eps", "hidden_act"),
)
