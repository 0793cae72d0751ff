"""`export CHECKPOINT --format onnx`: a model as one file for another runtime."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

from ..console import complain, naming, say
from .arguments import MODEL, add_device_and_dtype, add_json, image_size

FORMATS = ("onnx", "pt2", "aoti")  # those of dinov3_lite.export, which imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a model as one file for another runtime, run that file, and compare it with the model."
    parser.epilog = "example:\n  %(prog)s checkpoint --format onnx --output vits16.onnx"
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="onnx, torch.export's pt2, or compiled by AOTInductor",
    )
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: the variant's name, such as vitb16.onnx)"
    )
    parser.add_argument(
        "--size",
        type=image_size,
        metavar="N or HxW",
        help="fix the resolution (default: any multiples of the patch size, any of a ConvNeXt)",
    )
    add_device_and_dtype(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from .. import export as exporting
    from ..checkpoint import DTYPES
    from ..loading import load

    model = load(args.model, dtype=DTYPES.get(args.dtype), device=args.device)
    output = args.output or Path(f"{model.config.name}{exporting.FORMATS[args.format].suffix}")
    start = time.perf_counter()
    with naming(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own code
        errors = exporting.export(model, output, args.format, args.size)
    files = [file for file in (output, output.with_name(f"{output.name}.data")) if file.exists()]
    size = sum(file.stat().st_size for file in files)
    if args.json:
        checked = [{"images": shape, "relative_error": error} for shape, error in errors.items()]
        about = {"model": model.config.name, "weights": model.weights_id, "format": args.format}
        written = {"output": str(output), "files": [str(file) for file in files], "bytes": size}
        say(json.dumps({**written, **about, "checked": checked}))
    else:
        kind = f"onnx, opset {exporting.OPSET}" if args.format == "onnx" else args.format
        say(f"{model.config.name}  weights {model.weights_id}")
        say(f"{output}: {kind}, {size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s")
        for shape, error in errors.items():
            say(f"  images {' x '.join(map(str, shape))}: relative error to the model {error:.1e}")
    if not errors:
        complain(f"dinov3_lite: warning: {output}: {exporting.UNCHECKED}")
