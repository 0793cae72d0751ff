"""`fit`: from a folder of pictures and masks to a head."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..finetune import parameter_groups
from ..image import ImageProcessor
from ..loading import Backbone
from .data import check_output, check_pairs, find_pairs, hold_out
from .head import DenseHead, HeadSettings, NormedQuarters, Segmenter, fingerprint, save_head
from .loop import Fitted, Recipe, train

StrPath = str | os.PathLike[str]
BACKBONE_RATE = 0.01  # of the head's learning rate, for blocks that train
LAYER_DECAY = 0.8


def fit(
    data: StrPath | Sequence[StrPath],
    backbone: Backbone,
    output: StrPath,
    *,
    processor: ImageProcessor | None = None,
    recipe: Recipe | None = None,
    classes: int = 1,
    unfreeze: int = 0,
    held_out: float = 0.1,
    report: Callable[[str], None] = print,
    workers: int = 0,
) -> Fitted:
    """Fit a dense head to pictures and masks; write the head of the epoch that did best on held-out pictures.

    data: a folder of pictures and masks, or several (see `dinov3_lite.tasks.data`).
    backbone: stays frozen but for its last `unfreeze` blocks, which are fitted in place.
    processor: its mean and std normalise the pictures; ImageNet's unless given.
    classes: 1 for foreground and background. Otherwise masks hold 0 to classes - 1, and 255 for pixels to ignore.
    held_out: the share of the pairs that is not trained on and chooses the best epoch.

    A run that is stopped leaves `output`.resume; the same call again goes on from there.

    Raises ValueError for masks that can't be read in one way, for sizes that the backbone does not take and for an
    unfinished run with other settings; FileExistsError where `output` is there already.
    """
    output = Path(output)
    folders = [data] if isinstance(data, (str, os.PathLike)) else data
    resume = output.with_name(f"{output.name}.resume")
    check_output(output)
    if output.exists() and not resume.exists():
        raise FileExistsError(f"{output}: is there already: give another name or remove it")
    if not 1 <= classes <= 255:
        raise ValueError(f"classes is {classes}: expected 1, for one foreground, to 255")
    recipe = recipe or Recipe()
    if processor is not None:
        scale = 255 * processor.rescale_factor
        mean, std = (tuple(value / scale for value in values) for values in (processor.mean, processor.std))
        recipe = replace(recipe, mean=mean, std=std)
    backbone.grid_of(*recipe.size)
    pairs = [pair for folder in folders for pair in find_pairs(folder)]
    twice = [file for file, times in Counter(pair.picture.resolve() for pair in pairs).items() if times > 1]
    if twice:
        raise ValueError(
            f"{twice[0]}: is given twice, so that it would be trained on and held out: give each folder once"
        )
    reading, empty = check_pairs(pairs, classes)
    if empty:
        report(
            f"{empty[0]}: is empty{f', as {len(empty) - 1} more are' if len(empty) > 1 else ''}, of {len(pairs)} "
            "masks: learned as pictures with nothing to find"
        )
    train_pairs, held = hold_out(pairs, held_out, recipe.seed)
    report(f"{len(train_pairs)} pictures to train on, {len(held)} held out for choosing")

    settings = HeadSettings(
        classes=classes,
        size=recipe.size,
        channels=NormedQuarters(backbone).channels,
        unfreeze=unfreeze,
        mean=recipe.mean,
        std=recipe.std,
        backbone=backbone.config.name,
        fingerprint=fingerprint(backbone),
    )
    torch.manual_seed(recipe.seed)
    network = Segmenter(backbone, DenseHead(settings.channels, classes), unfreeze)
    groups = [
        {"params": [p for p in network.head.parameters() if (p.ndim > 1) == decays], "weight_decay": weight_decay}
        for decays, weight_decay in ((True, recipe.weight_decay), (False, 0.0))
    ]
    if unfreeze:
        groups += parameter_groups(backbone, BACKBONE_RATE * recipe.lr, recipe.weight_decay, LAYER_DECAY)
        backbone.weights_id = "fitted"
    return train(
        network,
        train_pairs,
        held,
        reading,
        recipe,
        parameter_groups=groups,
        on_best=lambda entry: save_head(network, settings, output, entry),
        resume=resume,
        report=report,
        workers=workers,
    )
