"""`features PHOTO ... --model CHECKPOINT`: features of pictures, saved and drawn."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import progress, say
from .arguments import MODEL, add_device_and_dtype, point, size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Save the CLS token, the register tokens and the feature map of each photo."
    parser.epilog = "example:\n  %(prog)s photo.jpg --model checkpoint --picture pca.png --query 100,80"
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--output", type=Path, default=Path("features.safetensors"), help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="draw the photo beside the principal components of its patches")
    parser.add_argument("--query", type=point, metavar="X,Y", help="draw the similarity to the patch at this pixel too")
    parser.add_argument(
        "--size", type=size, metavar="N or HxW", help="resize to this many pixels (default: the model's)"
    )
    add_device_and_dtype(parser)


def run(args: argparse.Namespace) -> None:
    if args.query and not args.picture:
        raise argparse.ArgumentError(None, "--query is drawn into the picture: give --picture too")
    import torch
    from safetensors.torch import save_file

    from ..checkpoint import DTYPES
    from ..image import ImageProcessor
    from ..loading import load

    _check_outputs(args)
    model = load(args.model, dtype=DTYPES.get(args.dtype), device=args.device)
    processor = ImageProcessor.from_pretrained(args.model)
    if args.size:
        processor = replace(processor, size=args.size)
    say(f"{model.config.name}  weights {model.weights_id}")

    outputs = []
    with torch.inference_mode():
        for file in progress(args.photos, unit="photo"):
            photo = _open(file)
            _check_query(args.query, file, photo)
            pixel_values = processor(photo)["pixel_values"]
            outputs.append(model(pixel_values.to(args.device)))

    R, (h, w) = model.n_storage_tokens, outputs[0].grid
    height, width = pixel_values.shape[-2:]
    say(
        f"{len(outputs)} photo{'s' * (len(outputs) > 1)} at {height} x {width} px: "
        f"1 CLS + {R} registers + {h} x {w} patches = {1 + R + h * w} tokens of {model.embed_dim}"
    )
    feature_maps = torch.cat([out.feature_map for out in outputs])
    tensors = {
        "cls_token": torch.cat([out.cls_token for out in outputs]),
        "register_tokens": torch.cat([out.register_tokens for out in outputs]),
        "feature_map": feature_maps,
    }
    metadata = {
        "files": json.dumps([str(file) for file in args.photos]),
        "model": model.config.name,
        "weights": model.weights_id,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, args.output, metadata)
    say(f"{args.output}: " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()))
    if args.picture:
        caption = f"{model.config.name}, weights {model.weights_id}"
        _draw(args, feature_maps.cpu(), caption).save(args.picture)
        say(f"{args.picture}: the first three principal components of the patch tokens")


def _check_outputs(args: argparse.Namespace) -> None:
    """What would otherwise fail after all the work."""
    for output in filter(None, (args.output, args.picture)):
        if not output.parent.is_dir():
            raise FileNotFoundError(f"{output}: there is no folder {output.parent}: make it first")
        if output.resolve() in {photo.resolve() for photo in args.photos}:
            raise ValueError(f"{output}: is one of the photos: give another name")
    if args.picture:
        from PIL import Image

        if args.picture.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{args.picture}: unknown type of picture: name it .png or .jpg")


def _check_query(query: tuple[int, int] | None, file: Path, photo: Image.Image) -> None:
    if query and not (query[0] < photo.width and query[1] < photo.height):
        raise ValueError(
            f"--query {query[0]},{query[1]} is outside {file}, which is {photo.width} x {photo.height} pixels"
        )


def _open(file: Path) -> Image.Image:
    """A photo as people see it: in RGB, turned as its camera was held."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _draw(args: argparse.Namespace, feature_maps: Tensor, caption: str) -> Image.Image:
    from .. import picture

    rows: list[list[tuple[Image.Image | Tensor, str]]] = []
    for file, colours, feature_map in zip(args.photos, picture.pca_colours(feature_maps), feature_maps, strict=True):
        photo = _open(file)
        thumbnail = photo.resize(
            (max(1, round(picture.PANEL_HEIGHT * photo.width / photo.height)), picture.PANEL_HEIGHT)
        )
        row: list[tuple[Image.Image | Tensor, str]] = [(thumbnail, file.name), (colours, f"PCA, {caption}")]
        if args.query:
            x, y = args.query
            _, h, w = feature_map.shape
            map_ = picture.similarity(feature_map, y * h // photo.height, x * w // photo.width)
            row.append((map_.clamp(0, 1), f"cosine similarity to the patch at {x},{y}"))
        rows.append(row)
    return picture.draw(rows)
