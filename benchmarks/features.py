"""What stopping early, packing and windows are worth, beside what transformers and timm do.

    python benchmarks/features.py [--rounds 7] [--variant vitb16]

Intermediate layers: ours stop after the last block asked for, transformers' backbone keeps every state, timm's
forward_intermediates runs on unless told to stop. Packed: images of a realistic mix of sizes in one sequence, beside
padding them all to the largest and running them one by one. Windows: peak memory of a dense map against the picture's
size. Outputs are checked before anything is timed. Writes benchmarks/results/features.json, of which the README's
tables are made.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import environment, headline, save
from peers import import_timm, ours, timm_model, transformers_model, write_checkpoint
from timing import in_a_child, interleaved, peak_mib, relative_difference, spread
from torch import Tensor

from dinov3_lite import sliding_window_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variant", default="vitb16")
    parser.add_argument("--memory-of", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        what, checkpoint, *numbers = args.memory_of
        print(memory_of(what, Path(checkpoint), [int(number) for number in numbers]))
        return

    import_timm()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / args.variant, args.variant)
        small = write_checkpoint(Path(folder) / "vits16", "vits16")
        with torch.inference_mode():
            result = {
                "environment": environment("timm"),
                "variant": args.variant,
                "layers": {name: layers(checkpoint, blocks, args.rounds) for name, blocks in BLOCKS.items()},
                "packed": packed(small, args.rounds),
                "windows": windows(small),
            }
    save("features", result)
    print(headline(result))
    for name, text in tables(result).items():
        print(f"\n{name}\n\n{text}")


# ---- intermediate layers

BLOCKS = {"quarters: blocks 2, 5, 8, 11": [2, 5, 8, 11], "first half: blocks 2, 5": [2, 5]}
CONTENDERS = ("ours", "transformers", "timm")


def contender(name: str, checkpoint: Path, blocks: list[int]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Images to the normed maps (B, C, h, w) after `blocks`."""
    if name == "ours":
        model = ours(checkpoint)
        return lambda images: model.get_intermediate_layers(images, blocks, reshape=True)
    if name == "transformers":
        backbone = transformers_model(checkpoint, name="DINOv3ViTBackbone", out_indices=[b + 1 for b in blocks])
        return lambda images: backbone(images).feature_maps
    timms = timm_model(checkpoint)
    return lambda images: timms.forward_intermediates(images, blocks, norm=True, intermediates_only=True)


def layers(checkpoint: Path, blocks: list[int], rounds: int) -> dict:
    """Seconds a round and peak MiB of four normed maps at 224 px, batch 4, by contender."""
    images = torch.randn(4, 3, 224, 224)
    calls = {name: partial(contender(name, checkpoint, blocks), images) for name in CONTENDERS}
    for name, call in calls.items():
        for actual, expected in zip(call(), calls["transformers"](), strict=True):
            error = relative_difference(actual, expected)
            assert error < 1e-4, f"{name} computes other features: relative difference {error:.2g}"
    seconds = interleaved(calls, rounds)
    peak = {name: statistics.median(peak_of(name, checkpoint, *blocks) for _ in range(3)) for name in calls}
    return {name: {"seconds": seconds[name], "peak MiB": peak[name]} for name in calls}


# ---- packed

# Sixteen pictures, long side 448: landscapes and portraits of cameras and phones, panoramas, squares.
MIX = [(336, 448)] * 5 + [(448, 336)] * 3 + [(304, 448)] * 2 + [(256, 448)] * 2 + [(448, 256), (224, 448)]
MIX += [(448, 448)] * 2


def packed(checkpoint: Path, rounds: int) -> dict:
    """Seconds a round for the sixteen pictures, by way of running them."""
    images = [torch.randn(3, *size) for size in MIX]
    model, theirs = ours(checkpoint), transformers_model(checkpoint)
    height, width = (max(size[axis] for size in MIX) for axis in (0, 1))
    padded = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])
    calls = {
        "packed": lambda: model.forward_packed(images),
        "one by one": lambda: [model(image.unsqueeze(0)) for image in images],
        "padded to the largest": lambda: model(padded),
        "transformers, padded to the largest": lambda: theirs(padded),
        "transformers, one by one": lambda: [theirs(image.unsqueeze(0)) for image in images],
    }
    for out, alone in zip(calls["packed"](), calls["transformers, one by one"](), strict=True):
        error = relative_difference(out.last_hidden_state, alone.last_hidden_state)
        assert error < 1e-4, f"packed computes other features: relative difference {error:.2g}"
    p = model.patch_size
    tokens = {"packed": sum(h * w // p**2 for h, w in MIX), "padded": len(MIX) * height * width // p**2}
    return {"images": len(MIX), "patches": tokens, "seconds": interleaved(calls, rounds)}


# ---- windows

SIDES = {"one forward": (512, 1024, 1536), "windows": (512, 1024, 1536, 2048)}


def windows(checkpoint: Path) -> dict:
    """Peak MiB of the dense map of a square picture, in one forward and in windows of 512 px, stride 384."""
    return {way: {str(side): peak_of(way, checkpoint, side) for side in sides} for way, sides in SIDES.items()}


def dense(way: str, checkpoint: Path) -> Callable[[Tensor], Tensor]:
    model = ours(checkpoint)
    if way == "windows":
        return lambda images: sliding_window_features(model, images, 512, 384)
    return lambda images: model(images).feature_map


# ---- memory, in a process of its own


def peak_of(what: str, checkpoint: Path, *numbers: int) -> float:
    return float(in_a_child(__file__, "--memory-of", what, checkpoint, *numbers))


@torch.inference_mode()
def memory_of(what: str, checkpoint: Path, numbers: list[int]) -> float:
    """Peak MiB of a contender for the blocks `numbers`, or of a way to the dense map of a picture of that side."""
    if what in CONTENDERS:
        call, images = contender(what, checkpoint, numbers), torch.zeros(4, 3, 224, 224)
    else:
        call, images = dense(what, checkpoint), torch.zeros(1, 3, numbers[0], numbers[0])
    call(images[..., :64, :64])  # pages in the weights
    return peak_mib(lambda: call(images))


# ---- tables


def tables(result: dict) -> dict[str, str]:
    return {
        name: table(result[name]) for name, table in (("layers", _layers), ("packed", _packed), ("windows", _windows))
    }


def _layers(cases: dict) -> str:
    lines = ["| | ms (quartiles) | time, ratio to ours | peak MiB | memory, ratio to ours |", "|---" * 5 + "|"]
    for case, contenders in cases.items():
        own = contenders["ours"]
        for name, one in contenders.items():
            ratio = statistics.median(one["seconds"]) / statistics.median(own["seconds"])
            memory = one["peak MiB"] / own["peak MiB"]
            cells = [spread(one["seconds"]), f"{ratio:.2f}", f"{one['peak MiB']:.0f}", f"{memory:.2f}"]
            lines.append(f"| {case}, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _packed(result: dict) -> str:
    lines = ["| | images/s | throughput, ratio to padded |", "|---" * 3 + "|"]
    medians = {name: statistics.median(seconds) for name, seconds in result["seconds"].items()}
    for name, median in medians.items():
        ratio = medians["padded to the largest"] / median
        lines.append(f"| {name} | {result['images'] / median:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def _windows(result: dict) -> str:
    lines = ["| picture | one forward, peak MiB | windows of 512, peak MiB |", "|---" * 3 + "|"]
    for side, tiled in result["windows"].items():
        plain = result["one forward"].get(side)
        lines.append(f"| {side} x {side} | {'not run' if plain is None else f'{plain:.0f}'} | {tiled:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
