"""How each checkpoint layout names and cuts the model's tensors: one table per layout, read line by line.

A row is an equation: their tensors, one after the other along the first axis, hold what ours hold, one after the other.
Shapes are in letters of the config: C hidden_size, F intermediate_size, R num_register_tokens, I num_channels,
p patch_size, E a quarter of the head dim; `{i}` is the block's number. Both directions follow from the table.
A new layout is a new table.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DINOv3Config
from .files import Shape
from .rope import rope_periods

Make = Callable[[DINOv3Config], Tensor]


@dataclass(frozen=True)
class Spec:
    """One tensor of ours: its name in the model's state dict, its shape, and the config switches it exists under."""

    name: str
    shape: str
    when: str = ""

    def exists(self, config: DINOv3Config) -> bool:
        return _holds(self.when, config)

    @property
    def chunks(self) -> int:
        """How many equal tensors are fused in it along the first axis: 3 for "3C,C"."""
        return int(self.shape[0]) if self.shape[0].isdigit() else 1


class Row(NamedTuple):
    """`theirs`, each of `shape`, one after the other, are `ours`, one after the other (names parted by spaces).

    One of ours that a config lacks counts as zeros, if the row holds another that exists: Meta's key bias.
    """

    theirs: str
    shape: str
    ours: str
    mask: str = ""
    """A tensor beside theirs, of its shape: where a file has it, readers multiply theirs by it. Written as ones, and as
    zeros for an absent key bias; not written where there is a key bias."""


class Assumed(NamedTuple):
    """What a layout does not store: the value that its readers assume instead, and why."""

    make: Make
    reason: str


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout: its table, and what stands outside of it."""

    name: str
    rows: tuple[Row, ...]
    assumed: Mapping[str, Assumed] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a file may hold and the model does not need, with the reason; our own file carries them along."""

    def equations(self, config: DINOv3Config) -> list[Equation]:
        """The rows that a config calls for, block by block, with names and shapes filled in."""
        result = []
        for row in self.rows:
            ours = row.ours.split()
            if any(_SPECS[name].exists(config) for name in ours):
                shape = shape_of(row.shape, config)
                shapes = [shape_of(_SPECS[name].shape, config) for name in ours]
                for i in _block_numbers(row.ours, config):
                    theirs = [(name.format(i=i), shape) for name in row.theirs.split()]
                    named = [(name.format(i=i), s) for name, s in zip(ours, shapes, strict=True)]
                    result.append(Equation(theirs, named, row.mask.format(i=i)))
        return result

    def masks(self, config: DINOv3Config) -> dict[str, Tensor]:
        """The masks that are written: (3C,), ones but for the key bias, which the config lacks."""
        names = [equation.mask for equation in self.equations(config) if equation.mask]
        return {} if config.key_bias else {name: _key_bias_mask(config) for name in names}


class Equation(NamedTuple):
    """One row for one block: (name, shape) of theirs and of ours, and the name of the mask beside theirs, if any."""

    theirs: list[tuple[str, Shape]]
    ours: list[tuple[str, Shape]]
    mask: str


def _holds(when: str, config: DINOv3Config) -> bool:
    """Whether the config has all the switches on, and those with `not-` off."""
    return all(
        not getattr(config, switch[4:]) if switch.startswith("not-") else getattr(config, switch)
        for switch in when.split()
    )


def _zeros(shape: str) -> Make:
    return lambda config: torch.zeros(shape_of(shape, config), device="cpu")


def _key_bias_mask(config: DINOv3Config) -> Tensor:
    ones = torch.ones(config.hidden_size, device="cpu")
    return torch.cat((ones, torch.zeros_like(ones), ones))


_NO_PERIODS = Assumed(
    rope_periods, "it computes RoPE periods from the config, and these are others (Meta's are rounded)"
)
_NO_MASK_TOKEN = Assumed(_zeros("1,1,C"), "it has no mask token")
_NO_KEY_BIAS = Assumed(_zeros("C"), "it has no key bias")

