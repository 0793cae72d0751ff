"""Batches of different sizes as one sequence: attention stays within each image, all else sees tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import AttentionFn, auto_attention, suits_triton, triton_attention


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


def unpack(x: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(T, ...) -> one (B_i, N_i, ...) a batch."""
    parts = x.split([b * n for b, n in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


class PackedAttention:
    """`within` for each sequence of a pack: q, k, v (1, T, heads, D) with cos, sin (T, D/2) -> (1, T, heads, D).

    shapes: (B_i, N_i), batches of equal sequences that lie one after the other; T is the sum of B_i * N_i. Our kernels
    take them all in one launch, the other functions batch by batch.
    """

    def __init__(self, within: AttentionFn, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        lengths = [n for b, n in shapes for _ in range(b)]
        self.within = within
        self.shapes = shapes
        self.longest = max(lengths)
        self.cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
        if self.within is triton_attention or (self.within is auto_attention and suits_triton(q)):
            from .kernels import rope_attention_packed

            return rope_attention_packed(q, k, v, cos, sin, self.cu_seqlens, self.longest).unsqueeze(0)
        batches = zip(*(unpack(x, self.shapes) for x in (q, k, v, cos, sin)), strict=True)
        return torch.cat([self.within(*batch).flatten(0, 1) for batch in batches]).unsqueeze(0)
