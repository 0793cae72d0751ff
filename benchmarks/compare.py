"""Ours beside what people would use instead: one command, one table.

    python benchmarks/compare.py [forward] [--variants vitb16] [--rows 224x1 224x8 512x1] [--dtypes float32]
                                 [--rounds 7] [--peers NAME ...] [--device cpu|cuda] [--threads N] [--save NAME]
    python benchmarks/compare.py --compare old.json new.json
    python benchmarks/compare.py startup | conversion | features | parity | growth | rope_attention | layer_norm
                                 | swiglu [options of that script]

A row is a variant (a ViT's, or convnext-tiny and its kin), a resolution times a batch, and a dtype, all peers on the
same weights. Outputs are checked against transformers' before anything is timed; a peer that is missing or fails shows
its reason. Rounds are interleaved in rotated order, ratios taken round by round. Writes benchmarks/results/NAME.json;
page.py makes tables and charts of it.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import environment, headline, peak_gflops, save
from peers import PEERS, Features, Peer, write_checkpoint
from timing import in_a_child, interleaved, median_ratio, process_mib, relative_difference, spread

from dinov3_lite import DINOv3Config, DINOv3ConvNeXtConfig, load
from dinov3_lite.config import config_from_name

OTHERS = ("startup", "conversion", "features", "rope_attention", "layer_norm", "swiglu", "parity", "growth")
REFERENCE = "transformers, sdpa"
# How far outputs may lie from the reference's, relative: a few times what dtypes and other roundings explain.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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
    parser.add_argument("command", nargs="?", default="forward", choices=["forward"])
    parser.add_argument("--variants", nargs="+", default=["vitb16"])
    parser.add_argument("--rows", nargs="+", default=["224x1", "224x8", "512x1"], metavar="PIXELSxBATCH")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--peers", nargs="+", default=[peer.name for peer in PEERS], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", default="compare", metavar="NAME", help="of the files under benchmarks/results/")
    parser.add_argument("--compare", nargs=2, metavar="FILE", help="print the ratio of each time in two results")
    parser.add_argument("--memory-of", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def forward(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    packages = ("timm", "onnxruntime", "openvino")
    result: dict[str, Any] = {"rows": []}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for variant in args.variants:
            checkpoint = write_checkpoint(Path(folder) / variant, variant)
            for dtype in (getattr(torch, name) for name in args.dtypes):
                peers = [p for p in PEERS if p.name in args.peers and args.device in p.devices and dtype in p.dtypes]
                for pixels, batch in (map(int, row.split("x")) for row in args.rows):
                    row = measure(peers, checkpoint, variant, pixels, batch, dtype, device, args.rounds)
                    result["rows"].append(row)
                    print(table({"rows": [row]}), absent({"rows": [row]}), sep="\n", flush=True)
    result = {"environment": environment(*packages), **result}
    save(args.save, result)
    print("\n" + headline(result), table(result), absent(result), sep="\n\n")


def measure(
    peers: list[Peer],
    checkpoint: Path,
    variant: str,
    pixels: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """One row of the result: seconds a round of each peer, why others are missing, and the machine's peak meanwhile."""
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    calls: dict[str, Features] = {}
    missing: dict[str, str] = {}
    reference = reference_features(checkpoint, dtype, device)(images)
    for peer in peers:
        try:
            call = peer.build(checkpoint, dtype, device)
            difference = relative_difference(call(images), reference)
        except Exception as error:
            missing[peer.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if difference > AGREEMENT[dtype]:
            missing[peer.name] = f"computes other features: relative difference {difference:.2g}"
        else:
            calls[peer.name] = call
    before = peak_gflops(dtype, device)
    seconds = interleaved({name: lambda call=call: call(images) for name, call in calls.items()}, rounds)
    after = peak_gflops(dtype, device)
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "variant": variant,
        "pixels": pixels,
        "batch": batch,
        "dtype": dtype_name,
        "gflop": batch * gflop(config_from_name(variant), pixels),
        "peak GFLOP/s": max(before, after),
        "seconds": seconds,
        "peak MiB": {name: peak_of(name, checkpoint, pixels, batch, dtype_name, device) for name in calls},
        "missing": missing,
    }


def reference_features(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> Features:
    """What outputs are compared with: transformers', or our own where transformers is not installed."""
    try:
        return next(peer for peer in PEERS if peer.name == REFERENCE).build(checkpoint, dtype, device)
    except ImportError:
        model = load(checkpoint, dtype=dtype).to(device)
        if hasattr(model, "attention"):
            model.attention = "eager"
        return lambda images: model(images).last_hidden_state


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


def peak_of(*words: object) -> float:
    """Peak MiB above `import torch` of a process that loads and runs once; of the GPU, where it runs there."""
    try:
        return float(in_a_child(__file__, "--threads", torch.get_num_threads(), "--memory-of", *words))
    except RuntimeError:
        return float("nan")


def memory_of(name: str, folder: str, pixels: str, batch: str, dtype_name: str, device: str) -> float:
    before, dtype = process_mib("VmHWM"), getattr(torch, dtype_name)
    images = torch.zeros(int(batch), 3, int(pixels), int(pixels), dtype=dtype, device=device)
    with torch.no_grad():
        next(p for p in PEERS if p.name == name).build(Path(folder), dtype, torch.device(device))(images)
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else process_mib("VmHWM") - before


# ---- tables


def label(row: dict[str, Any]) -> str:
    return f"{row['variant']}, {row['pixels']} px, batch {row['batch']}, {row['dtype']}"


def table(result: dict[str, Any]) -> str:
    """A line a row and peer."""
    lines = ["| | ms (quartiles) | time, ratio to ours | of the matrix-product peak | peak MiB |", "|---" * 5 + "|"]
    for row in result["rows"]:
        medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
        for name, median in medians.items():
            ratio = f"{median_ratio(row['seconds'][name], row['seconds']['ours']):.2f}" if "ours" in medians else ""
            share = f"{row['gflop'] / median / row['peak GFLOP/s']:.0%}"
            cells = [spread(row["seconds"][name]), ratio, share, f"{row['peak MiB'][name]:.0f}"]
            lines.append(f"| {label(row)}: {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def absent(result: dict[str, Any]) -> str:
    """A line for each row's peer that could not be run, with the reason: for whoever measures, not for the page."""
    return "\n".join(f"{label(row)}: {name}: {why}" for row in result["rows"] for name, why in row["missing"].items())


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The time of each row and peer that both results have, new to old."""
    lines = ["| | old ms | new ms | new / old |", "|---" * 4 + "|"]
    rows = {label(row): row for row in old["rows"]}
    for row in new["rows"]:
        for name, seconds in row["seconds"].items():
            before = rows.get(label(row), {"seconds": {}})["seconds"].get(name)
            if before:
                a, b = (1e3 * statistics.median(times) for times in (before, seconds))
                lines.append(f"| {label(row)}: {name} | {a:.1f} | {b:.1f} | {b / a:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