# fmt: off
LITE_SPECS: tuple[Spec, ...] = (
    Spec("cls_token",                         "1,1,C"),
    Spec("register_tokens",                   "1,R,C"),
    Spec("mask_token",                        "1,1,C"),
    Spec("patch_embed.proj.weight",           "C,I,p,p"),
    Spec("patch_embed.proj.bias",             "C"),
    Spec("rope_embed.periods",                "E"),
    Spec("blocks.{i}.norm1.weight",           "C"),
    Spec("blocks.{i}.norm1.bias",             "C"),
    Spec("blocks.{i}.attn.qkv.weight",        "3C,C"),
    Spec("blocks.{i}.attn.qkv.q_bias",        "C",    "query_bias"),
    Spec("blocks.{i}.attn.qkv.k_bias",        "C",    "key_bias"),
    Spec("blocks.{i}.attn.qkv.v_bias",        "C",    "value_bias"),
    Spec("blocks.{i}.attn.proj.weight",       "C,C"),
    Spec("blocks.{i}.attn.proj.bias",         "C",    "proj_bias"),
    Spec("blocks.{i}.ls1.gamma",              "C"),
    Spec("blocks.{i}.norm2.weight",           "C"),
    Spec("blocks.{i}.norm2.bias",             "C"),
    Spec("blocks.{i}.mlp.fc1.weight",         "F,C",  "not-use_gated_mlp"),
    Spec("blocks.{i}.mlp.fc1.bias",           "F",    "not-use_gated_mlp mlp_bias"),
    Spec("blocks.{i}.mlp.fc2.weight",         "C,F",  "not-use_gated_mlp"),
    Spec("blocks.{i}.mlp.fc2.bias",           "C",    "not-use_gated_mlp mlp_bias"),
    Spec("blocks.{i}.mlp.w12.weight",         "2F,C", "use_gated_mlp"),
    Spec("blocks.{i}.mlp.w12.bias",           "2F",   "use_gated_mlp mlp_bias"),
    Spec("blocks.{i}.mlp.w3.weight",          "C,F",  "use_gated_mlp"),
    Spec("blocks.{i}.mlp.w3.bias",            "C",    "use_gated_mlp mlp_bias"),
    Spec("blocks.{i}.ls2.gamma",              "C"),
    Spec("norm.weight",                       "C"),
    Spec("norm.bias",                         "C"),
)

# Our own file: the model's state dict as it is.
LITE = Layout("lite", tuple(Row(spec.name, spec.shape, spec.name) for spec in LITE_SPECS))

