"""What is going to be written: the tensors of a converted file in order, each with the source tensors it is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3_lite.layouts import Shape, lite_shapes
from dinov3_lite.weights import LITE_VERSION, Checkpoint, cast, storage_dtype


@dataclass(frozen=True)
class Entry:
    """One tensor of the output."""

    name: str
    dtype: torch.dtype
    shape: Shape
    opened: Checkpoint

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def parts(self) -> Iterator[Tensor]:
        """The tensor in pieces, one source tensor at a time: their bytes one after the other are its bytes."""
        for part in self.opened.parts(self.name):
            yield cast(part, self.name, self.dtype)


@dataclass(frozen=True)
class Plan:
    """The tensors and the metadata of one output file."""

    entries: list[Entry]
    metadata: dict[str, str]


def make_plan(opened: Checkpoint, dtype: torch.dtype | None) -> Plan:
    """The plan of our own layout, in `dtype` or the source's. Wide tensors come first, so that all are aligned."""
    weights_dtype = dtype or opened.dtype
    entries = [
        Entry(name, storage_dtype(name, weights_dtype), shape, opened)
        for name, (shape, _) in lite_shapes(opened.config).items()
    ]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    source = opened.metadata  # of a file that was converted before
    metadata = {
        "format": "pt",
        "dinov3_lite": LITE_VERSION,
        "config": json.dumps(opened.config.to_dict()),
        "source_layout": source.get("source_layout", opened.layout.name),
        "source_digest": source.get("source_digest", opened.digest()),
        "digest": opened.digest(weights_dtype),
        "rope": source.get("rope", "computed" if "rope_embed.periods" in opened.layout.computed else "stored"),
    }
    if opened.preprocessing is not None:
        metadata["preprocessing"] = json.dumps(opened.preprocessing)
    if opened.note:
        metadata["note"] = opened.note
    return Plan(entries, metadata)
