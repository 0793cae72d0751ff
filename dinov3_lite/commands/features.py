"""`features PHOTO ... --model CHECKPOINT`: features of pictures, saved and drawn."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..console import complain, progress, say, sentence
from .arguments import MODEL, add_device_and_dtype, add_json, image_size, point

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..image import ImageProcessor
    from ..loading import Backbone
    from .rows import RowWriter

DRAWN = 50  # photos at most in one drawing, of which each takes 480 rows of pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Save the CLS token, the register tokens and the feature map of photos: a row each in three tensors, in the "
        "order given. The file's metadata lists the photos of the rows under `files`. A photo that can't be read is "
        "named at the end, with exit status 1: it has no row, and the others are saved."
    )
    parser.epilog = "example:\n  %(prog)s photo.jpg --model checkpoint --picture pca.png --query 100,80"
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="files of pictures")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument(
        "--output", type=Path, default=Path("features.safetensors"), help="the file to write (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, help="draw the photo beside the principal components of its patches")
    parser.add_argument("--query", type=point, metavar="X,Y", help="draw the similarity to the patch at this pixel too")
    parser.add_argument(
        "--size", type=image_size, metavar="N or HxW", help="resize to this many pixels (default: the model's)"
    )
    parser.add_argument(
        "--no-exif", dest="exif", action="store_false", help="don't turn photos as EXIF says (as transformers)"
    )
    add_device_and_dtype(parser)
    add_json(parser)


class Photo(NamedTuple):
    file: Path
    height: int  # of the file's picture, turned as it is shown
    width: int
    pixels: Tensor  # (C, H, W), the model's input
    thumbnail: Tensor | None  # (height, width, 3) in [0, 1], if it will be drawn


def run(args: argparse.Namespace) -> int:
    if args.query and not args.picture:
        raise argparse.ArgumentError(None, "--query is drawn into the picture: give --picture too")
    if args.picture and len(args.photos) > DRAWN:
        raise argparse.ArgumentError(None, f"--picture draws {DRAWN} photos at most, not {len(args.photos)}")
    _check_outputs(args)

    import torch

    from ..checkpoint import DTYPES
    from ..loading import load
    from ..tasks.drawing import save_picture
    from .rows import RowWriter

    model = load(args.model, dtype=DTYPES.get(args.dtype), device=args.device)
    processor = _processor(args)
    with RowWriter(args.output) as rows, torch.inference_mode():
        files, failed, drawn = _encode(args, model, processor, rows)
        about = {
            "model": model.config.name,
            "weights": model.weights_id,
            "preprocessing": asdict(processor),
            "files": files,
            "failed": failed,
        }
        if files:
            rows.save({key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()})

    if args.json:
        say(json.dumps({"output": str(args.output) if files else None, "tensors": rows.shapes, **about}))
    elif files:
        _tell(args, model, processor, rows.shapes)
    for reason in failed.values():
        complain(f"dinov3_lite: {reason}")
    if drawn:
        save_picture(_draw(drawn, args.query, f"{model.config.name}, weights {model.weights_id}"), args.picture)
        if not args.json:
            say(f"{args.picture}: the first three principal components of the patch tokens")
    return 1 if failed else 0


def _encode(
    args: argparse.Namespace, model: Backbone, processor: ImageProcessor, rows: RowWriter
) -> tuple[list[str], dict[str, str], list[tuple[Photo, Tensor]]]:
    """A row for each photo that can be read. Returns the rows' files, the others with what is wrong with them, and, if
    it will be drawn, each photo with its feature map.
    """
    files: list[str] = []
    failed: dict[str, str] = {}
    drawn: list[tuple[Photo, Tensor]] = []
    size = processor.size  # None: the first photo's, which all others must have
    for file in progress(args.photos, unit=" photos"):
        try:
            photo = _read(file, processor, args)
            found = (photo.pixels.shape[1], photo.pixels.shape[2])
            size = size or found
            if found != size:
                raise ValueError(f"{file}: is {found} pixels high and wide, those before {size}: give a --size for all")
        except (OSError, ValueError, MemoryError) as error:
            failed[str(file)] = sentence(error)
            continue
        out = model(photo.pixels[None].to(args.device))
        rows.add({name: getattr(out, name)[0] for name in ("cls_token", "register_tokens", "feature_map")})
        files.append(str(file))
        if args.picture:
            drawn.append((photo._replace(pixels=photo.pixels[:0]), out.feature_map[0].cpu()))
    return files, failed, drawn


def _check_outputs(args: argparse.Namespace) -> None:
    """What would otherwise fail after all the work, or overwrite what is read."""
    from ..tasks.data import check_output

    for output in filter(None, (args.output, args.picture)):
        check_output(output, args.photos, args.model)
    if args.picture:
        from ..tasks.drawing import picture_format

        if args.picture.resolve() == args.output.resolve():
            raise ValueError(f"{args.picture}: is the file for the features too: give another name")
        picture_format(args.picture)


def _processor(args: argparse.Namespace) -> ImageProcessor:
    from ..checkpoint.hub import locate
    from ..checkpoint.preprocessing import read_preprocessing
    from ..image import ImageProcessor, is_satellite

    path = locate(args.model)
    if read_preprocessing(path) is None:
        processor = ImageProcessor.of_release(path)
        whose = "the satellite pictures'" if is_satellite(path) else "ImageNet's"
        complain(f"dinov3_lite: {path}: says nothing of preprocessing: {whose} mean and std are taken")
    else:
        processor = ImageProcessor.from_pretrained(path)
    return replace(processor, size=args.size or processor.size, exif=args.exif)


def _read(file: Path, processor: ImageProcessor, args: argparse.Namespace) -> Photo:
    from ..pixels import opened
    from ..visualize import panel_size

    with opened(file, processor.num_channels, processor.exif) as picture:
        height, width = picture.height, picture.width
        if args.query and not (args.query[0] < width and args.query[1] < height):
            x, y = args.query
            raise ValueError(f"--query {x},{y} is outside {file}, which is {width} x {height} pixels")
        thumbnail = None
        if args.picture:
            channels = processor.num_channels
            size, mean, std = panel_size(height, width), (0.0,) * channels, (1.0,) * channels
            colours = replace(processor, size=size, mean=mean, std=std, rescale_factor=1 / 255)
            thumbnail = colours.prepare(picture)[:3].expand(3, -1, -1).permute(1, 2, 0)
        return Photo(file, height, width, processor.prepare(picture), thumbnail)


def _tell(
    args: argparse.Namespace, model: Backbone, processor: ImageProcessor, shapes: dict[str, tuple[int, ...]]
) -> None:
    n, C, h, w = shapes["feature_map"]
    R, (height, width) = model.n_storage_tokens, processor.size or (h * model.stride, w * model.stride)
    count = f"{n} photo{'s' * (n > 1)}" if n == len(args.photos) else f"{n} of {len(args.photos)} photos"
    say(f"{model.config.name}  weights {model.weights_id}")
    say(f"{count} at {height} x {width} px: 1 CLS + {R} registers + {h} x {w} patches = {1 + R + h * w} tokens of {C}")
    say(f"{args.output}: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def _draw(drawn: list[tuple[Photo, Tensor]], query: tuple[int, int] | None, caption: str) -> Image.Image:
    import torch

    from .. import visualize

    feature_maps = torch.stack([feature_map for _, feature_map in drawn])
    every, foreground = visualize.pca_colours(feature_maps), visualize.foreground_pca(feature_maps)
    rows = []
    for (photo, feature_map), colours, front in zip(drawn, every, foreground, strict=True):
        row = [(photo.thumbnail, photo.file.name), (colours, f"PCA, {caption}")]
        row.append((front, "PCA of the foreground, whitened"))
        if query:
            x, y = query
            _, h, w = feature_map.shape
            similar = visualize.similarity(feature_map, y * h // photo.height, x * w // photo.width)
            row.append((similar.clamp(0, 1), f"cosine similarity to the patch at {x},{y}"))
        rows.append(row)
    return visualize.draw(rows)
