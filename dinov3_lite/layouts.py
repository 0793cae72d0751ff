"""How each checkpoint layout names and cuts the model's tensors: one table per layout, read line by line.

A row says which of our tensors is the concatenation, along the first axis, of which of theirs. Shapes are in letters of
the config: C hidden_size, F intermediate_size, R num_register_tokens, I num_channels, p patch_size, E a quarter of the
head dim; `{i}` is the block's number. A new layout is a new table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .config import DINOv3Config
from .rope import rope_periods

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """One tensor of ours: its name in the model's state dict, its shape, and the config switches it exists under."""

    name: str
    shape: str
    when: str = ""

    def exists(self, config: DINOv3Config) -> bool:
        return all(
            not getattr(config, switch[4:]) if switch.startswith("not-") else getattr(config, switch)
            for switch in self.when.split()
        )

    @property
    def chunks(self) -> int:
        """How many equal tensors are fused in it along the first axis: 3 for "3C,C"."""
        return int(self.shape[0]) if self.shape[0].isdigit() else 1


@dataclass(frozen=True)
class Row:
    """One of our tensors and what it is called, or of what parts it is made, in another layout."""

    ours: str
    theirs: tuple[str, ...]
    shape: str
    """of each of theirs"""


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout: its table, and what it leaves to be computed from the config."""

    name: str
    rows: tuple[Row, ...]
    computed: Mapping[str, Callable[[DINOv3Config], Tensor]] = field(default_factory=dict)

    def sources(self, config: DINOv3Config) -> dict[str, list[tuple[str, Shape]]]:
        """For each of our tensors that this layout stores: names and shapes of theirs that make it up."""
        rows = {row.ours: row for row in self.rows}
        ours = {}
        for spec in LITE_SPECS:
            if spec.exists(config) and spec.name not in self.computed:
                row = rows[spec.name]
                shape = shape_of(row.shape, config)
                for i in _block_numbers(spec.name, config):
                    ours[spec.name.format(i=i)] = [(name.format(i=i), shape) for name in row.theirs]
        return ours


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
LITE = Layout("lite", tuple(Row(spec.name, (spec.name,), spec.shape) for spec in LITE_SPECS))

# transformers' DINOv3ViTModel, as all its releases write it to disk. RoPE frequencies are not stored.
TRANSFORMERS = Layout("transformers", (
    Row("cls_token",                  ("embeddings.cls_token",), "1,1,C"),
    Row("register_tokens",            ("embeddings.register_tokens",), "1,R,C"),
    Row("mask_token",                 ("embeddings.mask_token",), "1,1,C"),
    Row("patch_embed.proj.weight",    ("embeddings.patch_embeddings.weight",), "C,I,p,p"),
    Row("patch_embed.proj.bias",      ("embeddings.patch_embeddings.bias",), "C"),
    Row("blocks.{i}.norm1.weight",    ("layer.{i}.norm1.weight",), "C"),
    Row("blocks.{i}.norm1.bias",      ("layer.{i}.norm1.bias",), "C"),
    Row("blocks.{i}.attn.qkv.weight", ("layer.{i}.attention.q_proj.weight",
                                       "layer.{i}.attention.k_proj.weight",
                                       "layer.{i}.attention.v_proj.weight"), "C,C"),
    Row("blocks.{i}.attn.qkv.q_bias", ("layer.{i}.attention.q_proj.bias",), "C"),
    Row("blocks.{i}.attn.qkv.k_bias", ("layer.{i}.attention.k_proj.bias",), "C"),
    Row("blocks.{i}.attn.qkv.v_bias", ("layer.{i}.attention.v_proj.bias",), "C"),
    Row("blocks.{i}.attn.proj.weight", ("layer.{i}.attention.o_proj.weight",), "C,C"),
    Row("blocks.{i}.attn.proj.bias",  ("layer.{i}.attention.o_proj.bias",), "C"),
    Row("blocks.{i}.ls1.gamma",       ("layer.{i}.layer_scale1.lambda1",), "C"),
    Row("blocks.{i}.norm2.weight",    ("layer.{i}.norm2.weight",), "C"),
    Row("blocks.{i}.norm2.bias",      ("layer.{i}.norm2.bias",), "C"),
    Row("blocks.{i}.mlp.fc1.weight",  ("layer.{i}.mlp.up_proj.weight",), "F,C"),
    Row("blocks.{i}.mlp.fc1.bias",    ("layer.{i}.mlp.up_proj.bias",), "F"),
    Row("blocks.{i}.mlp.fc2.weight",  ("layer.{i}.mlp.down_proj.weight",), "C,F"),
    Row("blocks.{i}.mlp.fc2.bias",    ("layer.{i}.mlp.down_proj.bias",), "C"),
    Row("blocks.{i}.mlp.w12.weight",  ("layer.{i}.mlp.gate_proj.weight", "layer.{i}.mlp.up_proj.weight"), "F,C"),
    Row("blocks.{i}.mlp.w12.bias",    ("layer.{i}.mlp.gate_proj.bias", "layer.{i}.mlp.up_proj.bias"), "F"),
    Row("blocks.{i}.mlp.w3.weight",   ("layer.{i}.mlp.down_proj.weight",), "C,F"),
    Row("blocks.{i}.mlp.w3.bias",     ("layer.{i}.mlp.down_proj.bias",), "C"),
    Row("blocks.{i}.ls2.gamma",       ("layer.{i}.layer_scale2.lambda1",), "C"),
    Row("norm.weight",                ("norm.weight",), "C"),
    Row("norm.bias",                  ("norm.bias",), "C"),
), computed={"rope_embed.periods": rope_periods})
# fmt: on

LAYOUTS = (LITE, TRANSFORMERS)


def detect(names: Collection[str]) -> Layout:
    """The layout that these tensor names speak: the one with the largest share of its first block's names among them.

    Raises ValueError if no name belongs to any.
    """
    present = set(names)

    def share(layout: Layout) -> float:
        theirs = {name.format(i=0) for row in layout.rows for name in row.theirs}
        return len(theirs & present) / len(theirs)

    best = max(LAYOUTS, key=share)
    if not share(best):
        example = min(present, default="none")
        raise ValueError(
            f"none of its {len(present)} tensors (first: {example!r}) has a name of the layouts "
            f"{', '.join(layout.name for layout in LAYOUTS)}: this is not a DINOv3 vision transformer"
        )
    return best


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

    def size(factor: str, letter: str) -> int:
        return int(factor or 1) * (sizes[letter] if letter else 1)

    return tuple(size(*axis) for axis in re.findall(r"(\d*)([CFRIpE]?)(?:,|$)", letters) if any(axis))


def lite_shapes(config: DINOv3Config) -> dict[str, tuple[Shape, int]]:
    """Name, shape and number of fused tensors of each of the model's tensors."""
    return {
        spec.name.format(i=i): (shape_of(spec.shape, config), spec.chunks)
        for spec in LITE_SPECS
        if spec.exists(config)
        for i in _block_numbers(spec.name, config)
    }


def _block_numbers(name: str, config: DINOv3Config) -> range:
    return range(config.num_hidden_layers if "{i}" in name else 1)
