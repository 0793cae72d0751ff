"""`fit DATA --model M --output HEAD`: a dense head on a frozen backbone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..console import complain, say
from .arguments import MODEL, add_device_and_dtype, add_json, image_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fit a dense head of about a million parameters to pictures and masks. The backbone is frozen. A tenth of the "
        "pairs is held out to choose the epoch by; a run that was stopped goes on when it is started again."
    )
    parser.epilog = (
        "example:\n  %(prog)s dataset/TrainDataset --model checkpoint --size 384 --output head.safetensors\n\n"
        "DATA holds a folder Image, Imgs, im or images, and one GT, gt, Mask or masks, with files of the same stems."
    )
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="a folder of pictures and masks, or several")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--output", required=True, type=Path, metavar="HEAD", help="the file to write, .safetensors")
    parser.add_argument(
        "--size", type=image_size, default=(384, 384), metavar="N or HxW", help="of pictures in training (default: 384)"
    )
    parser.add_argument("--epochs", type=int, default=20, help="times that every pair is seen (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of the head (default: %(default)s)")
    parser.add_argument(
        "--classes",
        type=int,
        default=1,
        metavar="K",
        help="masks hold the numbers of K classes (default: a foreground)",
    )
    parser.add_argument(
        "--unfreeze", type=int, default=0, metavar="N", help="train the backbone's last N blocks too (default: none)"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="of the pairs, for choosing (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the head and the crops (default: 0)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read pictures (default: 0)")
    add_device_and_dtype(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    import torch

    from ..tasks import Recipe, fit
    from .loading import load_model_and_processor

    if args.unfreeze and args.dtype not in (None, "float32"):
        raise argparse.ArgumentError(None, f"--unfreeze trains in float32: leave out --dtype {args.dtype}")
    recipe = Recipe(size=args.size, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    model, processor = load_model_and_processor(args, dtype=torch.float32 if args.unfreeze else None)
    weights = model.weights_id  # before blocks are fitted
    tell = complain if args.json else say
    tell(f"{model.config.name}  weights {weights}")
    fitted = fit(
        args.data,
        model,
        args.output,
        processor=processor,
        recipe=recipe,
        classes=args.classes,
        unfreeze=args.unfreeze,
        held_out=args.held_out,
        report=tell,
        workers=args.workers,
    )
    if args.json:
        about = {"model": model.config.name, "weights": weights, "epoch": fitted.best + 1, "history": fitted.history}
        say(json.dumps({"output": str(args.output), **about}))
        return
    figures = ", ".join(f"{name} {value:.4f}" for name, value in fitted.history[fitted.best].items() if name != "loss")
    size_ = args.output.stat().st_size / 1e6
    say(f"{args.output}: the head of epoch {fitted.best + 1}, {size_:.1f} MB; on the part held out {figures}")
