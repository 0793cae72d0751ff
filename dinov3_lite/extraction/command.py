"""`python -m dinov3_lite extract`."""

from __future__ import annotations

import argparse
import json

from ..commands.arguments import MODEL, image_size
from ..console import complain, say
from .remote import folder_at

DESCRIPTION = (
    "Features of all pictures of INPUT, in a folder of numpy files. The same command again goes on where it was. Exit "
    "status: 0 all done, 1 bad input, 2 bad usage, 3 some shards failed (listed), 130 and 143 stopped by Ctrl-C and "
    "SIGTERM."
)
EXAMPLE = """example:
  %(prog)s photos/ --model checkpoint --output features --outputs cls_token patch_mean --dtype bfloat16

on 8 GPUs:
  torchrun --nproc-per-node 8 -m dinov3_lite extract 'data-{000..999}.tar' --model checkpoint --output out

how far it is:
  %(prog)s --status features"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLE
    parser.add_argument(
        "input", nargs="*", metavar="INPUT",
        help="a folder, a list of paths (.txt), pictures, tars, parquet files, patterns ('a-{000..099}.tar') or URLs",
    )  # fmt: skip
    parser.add_argument("--model", help=MODEL)
    parser.add_argument("--output", metavar="OUT", help="the folder to fill, or a URL in an object store (s3://...)")

    what = parser.add_argument_group("what is computed")
    what.add_argument(
        "--outputs", nargs="+", default=["cls_token"], metavar="OUTPUT",
        help="cls_token (the default), patch_mean, patch_tokens, register_tokens",
    )  # fmt: skip
    what.add_argument(
        "--blocks", nargs="+", type=int, metavar="N", help="the blocks whose outputs are taken (default: the last)"
    )
    what.add_argument("--size", type=_size, metavar="N|HxW|native", help="pixels (default: the model's)")
    what.add_argument("--dtype", help="of the weights: float32, bfloat16, float16 (default: the checkpoint's own)")
    what.add_argument("--store", default="float16", help="dtype of the files: float16 (the default) or float32")
    what.add_argument("--batch-size", type=int, metavar="N", help="pictures a forward (default: 64; native: 8)")
    what.add_argument(
        "--shard-size", type=int, metavar="N", help="pictures a shard (default: 4096; patch tokens: 1024)"
    )
    what.add_argument(
        "--resize", default="float32", help="float32 (the default), or uint8: rounded to whole pixel values, faster"
    )
    what.add_argument(
        "--scaled-decoding",
        action="store_true",
        help="decode large JPEGs at a fraction of their size: faster, not exact",
    )
    what.add_argument("--column", help="the one of parquet files that holds pictures, as bytes or paths")

    how = parser.add_argument_group("how")
    how.add_argument("--device", help="default: a GPU if there is one")
    how.add_argument("--decode-threads", type=int, metavar="T", help="default: one a core")
    how.add_argument(
        "--max-rejects", default="50%", metavar="N|P%",
        help="fail a shard with more bad pictures than this (default: %(default)s; a percentage always allows ten)",
    )  # fmt: skip
    how.add_argument(
        "--part", metavar="I/N", help="do one part of N (default: as torchrun, SLURM or Kubernetes tell it)"
    )
    how.add_argument(
        "--mesh", metavar="tp=N", help="under torchrun: N processes share one model, which is too large for one"
    )
    how.add_argument("--engine", default="local", help="local (the default) or ray")
    how.add_argument("--workers", type=int, metavar="N", help="Ray's actors (default: one a GPU, or a core)")
    how.add_argument("--quiet", action="store_true", help="no bar")

    hub = parser.add_argument_group("where the model is")
    hub.add_argument("--subfolder", metavar="FOLDER", help="of --model")
    hub.add_argument("--revision", help="of a hub id: a branch, tag or commit")
    hub.add_argument("--cache-dir", help="where downloads of a hub id are kept (default: huggingface_hub's cache)")
    hub.add_argument("--local-files-only", action="store_true", help="download nothing: a hub id must be in the cache")

    then = parser.add_argument_group("of a folder that is there")
    then.add_argument("--status", nargs="?", const="", metavar="OUT", help="how far it is, and what failed")
    then.add_argument("--json", action="store_true", help="with --status: as one JSON object, for programs")
    then.add_argument("--verify", nargs="?", const="", metavar="OUT", help="read every file and compare its SHA-256")
    then.add_argument("--to", metavar="FORMAT", help="--to parquet|webdataset|lance OUT DEST: write it in that format")


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    if args.status is not None:
        return _status(_folder(args, args.status), args.json)
    if args.verify is not None:
        return _verify(_folder(args, args.verify))
    if args.to is not None:
        return _convert(args)
    if not args.input or not args.model or not args.output:
        raise argparse.ArgumentError(None, "give INPUT, --model and --output, or one of --status, --verify and --to")
    return _extract(args)


def _extract(args: argparse.Namespace) -> int:
    from .engines import ShardsFailed, Stopped, extract

    try:
        store = extract(
            args.input, args.model, args.output, outputs=args.outputs, blocks=args.blocks, size=args.size,
            dtype=args.dtype, store=args.store, batch_size=args.batch_size, shard_size=args.shard_size,
            resize=args.resize, scaled_decoding=args.scaled_decoding, column=args.column, device=args.device,
            decode_threads=args.decode_threads, max_rejects=args.max_rejects, part=args.part, mesh=args.mesh,
            engine=args.engine, workers=args.workers, progress=False if args.quiet else None, subfolder=args.subfolder,
            revision=args.revision, cache_dir=args.cache_dir, local_files_only=args.local_files_only,
        )  # fmt: skip
    except ShardsFailed as error:
        complain(f"dinov3_lite: {' '.join(str(error).split())}")
        _status(args.output)
        return 3
    except Stopped as error:
        complain(f"dinov3_lite: {error}")
        return 143
    except KeyboardInterrupt:
        complain("dinov3_lite: stopped by Ctrl-C: the same command goes on, and does the shard at hand again")
        return 130
    say(repr(store))
    if count := len(store.rejects):
        first = store.rejects[0]
        pictures = "1 picture has no row:" if count == 1 else f"{count} pictures have no row, the first"
        say(f"{pictures} {first['key']!r}: {first['reason']}; see store.rejects")
    return 0


def _folder(args: argparse.Namespace, named: str) -> str:
    folder = named or args.output or (args.input[0] if len(args.input) == 1 else None)
    if not folder:
        raise argparse.ArgumentError(None, "name the folder: --status OUT, --verify OUT")
    return folder


def _status(path: str, as_json: bool = False) -> int:
    from .check import status

    found = status(path)
    if as_json:
        say(json.dumps(found))
        return 3 if found["failed"] else 0
    say(f"{path}: {found['done']} of {found['shards']} shards, {found['at_work']} being worked on")
    of = f" of {found['pictures']} pictures" if found["pictures"] else ""
    say(f"{found['rows']} rows and {found['rejects']} rejects{of}")
    if found["left_out"]:
        say("not named as pictures: " + ", ".join(f"{count} {what}" for what, count in found["left_out"].items()))
    for shard, reason in found["failed"].items():
        say(f"shard {shard} failed: {reason}")
    return 3 if found["failed"] else 0


def _verify(path: str) -> int:
    from .check import verify

    faulty: dict[int, str] = {}
    for shard, fault in verify(path):
        say(f"shard {shard}: {fault}")
        faulty.setdefault(shard, fault)
    done = len(folder_at(path).done())
    if faulty:
        markers = "shards/" + ", shards/".join(f"{shard:08d}.json" for shard in faulty)
        say(f"{path}: {len(faulty)} of {done} shards are damaged: delete {markers} and index.json, and extract again")
        return 3
    say(f"{path}: {done} shards are as they were written")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .formats import convert

    folders = [*([args.output] if args.output and len(args.input) == 1 else []), *args.input]
    if len(folders) != 2:
        raise argparse.ArgumentError(None, f"--to {args.to} takes two folders: OUT and DEST")
    say(convert(folders[0], folders[1], args.to))
    return 0


def _size(text: str) -> tuple[int, int] | str:
    return text if text == "native" else image_size(text)
