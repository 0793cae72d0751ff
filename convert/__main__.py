"""`python -m convert SOURCE`: exit status 0 if all was converted, 1 on bad input, 2 on bad usage."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov3_lite.checkpoint import DTYPES, open_checkpoint, weights_in
from dinov3_lite.checkpoint.hub import locate
from dinov3_lite.checkpoint.layouts import LAYOUTS
from dinov3_lite.checkpoint.words import short
from dinov3_lite.console import HelpFormatter, called_as, complain, exit_status, flush, say, sentence

from .describe import describe, describe_as_text, describe_plan, plan_as_text, summary, summary_as_text
from .plan import MAX_SHARD_SIZE, Plan, check, check_prefix, check_values, make_plan, parse_size
from .verify import verify
from .writer import write

EXAMPLE = """example:
  %(prog)s facebook/dinov3-vitb16-pretrain-lvd1689m --output vitb16.safetensors
  %(prog)s checkpoint_folder --to meta --dry-run
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        args = _parser().parse_args(argv)
        return exit_status("convert", lambda: _run_all(args))
    finally:
        flush()


def _run_all(args: argparse.Namespace) -> int:
    path = locate(
        args.source,
        subfolder=args.subfolder,
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
    )
    sources = _models(path)
    failed = []
    for source in sources:
        output = args.output / source.name if args.output and len(sources) > 1 else args.output
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                _run(source, output, args)
            for warning in caught:
                complain(f"convert: warning: {warning.message}")
        except (OSError, ValueError) as error:
            failed.append(source)
            complain(f"convert: {sentence(error)}")
    if failed and len(sources) > 1:
        complain(f"convert: {len(failed)} of {len(sources)} failed: {', '.join(map(str, failed))}")
    return 1 if failed else 0


def _run(source: Path, output: Path | None, args: argparse.Namespace) -> None:
    """One model: plan, then say what it is, say what would be done, or do it."""
    start = time.perf_counter()
    opened = open_checkpoint(source, original=True, prefix=args.prefix)
    plan = make_plan(opened, output, to=args.to, dtype=DTYPES.get(args.dtype), max_shard_size=args.max_shard_size)
    if args.inspect:
        _say(describe(plan), describe_as_text, args)
        return
    check_prefix(args.prefix, output)
    check(plan, force=args.force, allow_loss=args.allow_loss)
    if args.dry_run:
        check_values(plan)
        _say(describe_plan(plan), plan_as_text, args)
        return
    write(plan, progress=not args.quiet)
    _say(_done(plan, start, args.verify), summary_as_text, args)


def _done(plan: Plan, start: float, verifies: bool) -> dict[str, Any]:
    done = summary(plan, open_checkpoint(plan.path, original=True), time.perf_counter() - start)
    return {**done, "verified": str(verify(plan))} if verifies else done


def _say(content: dict[str, Any], as_text: Callable[[dict[str, Any]], str], args: argparse.Namespace) -> None:
    if not args.quiet:
        say(json.dumps(content, indent=2) if args.json else as_text(content))


def _models(path: Path) -> list[Path]:
    """The source itself, or the model folders in it if it is a folder of them."""
    if path.is_file() or _is_model(path):
        return [path]
    return sorted(p for p in path.iterdir() if p.is_dir() and _is_model(p)) or [path]


def _is_model(folder: Path) -> bool:
    try:
        return any(weights_in(folder))
    except ValueError:  # a damaged index: a model all the same, which fails by itself
        return True


def _size(text: str) -> int:
    try:
        return parse_size(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{short(text)} is not a size such as 5GB") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=called_as("dinov3-convert", "convert"),
        description="Convert DINOv3 checkpoints between the layouts of transformers, Meta, timm and dinov3-lite.",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
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
        help="size of one file of transformers' layout (default: %(default)s bytes)",
    )
    add("--verify", action="store_true", help="open again what was written, compare it with the source, run both")
    add("--allow-loss", action="store_true", help="go on where the layout can't hold something of the source")
    add("--inspect", action="store_true", help="say what the source is, and write nothing")
    add("--dry-run", action="store_true", help="say what would be written where, and write nothing")
    add("--json", action="store_true", help="say it as JSON, one object a model")
    add("--prefix", help="what stands before the names of the backbone that is meant, if the source holds several")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--subfolder", help="where the checkpoint is within the source (default: it is the source itself)")
    add("--cache-dir", type=Path, help="where downloads of a hub id are kept (default: huggingface_hub's cache)")
    add("--local-files-only", action="store_true", help="download nothing: a hub id must be in the cache")
    add("--force", action="store_true", help="replace existing output")
    add("--quiet", action="store_true", help="no progress bar and no summary")
    return parser


if __name__ == "__main__":
    sys.exit(main())
