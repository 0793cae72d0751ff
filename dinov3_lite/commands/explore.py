"""`explore PHOTO ... --output page.html`: a page to look at features with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import say
from .arguments import MODEL, add_device_and_dtype, image_size

if TYPE_CHECKING:
    from ..loading import Backbone

SHOWN = 16  # pixels a side of what the page shows of a ConvNeXt's stages: the patches of a ViT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write one HTML page that opens by a double click and fetches nothing: hover over a patch and see what is "
        "similar to it in every picture; masks, principal components, attention of the CLS token. Of a ConvNeXt, the "
        "four stages are shown as blocks, on the grid of a ViT with patches of 16 px; it has no attention."
    )
    parser.epilog = "example:\n  %(prog)s photo.jpg other.jpg --model checkpoint --size 768 --output page.html"
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="files of pictures")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("explore.html"),
        metavar="PAGE",
        help="the file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=_size,
        default=512,
        metavar="N or HxW",
        help="pixels: N for the longer side, at the picture's own aspect, or both sides (default: 512)",
    )
    parser.add_argument(
        "--blocks",
        metavar="I,J,...",
        help="blocks to show, counted from 0 (default: as many as fit in 2 MB, the last among them)",
    )
    add_device_and_dtype(parser)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint.files import whole_files
    from ..convnext import DINOv3ConvNeXt
    from ..explore import blocks_that_fit, check_size, explore, grid_of
    from ..tasks.data import check_output, read_picture
    from .loading import load_model_and_processor

    check_output(args.output, args.photos, args.model)
    pictures = [(photo.name, read_picture(photo)) for photo in args.photos]
    model, processor = load_model_and_processor(args)
    side = model.patch_size or SHOWN
    if isinstance(model, DINOv3ConvNeXt):
        model.patch_size = side  # its stages are resized to the grid of such patches
    places = model.stride // side  # patches of the page along one side of a token of the model
    grids = [(places * h, places * w) for h, w in (grid_of(p, args.size, model.stride) for _, p in pictures)]
    blocks = _blocks(args.blocks, model) if args.blocks else blocks_that_fit(grids, model)
    check_size(grids, model, blocks)
    page = explore(pictures, model, processor, grids, blocks)
    with whole_files() as out, out.create(args.output) as file:
        file.write(page.encode())
    count = f"{len(pictures)} picture{'s' * (len(pictures) > 1)}"
    shown = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
    say(f"{model.config.name}  weights {model.weights_id}")
    say(f"{args.output}: {len(page) / 1e6:.1f} MB, {count}, {shown}")


def _size(text: str) -> int | tuple[int, int]:
    return image_size(text) if "x" in text else image_size(text)[0]


def _blocks(text: str, model: Backbone) -> list[int]:
    try:
        return model.block_indices([int(part) for part in text.split(",")])
    except ValueError as error:
        raise ValueError(
            f"--blocks {text}: expected indices from 0 to {model.depth - 1}, with commas between"
        ) from error
