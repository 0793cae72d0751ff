"""Models for images of other channels than red, green and blue: their first projection, adapted by a named rule.

What a patch of equal channels is projected to stays the same, so that features stay where the model expects them:
always by "mean", and by "repeat" for one channel and for multiples of the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import Checkpoint
from .spans import StoredTensor


def repeated(weight: Tensor, count: int) -> Tensor:
    """Timm's rule: repeat the channels in turn and scale by given / count; a single channel gets their sum.

    (C, given, p, p) -> (C, count, p, p).
    """
    given = weight.shape[1]
    if count == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(count, device=weight.device) % given] * (given / count)


def averaged(weight: Tensor, count: int) -> Tensor:
    """Meta's rule: keep the channels, put their mean into each further one, and scale by given / count; with fewer
    channels than given, each gets the mean.

    (C, given, p, p) -> (C, count, p, p).
    """
    given = weight.shape[1]
    kept = weight if count > given else weight[:, :0]
    mean = weight.mean(dim=1, keepdim=True).expand(-1, count - kept.shape[1], -1, -1)
    return torch.cat((kept, mean), dim=1) * (given / count)


RULES = {"repeat": repeated, "mean": averaged}


def statistics(values: Sequence[float], count: int, rule: str) -> tuple[float, ...]:
    """The means or standard deviations of `count` channels, for a projection that was adapted by that rule."""
    mean = sum(values) / len(values)
    if rule == "repeat" and count > 1:
        return tuple(values[i % len(values)] for i in range(count))
    return (*values, *[mean] * (count - len(values))) if count > len(values) else (mean,) * count


def check_rule(count: int, rule: str) -> None:
    """Raise ValueError unless the rule is one of `RULES` and the number of channels a whole number from 1 on."""
    if rule not in RULES:
        raise ValueError(f"channel_rule is {rule!r}: expected one of {', '.join(RULES)}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"num_channels is {count!r}: expected a whole number from 1 on")


def with_channels(opened: Checkpoint, count: int | None, rule: str) -> Checkpoint:
    """Return the checkpoint with its first projection adapted to `count` channels by one of `RULES`, or as it is if
    count is None or what it has.

    The projection (C, channels, p, p), a ViT's of patches or a ConvNeXt's stem, is computed in float32 or wider.
    Raises ValueError as `check_rule`.
    """
    if count is None:
        return opened
    check_rule(count, rule)
    if count == opened.config.num_channels:
        return opened
    config = replace(opened.config, num_channels=count)
    name = opened.table.family.weight  # the first projection
    stored = opened.tensor(name)
    weight = RULES[rule](stored.to(torch.promote_types(stored.dtype, torch.float32)), count).to(stored.dtype)
    span = StoredTensor.in_memory(name, weight.contiguous(), opened.spans[name][0].stored.file).span()
    card = opened.card._replace(config=config, digest="", preprocessing=None)  # its statistics are of other channels
    return replace(opened, card=card, spans={**opened.spans, name: [span]})
