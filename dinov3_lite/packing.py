"""Batches of different sizes as one sequence: attention stays within each image, all else sees tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """What the blocks run on: a batch of equal sequences or, with `shapes`, several batches packed into one."""

    x: Tensor
    """(B, N, C); packed, (1, T, C) with the tokens of one sequence after the other."""
    cos: Tensor
    """(N, D/2), or (B, N, D/2) if every sequence has its own; packed, (T, D/2). The same for `sin`."""
    sin: Tensor
    shapes: tuple[tuple[int, int], ...] | None = None
    """Packed: (B_i, N_i) of each batch."""


def pack(batches: Sequence[Tokens]) -> Tokens:
    """One sequence of all tokens, without padding. Only attention has to know of `shapes`: all else works on tokens."""

    def rows(table: Tensor, batch: Tensor) -> Tensor:
        return table.expand(*batch.shape[:2], -1).flatten(0, 1)

    return Tokens(
        x=torch.cat([t.x.flatten(0, 1) for t in batches]).unsqueeze(0),
        cos=torch.cat([rows(t.cos, t.x) for t in batches]),
        sin=torch.cat([rows(t.sin, t.x) for t in batches]),
        shapes=tuple((t.x.shape[0], t.x.shape[1]) for t in batches),
    )
