"""Ours beside what people would use instead: one command, one table.

    python benchmarks/compare.py [forward] [--variants vitb16] [--rows 224x1 224x8 512x1] [--dtypes float32]
                                 [--peers NAME ...] [--seconds 60] [--rounds 15] [--memory] [--folder FOLDER]
                                 [--device cpu|cuda] [--threads N] [--save NAME] [--again]
    python benchmarks/compare.py targets [the same options]
    python benchmarks/compare.py --compare old.json new.json
    python benchmarks/compare.py startup | conversion | features | parity | growth | rope_attention | layer_norm
                                 | swiglu [options of that script]

A row is a variant (a ViT's, or convnext-tiny and its kin), a resolution times a batch, and a dtype, all peers on the
same weights and images. Each peer's error is against float64, and is taken before anything is timed; a peer that is
missing, fails or computes something else shows its reason. Rounds are interleaved in rotated order, as many as fit into
--seconds a row, at most --rounds, at least one; ratios are taken round by round.

--memory measures no times but peaks, of each peer in a process of its own: a busy machine will do.
--folder keeps checkpoints, files for other runtimes, and float64's features for the next call.
`targets` is the table that the project holds itself to: ViT-S, B and L at 224, 512 and 1024 px, float32 and bfloat16.

Every row goes into benchmarks/results/NAME.json as soon as it is measured, in place of the same row there; page.py
makes tables and charts of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import runpy
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from compare_tables import absent, comparison, identity, table, warnings
from environment import environment, headline, opened, peak_gflops, save
from peers import PEERS, Features, Peer, ours, transformers_model, write_checkpoint
from timing import in_a_child, interleaved, once, process_mib, relative_difference
from torch import Tensor

from dinov3_lite import DINOv3Config, DINOv3ConvNeXtConfig
from dinov3_lite.config import config_from_name

OTHERS = ("startup", "conversion", "features", "rope_attention", "layer_norm", "swiglu", "parity", "growth")
PACKAGES = ("timm", "onnxruntime", "openvino")
# Errors that the dtype explains, relative to float64's features; above them something else is computed.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# A row whose round takes longer than these seconds gets one round, two calls of each peer: all rows take 20 minutes on
# two cores after a call with --memory and the same --folder, a third of it the two largest.
TARGETS = {
    "variants": ["vits16", "vitb16", "vitl16"],
    "rows": ["224x1", "224x8", "512x1", "1024x1"],
    "dtypes": ["float32", "bfloat16"],
    "peers": [p.name for p in PEERS if p.name not in ("ours, compiled", "transformers, eager attention")],
    "seconds": 12.0,
}

Row = dict[str, Any]


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in OTHERS:
        script = sys.argv.pop(1)
        runpy.run_path(str(Path(__file__).with_name(f"{script}.py")), run_name="__main__")
        return
    args = arguments()
    if args.compare:
        old, new = (json.loads(Path(file).read_text()) for file in args.compare)
        print(comparison(old, new))
    elif args.memory_of:
        print(memory_of(*args.memory_of))
    else:
        forward(args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="forward", choices=["forward", "targets"])
    parser.add_argument("--variants", nargs="+", default=["vitb16"])
    parser.add_argument("--rows", nargs="+", default=["224x1", "224x8", "512x1"], metavar="PIXELSxBATCH")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--peers", nargs="+", default=[peer.name for peer in PEERS], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a row's rounds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="the most that a row gets (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="peaks instead of times")
    parser.add_argument("--folder", type=Path, help="where checkpoints and other files are kept (default: nowhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", default="compare", metavar="NAME", help="of the file under benchmarks/results/")
    parser.add_argument("--again", action="store_true", help="drop the file's other rows, wherever they were measured")
    parser.add_argument("--compare", nargs=2, metavar="FILE", help="print the ratio of each time in two results")
    parser.add_argument("--memory-of", nargs=6, help=argparse.SUPPRESS)
    if "targets" in sys.argv[1:]:
        parser.set_defaults(**TARGETS)
    args = parser.parse_args()
    if unknown := {*args.peers} - {peer.name for peer in PEERS}:
        parser.error(f"no peer is called {' or '.join(map(repr, unknown))}: {', '.join(p.name for p in PEERS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def forward(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    result = opened(args.save, args.again)
    rows = {identity(row): row for row in result["rows"]}
    chosen = [peer for peer in PEERS if peer.name in args.peers and args.device in peer.devices]
    shown = []
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        for variant in args.variants:
            checkpoint = write_checkpoint((args.folder or Path(temporary)) / variant, variant)
            for pixels, batch in (map(int, row.split("x")) for row in args.rows):
                for dtype in (getattr(torch, name) for name in args.dtypes):
                    peers = [p for p in chosen if dtype in p.dtypes]
                    row = described(variant, pixels, batch, dtype)
                    if args.memory:
                        row |= peaks(peers, checkpoint, row, device)
                        if args.folder:  # so that the call for times finds all that needs no quiet machine
                            float64_features(checkpoint, pixels, batch, device)
                    else:
                        row |= times(peers, checkpoint, row, device, args.seconds, args.rounds)
                    row = rows[identity(row)] = rows.get(identity(row), {}) | row
                    shown.append(row)
                    result["environment"] |= environment(*PACKAGES)
                    result["rows"] = list(rows.values())
                    save(args.save, result)
                    print(table({"rows": [row]}), absent([row]), warnings([row]), sep="\n", flush=True)
    print("\n" + headline(result), table({"rows": shown}), absent(shown), warnings(shown), sep="\n\n")


def described(variant: str, pixels: int, batch: int, dtype: torch.dtype) -> Row:
    work = batch * gflop(config_from_name(variant), pixels)
    name = str(dtype).removeprefix("torch.")
    return {"variant": variant, "pixels": pixels, "batch": batch, "dtype": name, "gflop": work}


def times(
    peers: list[Peer], checkpoint: Path, row: Row, device: torch.device, seconds: float, most_rounds: int
) -> dict[str, Any]:
    """Each peer's error, its seconds in each round, and why others are missing.

    The call whose features are compared is the one that goes before a timing, so that this makes a round of its own.
    """
    dtype = getattr(torch, row["dtype"])
    images = made_images(row["pixels"], row["batch"]).to(device, dtype)
    expected = float64_features(checkpoint, row["pixels"], row["batch"], device)
    calls: dict[str, Features] = {}
    errors: dict[str, float] = {}
    first: dict[str, float] = {}
    missing: dict[str, str] = {}
    before = peak_gflops(dtype, device)
    for peer in peers:
        try:
            call = peer.build(checkpoint, dtype, device)
            error = relative_difference(call(images).cpu(), expected)
            one = once(lambda call=call: call(images))
        except Exception as reason:
            missing[peer.name] = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
            continue
        if error > AGREEMENT[peer.least or dtype]:
            missing[peer.name] = f"computes other features: {error:.2g} from float64's"
        else:
            calls[peer.name], errors[peer.name], first[peer.name] = call, error, one
    fitting = int(seconds / (2 * sum(first.values()))) if first else 0
    more = interleaved(
        {name: lambda call=call: call(images) for name, call in calls.items()}, min(fitting, most_rounds - 1)
    )
    after = peak_gflops(dtype, device)
    calls.clear()
    torch._dynamo.reset()  # compiled peers would stay
    gc.collect()
    return {
        "date": str(date.today()),
        "peak GFLOP/s": max(before, after),
        "seconds": {name: [one, *more[name]] for name, one in first.items()},
        "error": errors,
        "missing": missing,
    }


def made_images(pixels: int, batch: int) -> Tensor:
    """Images that every dtype holds exactly: what a dtype costs is then the model's, not the images'."""
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    return images.bfloat16().half().float()


def float64_features(checkpoint: Path, pixels: int, batch: int, device: torch.device) -> Tensor:
    """last_hidden_state (batch, N, C) in float64: transformers', or our own where transformers is not installed."""
    file = checkpoint / f"float64-{pixels}x{batch}.pt"
    if not file.exists():
        try:
            model = transformers_model(checkpoint, torch.float64)
        except ImportError:
            model = ours(checkpoint, torch.float64)
            if hasattr(model, "attention"):
                model.attention = "eager"
        images, model = made_images(pixels, batch).to(device, torch.float64), model.to(device)
        torch.save(torch.cat([model(image).last_hidden_state.cpu() for image in images.split(1)]), file)
    return torch.load(file)


