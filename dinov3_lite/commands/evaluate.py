"""`evaluate PRED GT`: the field's measures of predictions, as a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..console import complain, progress, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "S-measure, weighted F, mean E, mean F, MAE (by pysodmetrics) and IoU of predictions, for each data set. Names "
        "without a partner are listed. Predictions are never written to."
    )
    parser.epilog = (
        "example:\n  %(prog)s predictions dataset/TestDataset\n\n"
        "GT is a folder of masks, a data set with a folder GT, gt, Mask or masks in it, or a folder of data sets; PRED "
        "then holds a folder for each of them."
    )
    parser.add_argument("predictions", type=Path, metavar="PRED", help="a folder of predictions")
    parser.add_argument("truth", type=Path, metavar="GT", help="a folder of masks, or of data sets")
    parser.add_argument(
        "--classes", type=int, default=1, metavar="K", help="both hold the numbers of K classes (default: a foreground)"
    )
    formats = parser.add_mutually_exclusive_group()
    for name in ("markdown", "csv", "json"):
        formats.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=f"print {name}")
    parser.set_defaults(format="text")


def run(args: argparse.Namespace) -> None:
    from ..tasks import evaluate
    from ..tasks.measures import as_csv, as_markdown, as_text

    table = evaluate(
        args.predictions,
        args.truth,
        classes=args.classes,
        report=lambda line: complain(f"dinov3_lite: {' '.join(line.split())}"),
        progress=lambda stems: progress(stems, unit=" pictures"),
    )
    write = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "json": lambda t: json.dumps(t, indent=2)}
    say(write[args.format](table))
