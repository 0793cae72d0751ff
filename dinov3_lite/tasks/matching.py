"""`match`: the same places in two pictures, by mutual nearest neighbours among their patches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Match(NamedTuple):
    """A patch in each of two pictures: of the other picture's patches, each is the most similar to its partner."""

    first: tuple[int, int]
    """(row, column) in the first picture."""
    second: tuple[int, int]
    cosine: float


def match(first: Tensor, second: Tensor, count: int | None = None, spacing: float = 0.0) -> list[Match]:
    """Mutual nearest neighbours among the patches of two feature maps (C, h, w), the most similar (cosine) first.

    count: the most to return. spacing: least distance between two matches, in patches, in both pictures: of matches
        that lie closer, the most similar is kept.

    Raises ValueError for maps of other shapes and of different numbers of channels.
    """
    for name, feature_map in (("first", first), ("second", second)):
        if feature_map.ndim != 3 or feature_map.shape[0] != first.shape[0]:
            raise ValueError(f"{name} has shape {tuple(feature_map.shape)}: expected two maps (C, h, w) of one C")
    a, b = (F.normalize(m.float().flatten(1).T, dim=1) for m in (first, second))  # (patches, C)
    to_b, to_a = _nearest(a, b), _nearest(b, a)
    here = torch.arange(len(a), device=a.device)
    mutual = here[to_a[to_b] == here]
    cosines = (a[mutual] * b[to_b[mutual]]).sum(1)
    order = cosines.argsort(descending=True, stable=True)
    found = [
        Match(divmod(i, first.shape[2]), divmod(j, second.shape[2]), c)
        for i, j, c in zip(mutual[order].tolist(), to_b[mutual][order].tolist(), cosines[order].tolist(), strict=True)
    ]
    return _spread(found, spacing)[:count]


def _nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """For each query the index of the most similar key, without the whole table at once."""
    return torch.cat([(part @ keys.T).argmax(1) for part in queries.split(2048)])


def _spread(matches: list[Match], spacing: float) -> list[Match]:
    if not spacing or not matches:
        return matches
    places = np.array([(*m.first, *m.second) for m in matches], float)  # (n, 4)
    kept: list[int] = []
    for i, place in enumerate(places):
        apart = places[kept] - place
        if (np.hypot(apart[:, 0], apart[:, 1]) >= spacing).all() and (
            np.hypot(apart[:, 2], apart[:, 3]) >= spacing
        ).all():
            kept.append(i)
    return [matches[i] for i in kept]
