"""`track VIDEO --mask FIRST.png --model M --output DIR`: masks of a first frame carried through a video."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import progress, say
from .arguments import MODEL, add_device_and_dtype, add_json

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Carry the objects of a first frame's mask through a video or a folder of frames, and write a mask a frame."
    )
    parser.epilog = (
        "example:\n  %(prog)s frames --mask first.png --model checkpoint --size 480 --output tracked --overlay\n\n"
        "The mask is an 8-bit picture: 0 is the background, any other value an object."
    )
    parser.add_argument("video", type=Path, metavar="VIDEO", help="a video, or a folder of frames in order of names")
    parser.add_argument("--mask", required=True, type=Path, help="the mask of the first frame, an 8-bit picture")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the masks")
    parser.add_argument(
        "--size", type=int, default=960, metavar="N", help="pixels of the shorter side (default: %(default)s)"
    )
    parser.add_argument("--overlay", action="store_true", help="draw the masks into the frames too: DIR/overlay")
    parser.add_argument("--truth", type=Path, metavar="DIR", help="true masks of all frames, for DAVIS' J and F")
    add_device_and_dtype(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    import numpy as np

    from ..tasks.data import pictures_in, read_mask
    from ..tasks.drawing import overlay, save_picture
    from ..tasks.tracking import j_and_f, read_frames, track
    from .loading import feature_map, load_model_and_processor

    mask, palette = read_mask(args.mask), _palette(args.mask)
    truth = pictures_in(args.truth) if args.truth else {}
    _check_output(args, truth)
    model, processor = load_model_and_processor(args)
    names: list[str] = []
    shown: list[np.ndarray] = []  # the frame at hand, kept for drawing

    def frames() -> Iterator[np.ndarray]:
        for name, frame in progress(read_frames(args.video), unit=" frames"):
            if args.truth and name not in truth:
                raise ValueError(f"{args.truth}: holds no mask for the frame {name}: expected one a frame, by stem")
            if args.truth and not names and set(np.unique(read_mask(truth[name]))) != set(np.unique(mask)):
                raise ValueError(f"{truth[name]}: has other values than {args.mask}: expected the same objects")
            names.append(name)
            shown[:] = [frame]
            yield frame

    def features(frame: np.ndarray) -> Tensor:
        scale = args.size / min(frame.shape[:2])
        rows, columns = (max(1, round(scale * side / model.stride)) for side in frame.shape[:2])
        return feature_map(model, processor, frame, (rows, columns))

    if not args.json:
        say(f"{model.config.name}  weights {model.weights_id}")
    (args.output / "overlay" if args.overlay else args.output).mkdir(parents=True, exist_ok=True)
    for tracked in track(frames(), mask, features):
        save_picture(tracked, args.output / f"{names[-1]}.png", palette)
        if args.overlay:
            save_picture(overlay(shown[0], tracked, 256), args.output / "overlay" / f"{names[-1]}.png")
    measures = None
    if args.truth:
        found = (read_mask(args.output / f"{name}.png") for name in names)
        measures = j_and_f(found, (read_mask(truth[name]) for name in names))
    if args.json:
        about = {"model": model.config.name, "weights": model.weights_id}
        say(json.dumps({"output": str(args.output), **about, "frames": names, "measures": measures}))
        return
    say(f"{args.output}: {len(names)} masks")
    if measures:
        say("  ".join(f"{name} {value:.4f}" for name, value in measures.items()))


def _check_output(args: argparse.Namespace, truth: dict[str, Path]) -> None:
    """Refuse a file in the folder's place, a folder that is read, and masks in the place of single files that are."""
    from ..tasks.data import check_overwriting, pictures_in

    folders = {folder.resolve() for folder in (args.video, args.truth) if folder}
    if args.output.exists() and (not args.output.is_dir() or args.output.resolve() in folders):
        raise ValueError(
            f"{args.output}: is a file, or the folder of frames or true masks: give another folder for the masks"
        )
    frames = pictures_in(args.video) if args.video.is_dir() else {}
    read = [args.video, args.mask, *frames.values(), *truth.values()]
    names = frames or {stem for file in read if (stem := file.resolve().stem).isdecimal()}  # a video's are numbers
    places = [args.output, args.output / "overlay"] if args.overlay else [args.output]
    check_overwriting((place / f"{name}.png" for place in places for name in names), read, args.model)


def _palette(file: Path) -> list[int] | None:
    """The colours of a mask that has some, as DAVIS' have, to write the others with."""
    from ..pixels import open_file

    with open_file(file) as image:
        return image.getpalette() if image.mode == "P" else None
