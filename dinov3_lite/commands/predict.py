"""`predict IMAGES --model M --head HEAD --output DIR`: a mask for each picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..console import complain, progress, say, sentence
from .arguments import MODEL, add_device_and_dtype, add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write an 8-bit PNG for each picture, of its size and with its stem. A picture that can't be read is named at "
        "the end, with exit status 1; the others are predicted."
    )
    parser.epilog = (
        "example:\n  %(prog)s dataset/TestDataset --model checkpoint --head head.safetensors --output predictions\n\n"
        "Of a folder of data sets, each gets a folder of its name in DIR, which evaluate takes as it is."
    )
    parser.add_argument("pictures", nargs="+", type=Path, metavar="IMAGES", help="pictures, folders, or data sets")
    parser.add_argument("--model", required=True, help=MODEL + ": the one that the head was fitted to")
    parser.add_argument("--head", required=True, type=Path, help="a file that fit wrote")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the predictions")
    parser.add_argument("--overlay", action="store_true", help="draw the masks into the pictures too: DIR/overlay")
    parser.add_argument(
        "--sliding", action="store_true", help="windows at full resolution over pictures larger than in training"
    )
    add_device_and_dtype(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..tasks import load_head
    from ..tasks.data import read_picture
    from ..tasks.drawing import overlay, save_picture
    from ..tasks.predicting import pictures_of, predict
    from .loading import load_model_and_processor

    pictures = pictures_of(args.pictures)
    _check_outputs(args, pictures)
    model, _ = load_model_and_processor(args)
    network, settings = load_head(args.head, model)
    if not args.json:
        say(f"{model.config.name}  weights {settings.fingerprint}, head {args.head}")
    for folder in {output.parent for name in pictures for output in _outputs(args, name)}:
        folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, file in progress(pictures.items(), unit=" pictures"):
        try:
            pixels = read_picture(file)
            prediction = predict(network, pixels, settings, sliding=args.sliding)
        except (OSError, ValueError) as error:
            failed[str(file)] = f"{file}: {sentence(error).removeprefix(f'{file}: ')}"
            continue
        output, *drawing = _outputs(args, name)
        save_picture(prediction, output)
        written[str(file)] = str(output)
        if drawing:
            save_picture(overlay(pixels, prediction, settings.classes), drawing[0])
    kind = (
        "255 times the probability of the foreground"
        if settings.classes == 1
        else f"classes 0 to {settings.classes - 1}"
    )
    if args.json:
        about = {"model": model.config.name, "weights": settings.fingerprint, "head": str(args.head)}
        say(json.dumps({"output": str(args.output), **about, "values": kind, "predictions": written, "failed": failed}))
    else:
        say(f"{args.output}: {len(written)} predictions, {kind}")
    for reason in failed.values():
        complain(f"dinov3_lite: {reason}")
    return 1 if failed else 0


def _outputs(args: argparse.Namespace, name: str) -> list[Path]:
    """Where a picture's prediction goes and, if it is drawn, the drawing."""
    output = args.output / f"{name}.png"
    return [output, output.parent / "overlay" / output.name] if args.overlay else [output]


def _check_outputs(args: argparse.Namespace, pictures: dict[str, Path]) -> None:
    """Refuse a file in the folder's place, and predictions in the place of what is read or of the pictures' masks."""
    from ..tasks.data import check_overwriting, masks_beside

    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"{args.output}: is a file: expected a folder for the predictions")
    masks = masks_beside({file.parent for file in pictures.values()})
    outputs = (output for name in pictures for output in _outputs(args, name))
    check_overwriting(outputs, [args.head, *pictures.values(), *masks], args.model)
