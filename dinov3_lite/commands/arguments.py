"""Arguments that commands share. Nothing here imports torch: `--help` is to be quick."""

from __future__ import annotations

import argparse
import re

DTYPES = ("float32", "float16", "bfloat16")
MODEL = "a converted file, a checkpoint folder, a weights file or a hub id"


def add_device_and_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's own)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="tell what was done as one JSON object, for programs")


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of N or HEIGHTxWIDTH."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def point(text: str) -> tuple[int, int]:
    """(x, y) of X,Y."""
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y in pixels of the photo")
    return int(match[1]), int(match[2])
