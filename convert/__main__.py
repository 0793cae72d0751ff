"""`python -m convert SOURCE`: exit status 0 if all was converted, 1 on bad input, 2 on bad usage."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from pathlib import Path

from dinov3_lite.files import checkpoint_files
from dinov3_lite.layouts import LAYOUTS
from dinov3_lite.weights import CARRIED, DTYPES, LITE_FILE, locate, open_source

from . import MAX_SHARD_SIZE, convert_opened
from .describe import as_text, describe, summary
from .plan import carried_tensors
from .verify import verify


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        sources = _models(locate(args.source, revision=args.revision))
    except (OSError, ValueError) as error:
        return _fail(error)
    failed = []
    for source in sources:
        try:
            if args.inspect:
                description = describe(open_source(source))
                print(json.dumps(description, indent=2) if args.json else as_text(description))
            else:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    _convert(
                        source, args, args.output / source.name if args.output and len(sources) > 1 else args.output
                    )
                for warning in caught:
                    print(f"convert: warning: {warning.message}", file=sys.stderr)
        except (OSError, ValueError) as error:
            failed.append(source)
            _fail(error)
    if failed and len(sources) > 1:
        print(f"convert: {len(failed)} of {len(sources)} failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def _convert(source: Path, args: argparse.Namespace, output: Path | None) -> None:
    start = time.perf_counter()
    opened = open_source(source)
    dtype = DTYPES.get(args.dtype)
    path = convert_opened(
        opened,
        output,
        to=args.to,
        dtype=dtype,
        force=args.force,
        allow_loss=args.allow_loss,
        max_shard_size=args.max_shard_size,
        progress=not args.quiet,
    )
    seconds = time.perf_counter() - start
    verified = f"  {verify(opened, path, dtype)}" if args.verify else ""
    if not args.quiet:
        print(summary(opened, open_source(path), seconds) + verified)
        kept = {name.removeprefix(CARRIED) for name in carried_tensors(opened, LAYOUTS[args.to])}
        for item in (item for item in opened.left_out if item.split("'")[1] not in kept):
            print(f"  left out {item}")


def _models(path: Path) -> list[Path]:
    """The source itself, or the model folders in it if it is a folder of them."""
    if path.is_file() or _is_model(path):
        return [path]
    return sorted(p for p in path.iterdir() if p.is_dir() and _is_model(p)) or [path]


def _is_model(folder: Path) -> bool:
    try:
        return bool(checkpoint_files(folder)) or (folder / LITE_FILE).is_file()
    except ValueError:  # a damaged index: a model all the same, which fails by itself
        return True


def _fail(error: Exception) -> int:
    print(f"convert: {error}", file=sys.stderr)
    return 1


def _size(text: str) -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d+)(KB|MB|GB)?", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB")
    return int(match[1]) * units[match[2] or ""]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert DINOv3 checkpoints between the layouts of transformers, Meta, timm and dinov3-lite.",
    )
    add = parser.add_argument
    add("source", help="a checkpoint folder, a folder of such folders, a .safetensors or .pth file, or a hub id")
    add("--output", type=Path, help="file or folder to write to (default: beside the source)")
    add("--to", choices=LAYOUTS, default="lite", help="layout to write (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="dtype of the weights (default: the source's own)")
    add(
        "--max-shard-size",
        type=_size,
        default=MAX_SHARD_SIZE,
        metavar="5GB",
        help="size of one file of transformers' layout",
    )
    add("--verify", action="store_true", help="open again what was written, compare it with the source, run both")
    add("--allow-loss", action="store_true", help="go on where the layout can't hold something of the source")
    add("--inspect", action="store_true", help="say what the source is, and write nothing")
    add("--json", action="store_true", help="with --inspect: as JSON")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--force", action="store_true", help="replace existing output")
    add("--quiet", action="store_true", help="no progress bar and no summary")
    return parser


if __name__ == "__main__":
    sys.exit(main())