def gflop(config: DINOv3Config | DINOv3ConvNeXtConfig, pixels: int) -> float:
    """Operations of the matrix products, and of a ConvNeXt's convolutions, of one image, in 1e9."""
    if isinstance(config, DINOv3ConvNeXtConfig):
        count, before = 0, config.num_channels * 4  # the stem's 4 x 4 pixels are two steps of 2 x 2
        for i, (C, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            P = (pixels // 4 // 2**i) ** 2
            count, before = count + P * (4 * before * C + depth * (49 * C + 8 * C**2)), C
        return 2 * count / 1e9
    P = (pixels // config.patch_size) ** 2
    N, C, F = P + config.num_prefix_tokens, config.hidden_size, config.intermediate_size
    embedding = P * config.num_channels * config.patch_size**2 * C
    block = N * (4 * C**2 + (3 if config.use_gated_mlp else 2) * C * F) + 2 * N**2 * C
    return 2 * (embedding + config.num_hidden_layers * block) / 1e9


# ---- memory, in a process of its own


def peaks(peers: list[Peer], checkpoint: Path, row: Row, device: torch.device) -> dict[str, Any]:
    """Each peer's peak MiB above its imports: of preparing, which is loading and all that follows, and one forward."""
    found, missing = {}, {}
    for peer in peers:
        try:
            peer.files(checkpoint, getattr(torch, row["dtype"]))  # what others wrote is not of its memory
            words = (peer.name, checkpoint, row["pixels"], row["batch"], row["dtype"], device)
            threads = ("--threads", torch.get_num_threads())
            found[peer.name] = float(in_a_child(__file__, *threads, "--memory-of", *words))
        except Exception as reason:
            missing[peer.name] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[-1]}"
    return {"peak MiB": found, "missing": missing}


def memory_of(name: str, folder: str, pixels: str, batch: str, dtype_name: str, device: str) -> float:
    before, dtype = process_mib("VmHWM"), getattr(torch, dtype_name)
    images = torch.zeros(int(batch), 3, int(pixels), int(pixels), dtype=dtype, device=device)
    with torch.no_grad():
        next(p for p in PEERS if p.name == name).build(Path(folder), dtype, torch.device(device))(images)
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else process_mib("VmHWM") - before


if __name__ == "__main__":
    main()
