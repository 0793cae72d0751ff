"""`probe`: how well the classes of pictures follow from frozen features, by k-NN and by logistic regression.

The settings are those of Meta's evaluation. dinov3/eval/knn.py: CLS tokens of unit length, votes of the 10, 20, 100
and 200 nearest, weighted by a softmax of cosines at temperature 0.07. dinov3/eval/log_regression.py: CLS tokens as they
are, in float64, the best of 45 values of C from 1e-6 to 1e5, as found on a part of the training set that is held out.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needed
from ..image import ImageProcessor
from ..inference import optimize_for_inference
from ..loading import Backbone
from .data import SUFFIXES

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CS = 10 ** np.linspace(-6, 5, 45)
HELD_OUT, HELD_OUT_OF_FEW = 0.1, 0.01  # share of the training set for choosing C; the second with few shots
MAX_ITERATIONS, TOLERANCE = 1000, 1e-12


@dataclass(frozen=True)
class Labelled:
    """Pictures, or features, with a class each."""

    items: Sequence[Any]
    """Files, or rows of a store's features."""
    labels: np.ndarray
    """(n,) int64, indices into `classes`."""
    classes: tuple[str, ...]

    def take(self, indices: np.ndarray) -> Labelled:
        return Labelled([self.items[i] for i in indices], self.labels[indices], self.classes)


def class_folders(folder: Path) -> Labelled:
    """Pictures of a folder with a folder for each class, at any depth in it.

    Raises FileNotFoundError where there is none, ValueError for fewer than two classes or an empty one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder: expected one with a folder of pictures for each class")
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
        if not found:
            raise ValueError(f"{folder / name}: holds no picture: expected those of the class {name}")
        files += found
        labels += [label] * len(found)
    return _of_several_classes(folder, Labelled(files, np.array(labels, np.int64), tuple(names)))


def classes_of_keys(store: Path, keys: Sequence[str]) -> Labelled:
    """Rows of a feature store, whose keys begin with the class: `tench/001.jpg`."""
    names = [key.split("/")[0] if "/" in key else "" for key in keys]
    if "" in names:
        raise ValueError(f"{store}: the key {keys[names.index('')]!r} has no class before a slash, as in tench/001.jpg")
    classes = tuple(sorted(set(names)))
    numbers = {name: i for i, name in enumerate(classes)}
    labels = np.array([numbers[name] for name in names], np.int64)
    return _of_several_classes(store, Labelled(range(len(keys)), labels, classes))


def _of_several_classes(source: Path, labelled: Labelled) -> Labelled:
    if len(labelled.classes) < 2:
        raise ValueError(f"{source}: holds {len(labelled.classes)} class: expected at least two, a folder each")
    return labelled


def split(labelled: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """A share of each class, at least one picture of it, apart from the rest.

    Raises ValueError for a class of fewer than two.
    """
    rng = np.random.default_rng(seed)
    rest, apart = [], []
    for label, name in enumerate(labelled.classes):
        members = rng.permutation(np.flatnonzero(labelled.labels == label))
        if len(members) < 2:
            raise ValueError(f"class {name}: has {len(members)} picture: expected at least 2, as a part is held out")
        count = min(len(members) - 1, max(1, round(share * len(members))))
        apart.append(members[:count])
        rest.append(members[count:])
    return labelled.take(np.sort(np.concatenate(rest))), labelled.take(np.sort(np.concatenate(apart)))


def few_shot(labelled: Labelled, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` random pictures of each class. Raises ValueError if a class has fewer."""
    rng = np.random.default_rng(seed)
    drawn = []
    for label, name in enumerate(labelled.classes):
        members = np.flatnonzero(labelled.labels == label)
        if len(members) < shots:
            raise ValueError(f"class {name}: has {len(members)} pictures to train on: expected at least {shots}")
        drawn.append(rng.choice(members, shots, replace=False))
    return np.sort(np.concatenate(drawn))