# transformers' DINOv3ViTModel, as all its releases write it to disk.
TRANSFORMERS = Layout("transformers", (
    Row("embeddings.cls_token",                "1,1,C",   "cls_token"),
    Row("embeddings.register_tokens",          "1,R,C",   "register_tokens"),
    Row("embeddings.mask_token",               "1,1,C",   "mask_token"),
    Row("embeddings.patch_embeddings.weight",  "C,I,p,p", "patch_embed.proj.weight"),
    Row("embeddings.patch_embeddings.bias",    "C",       "patch_embed.proj.bias"),
    Row("layer.{i}.norm1.weight",              "C",       "blocks.{i}.norm1.weight"),
    Row("layer.{i}.norm1.bias",                "C",       "blocks.{i}.norm1.bias"),
    Row("layer.{i}.attention.q_proj.weight layer.{i}.attention.k_proj.weight layer.{i}.attention.v_proj.weight",
                                               "C,C",     "blocks.{i}.attn.qkv.weight"),
    Row("layer.{i}.attention.q_proj.bias",     "C",       "blocks.{i}.attn.qkv.q_bias"),
    Row("layer.{i}.attention.k_proj.bias",     "C",       "blocks.{i}.attn.qkv.k_bias"),
    Row("layer.{i}.attention.v_proj.bias",     "C",       "blocks.{i}.attn.qkv.v_bias"),
    Row("layer.{i}.attention.o_proj.weight",   "C,C",     "blocks.{i}.attn.proj.weight"),
    Row("layer.{i}.attention.o_proj.bias",     "C",       "blocks.{i}.attn.proj.bias"),
    Row("layer.{i}.layer_scale1.lambda1",      "C",       "blocks.{i}.ls1.gamma"),
    Row("layer.{i}.norm2.weight",              "C",       "blocks.{i}.norm2.weight"),
    Row("layer.{i}.norm2.bias",                "C",       "blocks.{i}.norm2.bias"),
    Row("layer.{i}.mlp.up_proj.weight",        "F,C",     "blocks.{i}.mlp.fc1.weight"),
    Row("layer.{i}.mlp.up_proj.bias",          "F",       "blocks.{i}.mlp.fc1.bias"),
    Row("layer.{i}.mlp.down_proj.weight",      "C,F",     "blocks.{i}.mlp.fc2.weight"),
    Row("layer.{i}.mlp.down_proj.bias",        "C",       "blocks.{i}.mlp.fc2.bias"),
    Row("layer.{i}.mlp.gate_proj.weight layer.{i}.mlp.up_proj.weight",
                                               "F,C",     "blocks.{i}.mlp.w12.weight"),
    Row("layer.{i}.mlp.gate_proj.bias layer.{i}.mlp.up_proj.bias",
                                               "F",       "blocks.{i}.mlp.w12.bias"),
    Row("layer.{i}.mlp.down_proj.weight",      "C,F",     "blocks.{i}.mlp.w3.weight"),
    Row("layer.{i}.mlp.down_proj.bias",        "C",       "blocks.{i}.mlp.w3.bias"),
    Row("layer.{i}.layer_scale2.lambda1",      "C",       "blocks.{i}.ls2.gamma"),
    Row("norm.weight",                         "C",       "norm.weight"),
    Row("norm.bias",                           "C",       "norm.bias"),
), assumed={"rope_embed.periods": _NO_PERIODS})

# Meta's .pth files, and all code that descends from Meta's repository.
META = Layout("meta", (
    Row("cls_token",                           "1,1,C",   "cls_token"),
    Row("storage_tokens",                      "1,R,C",   "register_tokens"),
    Row("mask_token",                          "1,C",     "mask_token"),
    Row("patch_embed.proj.weight",             "C,I,p,p", "patch_embed.proj.weight"),
    Row("patch_embed.proj.bias",               "C",       "patch_embed.proj.bias"),
    Row("rope_embed.periods",                  "E",       "rope_embed.periods"),
    Row("blocks.{i}.norm1.weight",             "C",       "blocks.{i}.norm1.weight"),
    Row("blocks.{i}.norm1.bias",               "C",       "blocks.{i}.norm1.bias"),
    Row("blocks.{i}.attn.qkv.weight",          "3C,C",    "blocks.{i}.attn.qkv.weight"),
    Row("blocks.{i}.attn.qkv.bias",            "3C",
        "blocks.{i}.attn.qkv.q_bias blocks.{i}.attn.qkv.k_bias blocks.{i}.attn.qkv.v_bias",
        mask="blocks.{i}.attn.qkv.bias_mask"),
    Row("blocks.{i}.attn.proj.weight",         "C,C",     "blocks.{i}.attn.proj.weight"),
    Row("blocks.{i}.attn.proj.bias",           "C",       "blocks.{i}.attn.proj.bias"),
    Row("blocks.{i}.ls1.gamma",                "C",       "blocks.{i}.ls1.gamma"),
    Row("blocks.{i}.norm2.weight",             "C",       "blocks.{i}.norm2.weight"),
    Row("blocks.{i}.norm2.bias",               "C",       "blocks.{i}.norm2.bias"),
    Row("blocks.{i}.mlp.fc1.weight",           "F,C",     "blocks.{i}.mlp.fc1.weight"),
    Row("blocks.{i}.mlp.fc1.bias",             "F",       "blocks.{i}.mlp.fc1.bias"),
    Row("blocks.{i}.mlp.fc2.weight",           "C,F",     "blocks.{i}.mlp.fc2.weight"),
    Row("blocks.{i}.mlp.fc2.bias",             "C",       "blocks.{i}.mlp.fc2.bias"),
    Row("blocks.{i}.mlp.w1.weight blocks.{i}.mlp.w2.weight",
                                               "F,C",     "blocks.{i}.mlp.w12.weight"),
    Row("blocks.{i}.mlp.w1.bias blocks.{i}.mlp.w2.bias",
                                               "F",       "blocks.{i}.mlp.w12.bias"),
    Row("blocks.{i}.mlp.w3.weight",            "C,F",     "blocks.{i}.mlp.w3.weight"),
    Row("blocks.{i}.mlp.w3.bias",              "C",       "blocks.{i}.mlp.w3.bias"),
    Row("blocks.{i}.ls2.gamma",                "C",       "blocks.{i}.ls2.gamma"),
    Row("norm.weight",                         "C",       "norm.weight"),
    Row("norm.bias",                           "C",       "norm.bias"),
), carried={
    "local_cls_norm.weight": "normalises the CLS token of local crops in pretraining",
    "local_cls_norm.bias": "normalises the CLS token of local crops in pretraining",
})

