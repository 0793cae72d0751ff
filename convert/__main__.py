"""`python -m convert SOURCE`: exit status 0 if all was converted, 1 on bad input, 2 on bad usage."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from dinov3_lite.weights import Checkpoint, locate, open_source, weight_files

from . import convert_opened

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        sources = _models(locate(args.source))
    except (OSError, ValueError) as error:
        return _fail(error)
    status = 0
    for source in sources:
        output = args.output
        if output is not None and len(sources) > 1:
            output = output / source.name
        try:
            start = time.perf_counter()
            opened = open_source(source)
            path = convert_opened(
                opened,
                output,
                to=args.to,
                dtype=DTYPES.get(args.dtype),
                force=args.force,
                progress=not args.quiet,
            )
        except (OSError, ValueError) as error:
            status = _fail(error)
        else:
            if not args.quiet:
                print(summary(opened, path, time.perf_counter() - start))
    return status


def summary(opened: Checkpoint, path: Path, seconds: float) -> str:
    """One line on a conversion: variant, parameters, dtype, bytes, seconds, and what became what."""
    written = open_source(path)
    millions = sum(math.prod(stored.shape) for parts in written.sources.values() for stored in parts) / 1e6
    dtype = str(written.dtype).removeprefix("torch.")
    megabytes = path.stat().st_size / 1e6
    return (
        f"{written.config.name}  {millions:.1f} M parameters  {dtype}  {megabytes:.1f} MB  {seconds:.2f} s  "
        f"{opened.weights_id} -> {written.weights_id}  {path}"
    )


def _models(path: Path) -> list[Path]:
    """The source itself, or the model folders in it if it is a folder of them."""
    if path.is_file() or weight_files(path):
        return [path]
    return sorted(p for p in path.iterdir() if p.is_dir() and weight_files(p)) or [path]


def _fail(error: Exception) -> int:
    print(f"convert: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Make one self-describing file, dinov3_lite.safetensors, of a DINOv3 checkpoint.",
    )
    parser.add_argument(
        "source", help="a checkpoint folder, a folder of such folders, a .safetensors file, or a hub id"
    )
    parser.add_argument("--output", type=Path, help="file or folder to write to (default: beside the source)")
    parser.add_argument("--to", choices=["lite"], default="lite", help="layout to write (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the source's own)")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return parser


if __name__ == "__main__":
    sys.exit(main())
