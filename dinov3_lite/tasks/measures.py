"""The field's measures, by pysodmetrics, and IoU; and the tables that they are printed in."""

from __future__ import annotations

import csv
import html
import io
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..extras import needed
from .data import IGNORE

FOREGROUND = ("S", "wF", "meanE", "F", "MAE", "IoU")
"""S-measure (alpha 0.5); weighted F (beta 1); E-measure and F-measure (beta squared 0.3), the means over all
thresholds; mean absolute error; intersection over union at one half. All are means over pictures."""


class Measures:
    """Collects predictions beside their truth, picture by picture.

    classes: 1 for one foreground: predictions are grey, masks 0 or 1. Else both hold the classes' numbers.
    wanted: which of FOREGROUND; all unless given.

    Raises ImportError where pysodmetrics is missing and one of its measures is wanted.
    """

    def __init__(self, classes: int = 1, wanted: Sequence[str] = FOREGROUND) -> None:
        self.classes = classes
        self.wanted = wanted
        self.ious: list[float] = []
        self.confusion = np.zeros((classes, classes), np.int64)  # (truth, prediction)
        self._meters = _meters(wanted) if classes == 1 else {}

    def add(self, prediction: np.ndarray, mask: np.ndarray) -> None:
        """One picture: prediction and mask (H, W), uint8.

        pysodmetrics stretches each grey prediction to its own minimum and maximum; IoU takes it as it is.
        """
        if self.classes > 1:
            seen = mask != IGNORE
            pairs = self.classes * mask[seen].astype(np.int64) + prediction[seen]
            self.confusion += np.bincount(pairs, minlength=self.classes**2).reshape(self.confusion.shape)
            return
        truth = mask > 0
        for meter in self._meters.values():
            meter.step(prediction, np.where(truth, 255, 0).astype(np.uint8))
        found = prediction >= 128
        union = np.count_nonzero(found | truth)
        self.ious.append(np.count_nonzero(found & truth) / union if union else 1.0)

    def result(self) -> dict[str, Any]:
        """The measures by their names. With classes: IoU (the mean over classes that occur), accuracy (of pixels),
        and IoU per class (None for one that neither occurs nor is predicted).
        """
        if self.classes > 1:
            hits = np.diag(self.confusion)
            union = self.confusion.sum(0) + self.confusion.sum(1) - hits
            per_class = [float(h / u) if u else None for h, u in zip(hits, union, strict=True)]
            there = [iou for iou in per_class if iou is not None]
            accuracy = float(hits.sum() / max(1, self.confusion.sum()))
            return {"IoU": float(np.mean(there)), "accuracy": accuracy, "IoU per class": per_class}
        results = {name: meter.get_results() for name, meter in self._meters.items()}
        values = {
            "S": lambda: results["S"]["sm"],
            "wF": lambda: results["wF"]["wfm"],
            "meanE": lambda: results["meanE"]["em"]["curve"].mean(),
            "F": lambda: results["F"]["fm"]["dynamic"].mean(),
            "MAE": lambda: results["MAE"]["mae"],
            "IoU": lambda: np.mean(self.ious),
        }
        return {name: float(values[name]()) for name in self.wanted}


def _meters(wanted: Sequence[str]) -> dict[str, Any]:
    with needed("measuring", "pysodmetrics", "'dinov3-lite[tasks]'"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import py_sod_metrics as sod
    make = {
        "S": sod.Smeasure,
        "wF": sod.WeightedFmeasure,
        "meanE": sod.Emeasure,
        "F": lambda: sod.FmeasureV2({"fm": sod.FmeasureHandler(with_dynamic=True, with_adaptive=False, beta=0.3)}),
        "MAE": sod.MAE,
    }
    return {name: make[name]() for name in wanted if name in make}


Table = dict[str, dict[str, Any]]
"""Measures by data set."""


def _rows(table: Table) -> list[list[str]]:
    """A heading and a row for each data set; a column for each class that has an IoU of its own."""

    def cells(measures: dict[str, Any]) -> dict[str, str]:
        flat: dict[str, str] = {}
        for name, value in measures.items():
            values = {f"IoU {i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            flat |= {
                key: "" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for key, v in values.items()
            }
        return flat

    rows = {name: cells(measures) for name, measures in table.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return [["data set", *columns], *([name, *(row.get(c, "") for c in columns)] for name, row in rows.items())]


def as_text(table: Table) -> str:
    rows = [[_one_line(cell) for cell in row] for row in _rows(table)]
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = ((cell, " " * (width - _columns(cell))) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(["".join(first), *(space + cell for cell, space in others)]))
    return "\n".join(lines)


def _one_line(name: str) -> str:
    """A data set's name, which may hold anything that a folder's may, without line breaks and the like."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def _columns(text: str) -> int:
    """Of a terminal: an ideograph takes two, an accent on the letter before it none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def as_markdown(table: Table) -> str:
    heading, *rows = _rows(table)
    escaped = [[html.escape(_one_line(cell), quote=False).replace("|", "\\|") for cell in row] for row in rows]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_csv(table: Table) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(_rows(table))
    return buffer.getvalue().rstrip("\n")
