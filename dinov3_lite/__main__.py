"""`python -m dinov3_lite features PHOTO ... --model CHECKPOINT`, `export CHECKPOINT --format onnx`, `sample FOLDER`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from . import DINOv3ViT, ImageProcessor, picture
from .checkpoint import DTYPES
from .export import FORMATS, OPSET, UNCHECKED, export
from .sample import write_sample

if TYPE_CHECKING:
    from PIL import Image


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is features and args.query and not args.picture:
        parser.error("--query is drawn into the picture: give --picture too")
    try:
        args.run(args)
    except (OSError, ValueError, RuntimeError, AssertionError, ImportError) as error:  # torch's for a missing device
        print(f"dinov3_lite: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def sample(args: argparse.Namespace) -> None:
    write_sample(args.folder)
    print(f"{args.folder}: a ViT-S checkpoint in transformers' layout, with made weights (not trained)")


def features(args: argparse.Namespace) -> None:
    _check_outputs(args)
    model = DINOv3ViT.from_pretrained(args.model, dtype=DTYPES.get(args.dtype), device=args.device)
    processor = ImageProcessor.from_pretrained(args.model)
    if args.size:
        processor = replace(processor, size=args.size)
    print(f"{model.config.name}  weights {model.weights_id}")

    outputs = []
    with torch.inference_mode():
        for file in tqdm(args.photos, unit="photo", disable=None if len(args.photos) > 1 else True):
            photo = _open(file)
            _check_query(args.query, file, photo)
            outputs.append(model(processor(photo)["pixel_values"].to(args.device)))

    R, (h, w) = model.config.num_register_tokens, outputs[0].grid
    height, width = h * model.patch_size, w * model.patch_size
    print(
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
    print(f"{args.output}: " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()))
    if args.picture:
        caption = f"{model.config.name}, weights {model.weights_id}"
        _draw(args, feature_maps.cpu(), caption).save(args.picture)
        print(f"{args.picture}: the first three principal components of the patch tokens")


def export_model(args: argparse.Namespace) -> None:
    model = DINOv3ViT.from_pretrained(args.model, dtype=DTYPES.get(args.dtype), device=args.device)
    output = args.output or Path(f"{model.config.name}{FORMATS[args.format].suffix}")
    print(f"{model.config.name}  weights {model.weights_id}")
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own code
        errors = export(model, output, args.format, args.size)
    size = sum(file.stat().st_size for file in output.parent.glob(f"{output.name}*"))
    kind = f"onnx, opset {OPSET}" if args.format == "onnx" else args.format
    print(f"{output}: {kind}, {size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s")
    for shape, error in errors.items():
        print(f"  images {' x '.join(map(str, shape))}: relative error to the model {error:.1e}")
    if not errors:
        print(f"dinov3_lite: warning: {output}: {UNCHECKED}", file=sys.stderr)


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


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def _point(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y in pixels of the photo")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dinov3_lite", description="DINOv3 features from the command line.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("features", help="features of photos, saved and drawn")
    command.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    command.add_argument("--model", required=True, help="a converted file, a checkpoint folder or a hub id")
    command.add_argument("--output", type=Path, default=Path("features.safetensors"), help="default: %(default)s")
    command.add_argument("--picture", type=Path, help="draw the photo beside the principal components of its patches")
    command.add_argument(
        "--query", type=_point, metavar="X,Y", help="draw the similarity to the patch at this pixel too"
    )
    command.add_argument(
        "--size", type=_size, metavar="N or HxW", help="resize to this many pixels (default: the model's)"
    )
    command.add_argument("--device", default="cpu", help="default: %(default)s")
    command.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's own)")
    command.set_defaults(run=features)

    command = commands.add_parser("export", help="write the model as one file for another runtime, and check it")
    command.add_argument("model", help="a converted file, a checkpoint folder or a hub id")
    command.add_argument(
        "--format", choices=FORMATS, required=True, help="onnx, torch.export's pt2, or compiled by AOTInductor"
    )
    command.add_argument("--output", type=Path, help="default: the variant's name, such as vitb16.onnx")
    command.add_argument(
        "--size", type=_size, metavar="N or HxW", help="fix the resolution (default: any multiples of the patch size)"
    )
    command.add_argument("--device", default="cpu", help="what aoti compiles for (default: %(default)s)")
    command.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's own)")
    command.set_defaults(run=export_model)

    command = commands.add_parser("sample", help="write a made checkpoint to try things with (not trained)")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=sample)
    return parser


if __name__ == "__main__":
    sys.exit(main())
