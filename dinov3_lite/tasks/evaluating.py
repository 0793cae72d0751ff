"""`evaluate`: predictions beside the truth, data set by data set. Reads only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data import MASK_FOLDERS, pictures_in, read_mask, read_masks
from .measures import Measures, Table

Progress = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True)
class DataSet:
    """Predictions and truth of one data set, by their stems."""

    name: str
    predictions: dict[str, Path]
    masks: dict[str, Path]

    @property
    def both(self) -> list[str]:
        return [stem for stem in self.masks if stem in self.predictions]


def evaluate(
    predictions: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    *,
    classes: int = 1,
    report: Callable[[str], None] = print,
    progress: Progress = iter,
) -> Table:
    """Measure predictions against masks: a dict from each data set's name to its measures.

    predictions: a folder of 8-bit pictures named as the masks are, or one with a folder for each data set.
    truth: a folder of masks; a data set, with such a folder in it; or a folder of data sets.
    report: called with one line of text about predictions or masks without a partner, and about predictions of
        another size than their mask, which are resized in memory.
    progress: wraps the iterable of names, as tqdm does.

    Raises ValueError if no prediction has a mask, and for files that are no masks (see `dinov3_lite.tasks.data`).
    """
    table: Table = {}
    for data_set in data_sets(Path(predictions), Path(truth), report):
        _report_alone(data_set, report)
        table[data_set.name] = _measure(data_set, classes, report, progress)
    return table


def data_sets(predictions: Path, truth: Path, report: Callable[[str], None]) -> list[DataSet]:
    """The data sets of `truth` for which there are predictions."""
    for folder in (predictions, truth):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    masks = _masks_of(truth)
    if masks is not None:
        name = truth.resolve().parent.name if truth.name.lower() in MASK_FOLDERS else truth.resolve().name
        folder = predictions if pictures_in(predictions) else predictions / name
        pairs = [(name, folder, masks)]
    else:
        below = [(f.name, _masks_of(f)) for f in sorted(truth.iterdir()) if f.is_dir()]
        pairs = [(name, predictions / name, masks) for name, masks in below if masks is not None]
        if not pairs:
            raise ValueError(f"{truth}: holds neither masks nor data sets with a folder of masks in each")
    found = []
    for name, folder, masks in pairs:
        predicted = pictures_in(folder) if folder.is_dir() else {}
        data_set = DataSet(name, predicted, pictures_in(masks))
        if data_set.both:
            found.append(data_set)
        else:
            report(f"{folder}: holds no prediction for the masks in {masks}: {name} is left out")
    if not found:
        raise ValueError(f"{predictions}: holds no prediction named as a mask in {truth}")
    return found


def _masks_of(folder: Path) -> Path | None:
    """The folder of masks in `folder`, or itself if it holds pictures; None if neither."""
    inside = [f for f in sorted(folder.iterdir()) if f.is_dir() and f.name.lower() in MASK_FOLDERS]
    if len(inside) > 1:
        names = " and ".join(f.name for f in inside)
        raise ValueError(f"{folder}: holds the folders {names}: give the one that is meant")
    if inside:
        return inside[0]
    return folder if pictures_in(folder) else None


def _report_alone(data_set: DataSet, report: Callable[[str], None]) -> None:
    for these, those, what in (
        (data_set.masks, data_set.predictions, "masks without a prediction"),
        (data_set.predictions, data_set.masks, "predictions without a mask"),
    ):
        alone = [stem for stem in these if stem not in those]
        if alone:
            names = ", ".join(alone[:20]) + (f", and {len(alone) - 20} more" if len(alone) > 20 else "")
            report(f"{data_set.name}: {len(alone)} {what}, left out: {names}")


def _measure(data_set: DataSet, classes: int, report: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    reading = read_masks([data_set.masks[stem] for stem in data_set.both], classes)
    measures = Measures(classes)
    other_size, brightest = [], 0
    for stem in progress(data_set.both):
        mask = reading.of(data_set.masks[stem])
        file = data_set.predictions[stem]
        prediction = read_mask(file, levels=classes == 1)
        brightest = max(brightest, int(prediction.max()))
        if classes > 1 and prediction.max() >= classes:
            raise ValueError(f"{file}: holds the value {prediction.max()}: expected classes 0 to {classes - 1}")
        if prediction.shape != mask.shape:
            other_size.append(file.name)
            prediction = _resized(prediction, mask.shape, smooth=classes == 1)
        measures.add(prediction, mask)
    if other_size:
        report(
            f"{data_set.name}: {len(other_size)} predictions have another size than their mask, such as "
            f"{other_size[0]}: resized in memory"
        )
    if classes == 1 and brightest == 1:
        report(f"{data_set.name}: predictions hold 0 and 1 and were read as 0 and 1 of 255: write them with 0 and 255")
    return {**measures.result(), "pictures": len(data_set.both)}


def _resized(prediction: np.ndarray, shape: tuple[int, ...], smooth: bool) -> np.ndarray:
    from PIL import Image

    resample = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.array(Image.fromarray(prediction).resize((shape[1], shape[0]), resample))
