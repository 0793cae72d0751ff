"""The layouts that checkpoints come in, and which of them a file speaks. One file a layout; a new one is added here."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..choose import prefixes
from ..words import short
from .lite import LITE, STATE_DICT
from .meta import META
from .table import Card, Config, Equation, Layout, Named, Read, Shape, Table, numel, pattern
from .timm import TIMM
from .transformers import TRANSFORMERS

LAYOUTS = {layout.name: layout for layout in (LITE, TRANSFORMERS, META, TIMM)}
__all__ = ["LAYOUTS", "LITE", "META", "STATE_DICT", "TIMM", "TRANSFORMERS"]
__all__ += ["backbones", "detect", "joined", "model_tensors", "rename", "tensors_of"]


@functools.lru_cache(maxsize=8)
def model_tensors(config: Config) -> Mapping[str, tuple[Shape, int]]:
    """Shape and number of fused tensors of each of the model's tensors by its name in our file, in order."""
    return MappingProxyType(LITE.table(config).family.shapes(config))


def rename(state: Mapping[str, Tensor], layout: Layout, config: Config) -> dict[str, Tensor]:
    """A state dict of the model in that layout: names and cuts are theirs, data is shared where nothing is joined."""
    tensors = tensors_of(state, config)
    result: dict[str, Tensor] = {}
    for equation in layout.table(config).equations(config):
        parts = [
            tensors[name].flatten() if name in tensors else torch.zeros(shape, device="cpu").flatten()
            for name, shape in equation.ours
        ]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        result |= _cut(flat, equation.theirs)
    return result | layout.table(config).masks(config)


def tensors_of(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A state dict of the model by the names of our file: what is fused in one of its tensors is cut, as views."""
    tensors = dict(state)
    for name, equation in joined(config).items():
        if name in tensors:
            parts = _cut(tensors.pop(name).flatten(), equation.ours)
            tensors |= {ours: part for ours, part in parts.items() if ours in model_tensors(config)}
    return tensors


@functools.lru_cache(maxsize=8)
def joined(config: Config) -> Mapping[str, Equation]:
    """The model's parameters that lie in our file as several tensors, the biases of its attention: see `STATE_DICT`."""
    table = STATE_DICT.table(config)
    return MappingProxyType({e.theirs[0][0]: e for e in table.equations(config, table.differences)})


def _cut(flat: Tensor, wanted: Named) -> dict[str, Tensor]:
    parts = flat.split([numel(shape) for _, shape in wanted])
    return {name: part.view(shape) for (name, shape), part in zip(wanted, parts, strict=True)}


def detect(names: Collection[str], metadata: Mapping[str, str] | None = None) -> tuple[Layout, type]:
    """The layout that these tensor names speak and the config class of the model: those that know the most of them.

    metadata: the file's own; a file that is marked as of a layout is of that layout.
    Raises ValueError if no layout knows any of the names.
    """
    patterns = set(map(pattern, names))
    marked = [layout for layout in LAYOUTS.values() if layout.mark and layout.mark in (metadata or {})]
    best: tuple[int, bool, Layout, type] | None = None
    for layout in marked or (*LAYOUTS.values(), STATE_DICT):
        for config_class, table in layout.tables.items():
            known = len(patterns & table.patterns)
            if known and (best is None or (known, not layout.mark) > best[:2]):
                best = known, not layout.mark, layout, config_class
    if best is None:
        example = short(min(names, default="none"))
        raise ValueError(
            f"none of its {len(names)} tensors (first: {example}) has a name of the layouts {', '.join(LAYOUTS)}: "
            "this is not a DINOv3 vision transformer, nor a DINOv3 ConvNeXt"
        )
    return best[2], best[3]


def backbones(names: Collection[str]) -> list[str]:
    """What stands before the names of each backbone's tensors, as `module.`, `backbone.` or `teacher.backbone.`."""
    tables = [table for layout in LAYOUTS.values() for table in layout.tables.values()]
    anchors = {name for table in tables for name in table.theirs(table.family.anchor)}
    beginnings = _beginnings()
    anchors |= {start + a.removeprefix(w) for a in anchors for start, w in beginnings.items() if a.startswith(w)}
    starts = {start for table in tables for start in table.block_starts} | set(beginnings)
    found = prefixes(names, anchors, starts)
    inner = {start.removesuffix(written) for start, written in beginnings.items()}  # "model." is no prefix of its own
    return [p for p in found if not any(p.endswith(i) and p.removesuffix(i) in found for i in inner)]


def _beginnings() -> dict[str, str]:
    """How names begin in memory alone, and in files: transformers' `model.layer.` is written `layer.`."""
    return {start: written for layout in LAYOUTS.values() for start, written in layout.in_memory.items()}


def own_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """The backbone's own names of those tensors that stand behind the prefix."""
    result = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
    for start, written in _beginnings().items():
        result |= {name: written + own[len(start) :] for name, own in result.items() if own.startswith(start)}
    return result


def carried_names(layout: Layout, table: Table, names: Iterable[str]) -> dict[str, str]:
    """The tensors that the model does not need and that are kept: their names here, and in the layout that has them."""
    return {
        name: name.removeprefix(layout.carries)
        for name in sorted(names)
        if name in table.carried or (layout.carries and name.startswith(layout.carries))
    }


def reason_of(name: str) -> str:
    """Why the model does not need a tensor that some layout has."""
    tables = (table for layout in LAYOUTS.values() for table in layout.tables.values())
    return next((table.carried[name] for table in tables if name in table.carried), "unknown to this release")


def reader_config(layout: Layout, card: Card, shapes: Mapping[str, Shape], read: Read) -> Config:
    """The config that a reader of that layout's files takes: what their card says, else what their tensors show."""
    said = layout.read_card(layout.write_card(card)).config
    if said is not None:
        return said
    table = layout.table(card.config)
    return table.family.infer(table, shapes, read)
