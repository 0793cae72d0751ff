"""`match A B --model M`: the same places in two pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..console import say
from .arguments import MODEL, add_device_and_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Find patches of two pictures that are each other's most similar, spread over the pictures."
    parser.epilog = "example:\n  %(prog)s left.jpg right.jpg --model checkpoint --picture matches.png"
    parser.add_argument("first", type=Path, metavar="A", help="a picture")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument(
        "--output", type=Path, default=Path("matches.json"), help="the JSON file to write (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, help="draw both pictures with lines between what matches")
    parser.add_argument(
        "--size", type=int, default=768, metavar="N", help="pixels of the longer sides (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=60, metavar="N", help="at most so many (default: %(default)s)")
    parser.add_argument(
        "--spacing",
        type=float,
        default=2.0,
        metavar="N",
        help="patches between two matches, at least (default: %(default)s)",
    )
    add_device_and_dtype(parser)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint.files import whole_files
    from ..explore import grid_of
    from ..tasks.data import check_output, read_picture
    from ..tasks.drawing import draw_matches, picture_format, save_picture
    from ..tasks.matching import match
    from .loading import feature_map, load_model_and_processor

    for output in filter(None, (args.output, args.picture)):
        check_output(output, (args.first, args.second), args.model)
    if args.picture:
        if args.picture.resolve() == args.output.resolve():
            raise ValueError(f"{args.picture}: is the file for the matches too: give another name")
        picture_format(args.picture)
    pictures = [read_picture(file) for file in (args.first, args.second)]
    model, processor = load_model_and_processor(args)
    grids = [grid_of(pixels, args.size, model.stride) for pixels in pictures]
    first, second = (feature_map(model, processor, *picture) for picture in zip(pictures, grids, strict=True))
    matches = match(first, second, count=args.count, spacing=args.spacing)

    def centre(which: int, place: tuple[int, int]) -> tuple[float, float]:
        """(x, y) in pixels of the middle of a patch."""
        (height, width, _), (rows, columns) = pictures[which].shape, grids[which]
        return (place[1] + 0.5) * width / columns, (place[0] + 0.5) * height / rows

    points = [(centre(0, m.first), centre(1, m.second)) for m in matches]
    content = {
        "pictures": [str(args.first), str(args.second)],
        "model": model.config.name,
        "weights": model.weights_id,
        "matches": [
            {"first": list(p), "second": list(q), "cosine": m.cosine} for (p, q), m in zip(points, matches, strict=True)
        ],
    }
    with whole_files() as out, out.create(args.output) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    say(f"{model.config.name}  weights {model.weights_id}")
    say(f"{args.output}: {len(matches)} matches, x and y in pixels of each picture")
    if args.picture:
        save_picture(draw_matches(pictures[0], pictures[1], points), args.picture)
        say(f"{args.picture}: drawn")
