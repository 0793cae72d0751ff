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
    """Timm's rule: the channels over and over, times their number over `count`; for one channel, their sum."""
    given = weight.shape[1]
    if count == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(count, device=weight.device) % given] * (given / count)


def averaged(weight: Tensor, count: int) -> Tensor:
    """Meta's rule: the channels, then their mean in each new one, times their number over `count`; for fewer, means."""
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
    """Raise ValueError for a rule or a number of channels that there is not."""
    if rule not in RULES:
        raise ValueError(f"channel_rule is {rule!r}: expected one of {', '.join(RULES)}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"num_channels is {count!r}: expected a whole number from 1 on")


def with_channels(opened: Checkpoint, count: int | None, rule: str) -> Checkpoint:
    """The checkpoint of a model that takes `count` channels, by one of `RULES`; itself for None or as many.

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
    card = opened.card._replace(config=config, digest="", preprocessing=None)  # whose statistics are of others
    return replace(opened, card=card, spans={**opened.spans, name: [span]})