# timm's vit_*_patch16_dinov3 models; those called *_qkvb have q_bias and v_bias.
TIMM = Layout("timm", (
    Row("cls_token",                           "1,1,C",   "cls_token"),
    Row("reg_token",                           "1,R,C",   "register_tokens"),
    Row("patch_embed.proj.weight",             "C,I,p,p", "patch_embed.proj.weight"),
    Row("patch_embed.proj.bias",               "C",       "patch_embed.proj.bias"),
    Row("blocks.{i}.norm1.weight",             "C",       "blocks.{i}.norm1.weight"),
    Row("blocks.{i}.norm1.bias",               "C",       "blocks.{i}.norm1.bias"),
    Row("blocks.{i}.attn.qkv.weight",          "3C,C",    "blocks.{i}.attn.qkv.weight"),
    Row("blocks.{i}.attn.q_bias",              "C",       "blocks.{i}.attn.qkv.q_bias"),
    Row("blocks.{i}.attn.v_bias",              "C",       "blocks.{i}.attn.qkv.v_bias"),
    Row("blocks.{i}.attn.proj.weight",         "C,C",     "blocks.{i}.attn.proj.weight"),
    Row("blocks.{i}.attn.proj.bias",           "C",       "blocks.{i}.attn.proj.bias"),
    Row("blocks.{i}.gamma_1",                  "C",       "blocks.{i}.ls1.gamma"),
    Row("blocks.{i}.norm2.weight",             "C",       "blocks.{i}.norm2.weight"),
    Row("blocks.{i}.norm2.bias",               "C",       "blocks.{i}.norm2.bias"),
    Row("blocks.{i}.mlp.fc1.weight",           "F,C",     "blocks.{i}.mlp.fc1.weight"),
    Row("blocks.{i}.mlp.fc1.bias",             "F",       "blocks.{i}.mlp.fc1.bias"),
    Row("blocks.{i}.mlp.fc2.weight",           "C,F",     "blocks.{i}.mlp.fc2.weight"),
    Row("blocks.{i}.mlp.fc2.bias",             "C",       "blocks.{i}.mlp.fc2.bias"),
    Row("blocks.{i}.mlp.fc1_g.weight blocks.{i}.mlp.fc1_x.weight",
                                               "F,C",     "blocks.{i}.mlp.w12.weight"),
    Row("blocks.{i}.mlp.fc1_g.bias blocks.{i}.mlp.fc1_x.bias",
                                               "F",       "blocks.{i}.mlp.w12.bias"),
    Row("blocks.{i}.mlp.fc2.weight",           "C,F",     "blocks.{i}.mlp.w3.weight"),
    Row("blocks.{i}.mlp.fc2.bias",             "C",       "blocks.{i}.mlp.w3.bias"),
    Row("blocks.{i}.gamma_2",                  "C",       "blocks.{i}.ls2.gamma"),
    Row("norm.weight",                         "C",       "norm.weight"),
    Row("norm.bias",                           "C",       "norm.bias"),
), assumed={
    "rope_embed.periods": _NO_PERIODS,
    "mask_token": _NO_MASK_TOKEN,
    "blocks.{i}.attn.qkv.k_bias": _NO_KEY_BIAS,
})
# fmt: on

