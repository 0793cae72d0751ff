"""`probe DATA [TEST]`: k-NN and logistic regression on frozen features."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress, say
from .arguments import MODEL, add_device_and_dtype, add_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..tasks.probing import Labelled

TRAIN, TEST = ("train",), ("test", "val", "validation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Accuracy of k-NN (k 10, 20, 100, 200, temperature 0.07) and of logistic regression (the best of 45 values of "
        "C) on frozen CLS tokens, with what is confused."
    )
    parser.epilog = (
        "example:\n  %(prog)s flowers --model checkpoint --shots 5 --seeds 10\n\n"
        "DATA holds a folder for each class; or folders train and test (or val) with those; or it is a feature store "
        "of extract, whose keys begin with the class. Without TEST a part is held out."
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of class folders, or a feature store")
    parser.add_argument("test", nargs="?", type=Path, metavar="TEST", help="the same kind of source, to test on")
    parser.add_argument("--model", help=MODEL + " (not for a feature store)")
    parser.add_argument("--shots", type=int, metavar="N", help="train on N pictures of each class (default: on all)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with so many seeds (default: 1)")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the pictures, to test on where there is no TEST (default: 0.2)",
    )
    add_device_and_dtype(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    import numpy as np

    from ..tasks.probing import HELD_OUT_OF_FEW, confused, confusion, few_shot, probe

    if args.seeds < 1 or (args.shots is not None and args.shots < 1):
        raise argparse.ArgumentError(None, "--shots and --seeds are numbers from 1")
    if not 0 < args.held_out < 1:
        raise argparse.ArgumentError(None, f"--held-out {args.held_out} is not a share between 0 and 1")
    train, train_features, test, test_features = _load(args)
    if test is None:
        (train, train_features), (test, test_features) = _split(train, train_features, args.held_out)
    elif test.classes != train.classes:
        alone = sorted(set(test.classes) ^ set(train.classes))
        raise ValueError(f"{args.test or args.data}: the class {alone[0]} is in one of training and test set only")

    held_out = None  # what C is chosen by: with --shots split off before drawing, otherwise `probe` splits it off
    if args.shots:
        (train, train_features), (held, held_features) = _split(train, train_features, HELD_OUT_OF_FEW)
        held_out = held_features, held.labels
    runs = []
    for seed in range(args.seeds):
        drawn = few_shot(train, args.shots, seed) if args.shots else np.arange(len(train.labels))
        labels = train.labels[drawn]
        runs.append(probe(train_features[drawn], labels, test_features, test.labels, held_out, seed))
    matrix = np.sum([confusion(r.predictions, test.labels, len(test.classes)) for r in runs], axis=0)
    rows: dict[str, list[float]] = {f"k-NN, k {k}": [r.knn[k] for r in runs] for k in runs[0].knn}
    rows["logistic regression"] = [r.logistic for r in runs]
    result: dict[str, Any] = {
        "classes": list(test.classes),
        "train": len(drawn),
        "test": len(test.labels),
        "accuracy": {name: {"mean": float(np.mean(v)), "std": float(np.std(v))} for name, v in rows.items()},
        "C": [r.C for r in runs],
        "confusion": matrix.tolist(),
    }
    if args.json:
        say(json.dumps(result, indent=2))
        return
    seeds = f", {args.seeds} seeds" if args.seeds > 1 else ""
    say(f"{len(test.classes)} classes, {result['train']} to train on, {result['test']} to test on{seeds}")
    for name, accuracy in result["accuracy"].items():
        spread = f" +- {accuracy['std']:.4f}" if args.seeds > 1 else ""
        say(f"{name:<20} {accuracy['mean']:.4f}{spread}")
    pairs = confused(matrix, test.classes)
    if pairs:
        say("confused most often by logistic regression (true, predicted, times):")
    for true, predicted, times in pairs:
        say(f"  {true} -> {predicted}  {times}")


def _split(labelled: Labelled, features: Tensor, share: float) -> list[tuple[Labelled, Tensor]]:
    """What is left, and what is held out: a share of each class, with their features."""
    import numpy as np

    from ..tasks.probing import split

    indices = type(labelled)(range(len(labelled.labels)), labelled.labels, labelled.classes)
    parts = [np.array(part.items) for part in split(indices, share, seed=0)]
    return [(labelled.take(part), features[part]) for part in parts]


def _load(args: argparse.Namespace) -> tuple[Labelled, Tensor, Labelled | None, Any]:
    """Training set and test set with their features; no test set where one is to be held out."""
    sources = [args.data, *([args.test] if args.test else [])]
    if not args.test and args.data.is_dir():
        inside = {name: args.data / name for name in (*TRAIN, *TEST) if (args.data / name).is_dir()}
        tests = [name for name in TEST if name in inside]
        if "train" in inside and len(tests) > 1:
            raise ValueError(f"{args.data}: holds {' and '.join(tests)}: give the one to test on as TEST")
        if "train" in inside and tests:
            sources = [inside["train"], inside[tests[0]]]
    embed_folder = _embedder(args, sources)
    loaded = [_from_store(s) if (s / "job.json").is_file() else embed_folder(s) for s in sources]
    return (*loaded[0], *(loaded[1] if len(loaded) > 1 else (None, None)))


def _from_store(folder: Path) -> tuple[Labelled, Tensor]:
    import torch

    from .. import open_features
    from ..tasks.probing import classes_of_keys

    store = open_features(folder)
    if "cls_token" not in store.outputs:
        raise ValueError(f"{folder}: holds {', '.join(store.outputs)} and no cls_token: extract that, too")
    return classes_of_keys(folder, list(store.keys)), torch.as_tensor(store["cls_token"][:]).float()


def _embedder(args: argparse.Namespace, sources: list[Path]) -> Any:
    from ..tasks.probing import class_folders, embed
    from .loading import load_model_and_processor

    pending = {s: class_folders(s) for s in sources if not (s / "job.json").is_file()}
    if not pending:
        return None
    if not args.model:
        raise argparse.ArgumentError(None, "--model is needed for a folder of pictures")
    model, processor = load_model_and_processor(args)

    def embed_folder(source: Path) -> tuple[Labelled, Tensor]:
        files = list(pending[source].items)
        return pending[source], embed(files, model, processor, progress=lambda steps: progress(steps, unit=" batches"))

    return embed_folder