@torch.no_grad()
def embed(
    files: Sequence[str | os.PathLike[str]],
    model: Backbone,
    processor: ImageProcessor,
    batch_size: int = 16,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    """CLS tokens of pictures after the final norm: (n, C) float32 on the CPU."""
    device = model.device
    run = optimize_for_inference(model) if device.type == "cpu" else model
    batches = []
    for i in progress(range(0, len(files), batch_size)):
        pixel_values = processor(list(files[i : i + batch_size]))["pixel_values"]
        batches.append(run(pixel_values.to(device)).cls_token.float().cpu())
    return torch.cat(batches)


@dataclass(frozen=True)
class Probed:
    """Accuracies of one training set on the test set."""

    knn: dict[int, float]
    """By k."""
    logistic: float
    C: float
    predictions: np.ndarray
    """(n,) int64, logistic regression's."""


def probe(
    train: Tensor,
    train_labels: np.ndarray,
    test: Tensor,
    test_labels: np.ndarray,
    held_out: tuple[Tensor, np.ndarray] | None = None,
    seed: int = 0,
) -> Probed:
    """k-NN and logistic regression on features (n, C), with labels (n,) int64.

    held_out: features and labels by which the logistic regression's C is chosen. Unless given, a tenth of the training
        set is taken for that, by chance, and then trained on too.

    A k beyond the number of training features is that number.
    """
    ks = sorted({min(k, len(train)) for k in KS})
    knn = {k: float((nearest(train, train_labels, test, k) == test_labels).mean()) for k in ks}
    X, Y = (features.double().numpy() for features in (train, test))
    held = None if held_out is None else (held_out[0].double().numpy(), held_out[1])
    predictions, C = logistic(X, train_labels, Y, held, seed)
    return Probed(knn, float((predictions == test_labels).mean()), C, predictions)


def nearest(train: Tensor, labels: np.ndarray, test: Tensor, k: int) -> np.ndarray:
    """Classes by votes of the k nearest by cosine, weighted by its softmax at TEMPERATURE."""
    train, test = (F.normalize(features.float(), dim=1) for features in (train, test))
    one_hot = F.one_hot(torch.from_numpy(labels))
    found = []
    for queries in test.split(1024):
        similarity, index = (queries @ train.T).topk(k, dim=1)
        votes = one_hot[index] * (similarity / TEMPERATURE).softmax(1).unsqueeze(-1)  # (queries, k, classes)
        found.append(votes.sum(1).argmax(1))
    return torch.cat(found).numpy()


def logistic(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, held_out: tuple[np.ndarray, np.ndarray] | None, seed: int
) -> tuple[np.ndarray, float]:
    """Classes by logistic regression, fitted to all of `train`, and the C that did best on what was held out."""
    with needed("logistic regression", "scikit-learn", "'dinov3-lite[tasks]'"):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
    part, part_labels, best = train, labels, 1.0
    if held_out is None:
        classes, counts = np.unique(labels, return_counts=True)
        held = max(len(classes), round(HELD_OUT * len(labels)))
        if counts.min() >= 2 and len(labels) - held >= len(classes):  # else nothing can be held out, and C is 1
            part, X, part_labels, y = train_test_split(
                train, labels, test_size=held, stratify=labels, random_state=seed
            )
            held_out = X, y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as in Meta's setting, it may stop before
        model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)
        if held_out is not None:
            scores = [model.set_params(C=C).fit(part, part_labels).score(*held_out) for C in CS]
            best = float(CS[int(np.argmax(scores))])
        model = LogisticRegression(C=best, max_iter=MAX_ITERATIONS, tol=TOLERANCE).fit(train, labels)
    return model.predict(test), best


def confusion(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: a row a true class, a column a predicted one."""
    return np.bincount(classes * labels + predictions, minlength=classes**2).reshape(classes, classes)


def confused(matrix: np.ndarray, classes: Sequence[str], most: int = 10) -> list[tuple[str, str, int]]:
    """The pairs of (true, predicted) that are confused most often, with how often."""
    wrong = Counter({(i, j): int(n) for (i, j), n in np.ndenumerate(matrix) if i != j and n})
    return [(classes[i], classes[j], n) for (i, j), n in wrong.most_common(most)]