LAYOUTS = {layout.name: layout for layout in (LITE, TRANSFORMERS, META, TIMM)}
_SPECS = {spec.name: spec for spec in LITE_SPECS}


def rename(weights: Mapping[str, Tensor], layout: Layout, config: DINOv3Config) -> dict[str, Tensor]:
    """A state dict of the model in that layout: names and cuts are theirs, data is shared where nothing is joined."""
    result: dict[str, Tensor] = {}
    for equation in layout.equations(config):
        parts = [
            weights[name].flatten() if name in weights else torch.zeros(shape).flatten()
            for name, shape in equation.ours
        ]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        cut = flat.split([numel(shape) for _, shape in equation.theirs])
        result |= {name: t.view(shape) for (name, shape), t in zip(equation.theirs, cut, strict=True)}
    return result | layout.masks(config)


def kind(name: str) -> str:
    """The name with `{i}` for the block's number, as tables have it."""
    return re.sub(r"\.\d+\.", ".{i}.", name, count=1)


def detect(names: Collection[str]) -> Layout:
    """The layout that these tensor names speak: the one that knows the most of them.

    Raises ValueError if no layout knows any.
    """
    kinds = set(map(kind, names))

    def known(layout: Layout) -> int:
        return len(kinds & {name for row in layout.rows for name in (*row.theirs.split(), row.mask)})

    best = max(LAYOUTS.values(), key=known)
    if not known(best):
        example = min(names, default="none")
        raise ValueError(
            f"none of its {len(names)} tensors (first: {example!r}) has a name of the layouts {', '.join(LAYOUTS)}: "
            "this is not a DINOv3 vision transformer"
        )
    return best


