"""`predict IMAGES --model M --head HEAD --output DIR`: a mask for each picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import progress, say
from .arguments import MODEL, add_device_and_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write an 8-bit PNG for each picture, of its size and with its stem."
    parser.epilog = (
        "example:\n  %(prog)s dataset/TestDataset/CAMO/Image --model checkpoint --head head.safetensors "
        "--output predictions/CAMO"
    )
    parser.add_argument("pictures", nargs="+", type=Path, metavar="IMAGES", help="pictures, or folders of them")
    parser.add_argument("--model", required=True, help=MODEL + ": the one that the head was fitted to")
    parser.add_argument("--head", required=True, type=Path, help="a file that fit wrote")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the predictions")
    parser.add_argument("--overlay", action="store_true", help="draw the masks into the pictures too: DIR/overlay")
    parser.add_argument(
        "--sliding", action="store_true", help="windows at full resolution over pictures larger than in training"
    )
    add_device_and_dtype(parser)


def run(args: argparse.Namespace) -> None:
    from ..tasks import load_head
    from ..tasks.data import read_picture
    from ..tasks.drawing import overlay, save_picture
    from ..tasks.predicting import pictures_of, predict
    from .loading import load_model_and_processor

    pictures = pictures_of(args.pictures)
    _check_output(args.output, pictures)
    model, _ = load_model_and_processor(args)
    network, settings = load_head(args.head, model)
    say(f"{model.config.name}  weights {settings.fingerprint}, head {args.head}")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.overlay:
        (args.output / "overlay").mkdir(exist_ok=True)
    for stem, file in progress(pictures.items(), unit="picture"):
        pixels = read_picture(file)
        prediction = predict(network, pixels, settings, sliding=args.sliding)
        save_picture(prediction, args.output / f"{stem}.png")
        if args.overlay:
            save_picture(overlay(pixels, prediction, settings.classes), args.output / "overlay" / f"{stem}.png")
    kind = (
        "255 times the probability of the foreground"
        if settings.classes == 1
        else f"classes 0 to {settings.classes - 1}"
    )
    say(f"{args.output}: {len(pictures)} predictions, {kind}")


def _check_output(output: Path, pictures: dict[str, Path]) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file: expected a folder for the predictions")
    for stem, file in pictures.items():
        if (output / f"{stem}.png").resolve() == file.resolve():
            raise ValueError(f"{file}: its prediction would be written over it: give another --output")
