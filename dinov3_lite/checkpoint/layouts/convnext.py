"""The ConvNeXts' tensors, and how their config is read off tensors that come without one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...config import CONVNEXT_TYPE, DINOv3ConvNeXtConfig
from .table import Family, ModelTensor, Read, Row, Shape, Table

STAGES = range(4)

# Of a block, by its name in the block; a stage's number goes behind its letters: C hidden_sizes, F four times that.
# fmt: off
BLOCK = {
    "dwconv.weight":  ("C", "1", "7", "7"),
    "dwconv.bias":    ("C",),
    "norm.weight":    ("C",),
    "norm.bias":      ("C",),
    "mlp.fc1.weight": ("F", "C"),
    "mlp.fc1.bias":   ("F",),
    "mlp.fc2.weight": ("C", "F"),
    "mlp.fc2.bias":   ("C",),
    "ls.gamma":       ("C",),
}
# fmt: on


def _of_stage(s: int) -> list[ModelTensor]:
    before, here = f"C{s - 1}", f"C{s}"
    downsample = [
        ModelTensor(f"stages.{s}.downsample.norm.weight", (before,)),
        ModelTensor(f"stages.{s}.downsample.norm.bias", (before,)),
        ModelTensor(f"stages.{s}.downsample.conv.weight", (here, before, "2", "2")),
        ModelTensor(f"stages.{s}.downsample.conv.bias", (here,)),
    ]
    blocks = [
        ModelTensor(f"stages.{s}.blocks.{{i}}.{name}", tuple(x if x.isdigit() else f"{x}{s}" for x in shape))
        for name, shape in BLOCK.items()
    ]
    return [*(downsample if s else []), *blocks]


TENSORS = (
    ModelTensor("stem.conv.weight", ("C0", "I", "4", "4")),
    ModelTensor("stem.conv.bias", ("C0",)),
    ModelTensor("stem.norm.weight", ("C0",)),
    ModelTensor("stem.norm.bias", ("C0",)),
    *(tensor for s in STAGES for tensor in _of_stage(s)),
    ModelTensor("norm.weight", ("C3",)),
    ModelTensor("norm.bias", ("C3",)),
)


def rows(names: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of a layout that calls modules or tensors otherwise: our names to theirs, `{s}` for the stage."""
    modules = {o.replace("{s}", str(s)): t.replace("{s}", str(s)) for o, t in names.items() for s in STAGES}
    result = []
    for ours in (tensor.name for tensor in TENSORS):
        module, parameter = ours.rsplit(".", 1)
        if ours in modules:
            result.append(Row((ours,), (modules[ours],)))
        elif module in modules:
            result.append(Row((ours,), (f"{modules[module]}.{parameter}",)))
    return tuple(result)


def _sizes(config: DINOv3ConvNeXtConfig) -> dict[str, int]:
    widths = {f"C{s}": config.hidden_sizes[s] for s in STAGES}
    return {"I": config.num_channels, **widths, **{f"F{s}": 4 * config.hidden_sizes[s] for s in STAGES}}


def _numbers(name: str, config: DINOv3ConvNeXtConfig) -> list[dict[str, int]]:
    return [{"i": i} for i in range(config.depths[int(name.split(".")[1])])] if "{i}" in name else [{}]


def infer_config(table: Table, shapes: Mapping[str, Shape], read: Read) -> DINOv3ConvNeXtConfig:
    """The config of tensors that come without one: widths are read off shapes, depths off the blocks' numbers.

    Raises ValueError if sizes can't be told.
    """
    first = table.theirs("stem.conv.weight")[0]
    stem = shapes.get(first, ())
    if len(stem) != 4:
        raise ValueError(f"it lacks the stem's convolution {first!r}, from which the model's sizes are read")
    widths, depths = [stem[0]], []
    for s in STAGES:
        if s:
            widths.append(next(iter(shapes.get(table.theirs(f"stages.{s}.downsample.conv.weight")[0], ())), 0))
        before, after = table.theirs(f"stages.{s}.blocks.{{i}}.ls.gamma")[0].split("{i}")
        block = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
        depths.append(sum(block.fullmatch(name) is not None for name in shapes))
    return DINOv3ConvNeXtConfig(num_channels=stem[1], hidden_sizes=tuple(widths), depths=tuple(depths))


CONVNEXT = Family(
    name="ConvNeXt",
    model_type=CONVNEXT_TYPE,
    loader="DINOv3ConvNeXt",
    tensors=TENSORS,
    sizes=_sizes,
    numbers=_numbers,
    infer=infer_config,
    anchor="stem.conv.weight",
    weight="stem.conv.weight",
    counts=(),
    unseen=("layer_norm_eps", "hidden_act"),
)