def infer_config(layout: Layout, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> DINOv3Config:
    """The config of tensors that come without one: every size can be read off a shape, heads off the RoPE periods.

    Where a layout stores no periods the head dim is that of the released models: 128 for the 7B's width, else 64.
    read: a tensor of the file by its name; the periods are read, and the key biases with their masks.
    Raises ValueError if the sizes can't be told or contradict each other.
    """

    def shape(ours: str) -> Shape | None:
        theirs = next(row.theirs.split()[0] for row in layout.rows if row.ours.split()[0] == ours)
        return shapes.get(theirs.format(i=0))

    patch = shape("patch_embed.proj.weight")
    if patch is None or len(patch) != 4:
        raise ValueError("it lacks the patch embedding, from which the model's sizes are read")
    C = patch[0]
    registers = shape("register_tokens")
    gated = shape("blocks.{i}.mlp.w12.weight")
    # gated and plain MLPs share a name for the second matrix in some layouts: the first one tells
    plain = shape("blocks.{i}.mlp.fc1.weight")
    hidden = gated or plain
    depth = len({m[1] for name in shapes if (m := re.match(r"(?:blocks|layer)\.(\d+)\.", name))})
    periods = _periods(layout, shapes, read)
    head_dim = 4 * len(periods) if periods is not None else _assumed_head_dim(C)
    qkv_bias = shape("blocks.{i}.attn.qkv.q_bias") is not None
    config = DINOv3Config(
        patch_size=patch[2],
        num_channels=patch[1],
        hidden_size=C,
        intermediate_size=hidden[0] if hidden else 0,
        num_hidden_layers=depth,
        num_attention_heads=C // head_dim if C % head_dim == 0 else 0,
        num_register_tokens=registers[1] if registers and len(registers) == 3 else 0,
        use_gated_mlp=gated is not None,
        hidden_act="silu" if gated is not None else "gelu",
        query_bias=qkv_bias,
        value_bias=qkv_bias,
        key_bias=qkv_bias and any("blocks.{i}.attn.qkv.k_bias" in row.ours.split() for row in layout.rows),
        proj_bias=shape("blocks.{i}.attn.proj.bias") is not None,
        mlp_bias=shape("blocks.{i}.mlp.w12.bias" if gated else "blocks.{i}.mlp.fc1.bias") is not None,
    )
    if periods is not None:
        config = replace(config, rope_theta=_theta(periods, config))
    masked = config.key_bias and any(equation.mask in shapes for equation in layout.equations(config))
    return replace(config, key_bias=False) if masked and not _key_bias_acts(layout, config, shapes, read) else config


def _assumed_head_dim(width: int) -> int:
    """The head dim of the released models of that width, for files that don't say it."""
    return 128 if width >= 4096 else 64


def _periods(layout: Layout, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> Tensor | None:
    """The RoPE periods that a file stores, (D/4,) float32, or None where it stores none."""
    name = next((row.theirs for row in layout.rows if row.ours == "rope_embed.periods"), "")
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


def _key_bias_acts(
    layout: Layout, config: DINOv3Config, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]
) -> bool:
    """Whether anything but zeros is left of a key bias after its mask."""
    for equation in layout.equations(config):
        if equation.mask and equation.theirs[0][0] in shapes:
            bias = read(equation.theirs[0][0])
            if equation.mask in shapes:
                bias = masked(bias, read(equation.mask), equation.mask)
            _, key, _ = bias.chunk(3)
            if key.any():
                return True
    return False


def masked(bias: Tensor, mask: Tensor, name: str) -> Tensor:
    """The bias times its mask, in the bias's dtype, as Meta's layer computes it at each forward.

    Raises ValueError that names the mask if it is of another shape or not a number everywhere.
    """
    if bias.shape != mask.shape:
        raise ValueError(
            f"tensor {name!r} has shape {tuple(mask.shape)}, but the bias that it masks {tuple(bias.shape)}"
        )
    if not mask.isfinite().all():
        raise ValueError(
            f"tensor {name!r} holds NaN or infinity, as in a model whose weights were neither initialised nor loaded: "
            "save it once they are"
        )
    return bias * mask.to(bias.dtype)


def shape_of(letters: str, config: DINOv3Config) -> Shape:
    """The shape that "3C,C" and the like stand for."""
    sizes = {
        "C": config.hidden_size,
        "F": config.intermediate_size,
        "R": config.num_register_tokens,
        "I": config.num_channels,
        "p": config.patch_size,
        "E": config.head_dim // 4,
    }

    def size(axis: str) -> int:
        factor, letter = (axis, "") if axis[-1].isdigit() else (axis[:-1], axis[-1])
        return int(factor or 1) * (sizes[letter] if letter else 1)

    return tuple(size(axis) for axis in letters.split(","))


@functools.lru_cache(maxsize=8)
def lite_shapes(config: DINOv3Config) -> Mapping[str, tuple[Shape, int]]:
    """Name, shape and number of fused tensors of each of the model's tensors, in the order of the model."""
    shapes = {
        spec.name.format(i=i): (shape_of(spec.shape, config), spec.chunks)
        for spec in LITE_SPECS
        if spec.exists(config)
        for i in _block_numbers(spec.name, config)
    }
    return MappingProxyType(shapes)


def _block_numbers(name: str, config: DINOv3Config) -> range:
    return range(config.num_hidden_layers if "{i}" in name else 1)


def numel(shape: Shape) -> int:
    """How many elements a tensor of that shape has."""
    return math.prod(shape)
