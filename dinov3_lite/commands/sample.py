"""`sample FOLDER`: a checkpoint to try things with, where the real weights can't be downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import naming, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a checkpoint in transformers' layout. Its weights are made, not trained."
    parser.epilog = "example:\n  %(prog)s checkpoint --variant convnext-tiny"
    parser.add_argument("folder", type=Path, help="where to; it may exist, but not hold a checkpoint")
    parser.add_argument("--variant", default="vits16", help="any released one by its name (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from ..sample import write_sample

    with naming(args.folder):
        write_sample(args.folder, args.variant)
    what = "ViT-S" if args.variant == "vits16" else args.variant
    say(f"{args.folder}: a {what} checkpoint in transformers' layout, with made weights (not trained)")
