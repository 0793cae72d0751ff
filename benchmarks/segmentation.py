"""Heads fitted to made camouflage: measures, time and memory of each way, over seeds; and on others' backbones.

python tests/support/camouflage.py DATA 400
python -m dinov3_lite sample CHECKPOINT
python benchmarks/segmentation.py DATA CHECKPOINT [--size 96x112] [--epochs 6] [--seeds 3]

Each run is a process of its own, and kept as soon as it is done: the same command goes on where it was stopped, and
another size adds rows. With made weights the figures compare the ways with one another and say nothing of what real
weights reach. `transformers` and `timm` are the same head on their backbones with the same weights: numbers that differ
by more than a run of ours from its own repetition would be an error of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import RESULTS, environment, save
from torch import Tensor, nn

from dinov3_lite import DINOv3ViT, build_dinov3_encoder
from dinov3_lite.finetune import parameter_groups
from dinov3_lite.tasks import DenseHead, Recipe, Segmenter, evaluate, predict, train
from dinov3_lite.tasks.data import check_pairs, find_pairs, hold_out, read_picture
from dinov3_lite.tasks.drawing import save_picture
from dinov3_lite.tasks.fitting import BACKBONE_RATE, LAYER_DECAY
from dinov3_lite.tasks.head import HeadSettings


class E2NetLike(nn.Module):
    """The first client's kind of decoder on the frozen pyramid encoder: maps of four strides, before the final norm,
    aligned to one width and fused from coarse to fine.

    It sees patches and no pixels, so that what it finds is no finer than they are: of pictures shrunk to 6 x 7 patches
    it learned those in training and found 0.15 (IoU) in others, of 12 x 14 patches 0.45, whatever the learning rate.
    Group norms, as batch norms found half as much.
    """

    def __init__(self, checkpoint: Path, width: int = 128) -> None:
        super().__init__()
        self.encoder = build_dinov3_encoder(pretrained_path=checkpoint)
        self.align = nn.ModuleList(_unit(c, width, 1) for c in self.encoder.channels)
        self.fuse = nn.ModuleList(_unit(2 * width, width, 3) for _ in range(3))
        self.predict = nn.Conv2d(width, 1, 1)
        nn.init.normal_(self.predict.weight, std=0.01)  # begins as the product's head does
        nn.init.constant_(self.predict.bias, -2.0)

    def forward(self, pixel_values: Tensor) -> Tensor:
        maps = [align(m) for align, m in zip(self.align, self.encoder(pixel_values), strict=True)]
        x = maps.pop()
        for fuse in self.fuse:
            finer = maps.pop()
            x = F.interpolate(x, finer.shape[2:], mode="bilinear", align_corners=False)
            x = fuse(torch.cat((finer, x), dim=1))
        return self.predict(x)


def _unit(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(8, outputs), nn.ReLU(inplace=True)
    )


class OnPeer(nn.Module):
    """The product's head on another package's backbone: four normed maps at the quarters of the depth."""

    def __init__(self, peer: str, checkpoint: Path, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        from peers import timm_model, transformers_model

        self.peer = peer
        with torch.random.fork_rng(devices=[]):  # timm initialises at random what it is given then; the head is ours
            model = (transformers_model if peer == "transformers" else timm_model)(checkpoint, dtype)
        self.backbone = model.requires_grad_(False)
        self.head = DenseHead((width,) * 4, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = next(self.backbone.parameters()).dtype
        return self.head([m.to(pixel_values) for m in self.maps(pixel_values.to(dtype))], pixel_values)

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        if self.peer == "timm":
            depth = len(self.backbone.blocks)
            quarters = [depth * q // 4 - 1 for q in (1, 2, 3, 4)]
            return self.backbone.forward_intermediates(pixel_values, quarters, norm=True, intermediates_only=True)
        out = self.backbone(pixel_values, output_hidden_states=True)
        depth, p = self.backbone.config.num_hidden_layers, self.backbone.config.patch_size
        grid = (pixel_values.shape[2] // p, pixel_values.shape[3] // p)
        skip = 1 + self.backbone.config.num_register_tokens
        states = [out.hidden_states[depth * q // 4] for q in (1, 2, 3)]
        normed = [*(self.backbone.norm(state) for state in states), out.last_hidden_state]
        return [state[:, skip:].transpose(1, 2).unflatten(2, grid) for state in normed]

    def train(self, mode: bool = True) -> OnPeer:
        super().train(mode)
        self.backbone.eval()
        return self


WAYS = ("frozen", "last 2 blocks", "E2Net-like", "frozen, transformers", "frozen, timm")


def build(way: str, checkpoint: Path, recipe: Recipe) -> tuple[nn.Module, list[dict[str, Any]] | None]:
    """The network, and its parameter groups where they are not the loop's own."""
    torch.manual_seed(recipe.seed)
    if way == "E2Net-like":
        return E2NetLike(checkpoint), None
    backbone = DINOv3ViT.from_pretrained(checkpoint)
    if ", " in way:
        peer = OnPeer(way.split(", ")[1], checkpoint, backbone.embed_dim)
        peer.head.to(memory_format=torch.channels_last)  # as in a Segmenter, lest rounding differ
        return peer, None
    unfreeze = 2 if way == "last 2 blocks" else 0
    network = Segmenter(backbone, DenseHead((backbone.embed_dim,) * 4, 1), unfreeze)
    if not unfreeze:
        return network, None
    groups = [{"params": list(network.head.parameters())}]
    return network, groups + parameter_groups(backbone, BACKBONE_RATE * recipe.lr, recipe.weight_decay, LAYER_DECAY)


def one(way: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fit, predict and evaluate once, in this process."""
    recipe = Recipe(size=args.size, epochs=args.epochs, seed=seed)
    network, groups = build(way, args.checkpoint, recipe)
    pairs = find_pairs(args.data / "TrainDataset")
    reading, _ = check_pairs(pairs, 1)
    training, held = hold_out(pairs, 0.1, seed)
    unfinished = args.data / f"{way}-{seed}-{args.size[0]}x{args.size[1]}.resume"
    lines = [("", time.perf_counter())]
    fitted = train(
        network,
        training,
        held,
        reading,
        recipe,
        parameter_groups=groups,
        resume=unfinished,
        report=lambda line: lines.append((line, time.perf_counter())),
    )
    seconds = [end - start for (_, start), (line, end) in itertools.pairwise(lines) if line.startswith("epoch")]
    settings = HeadSettings(1, recipe.size, (), 0, recipe.mean, recipe.std, "", "")
    test = args.data / "TestDataset" / "made"
    with tempfile.TemporaryDirectory() as folder:
        for pair in find_pairs(test):
            save_picture(predict(network, read_picture(pair.picture), settings), Path(folder) / pair.mask.name)
        (measures,) = evaluate(folder, test).values()
    return {
        **measures,
        "seconds an epoch": statistics.median(seconds),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": [entry["loss"] for entry in fitted.history],
        "trained parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", type=lambda t: tuple(map(int, t.split("x"))), default=(96, 112))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]), args)))
        return
    pictures = len(find_pairs(args.data / "TrainDataset"))
    result = begun({"epochs": args.epochs, "pictures": pictures})
    for way in args.ways:
        runs = result["runs"].setdefault(f"{way} at {args.size[0]} x {args.size[1]}", [])
        for seed in range(len(runs), args.seeds):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way, str(seed)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{way}: {done.stderr.splitlines()[-1]}")
                break
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            shown = "  ".join(f"{name} {runs[-1][name]:.4f}" for name in ("S", "wF", "meanE", "F", "MAE", "IoU"))
            print(f"{way:<22} seed {seed}  {shown}  {runs[-1]['seconds an epoch']:.1f} s an epoch", flush=True)
            save("segmentation", result)
    print(f"\n{table(result)}")


def begun(settings: dict[str, Any]) -> dict[str, Any]:
    """The committed result, if it is of these settings: the runs that it has are not repeated. Else an empty one."""
    file = RESULTS / "segmentation.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.get("settings") == settings:
        return found
    with contextlib.suppress(ImportError):
        from peers import import_timm

        import_timm()  # lest its version be unknown where it lies beside the environment
    return {"environment": environment("timm", "pysodmetrics"), "settings": settings, "runs": {}}


def table(result: dict[str, Any]) -> str:
    """Means and spreads over seeds, as markdown."""
    lines = ["| way | seeds | S | wF | mean E | F | MAE | IoU | s an epoch | peak MB |", "|---|" + "---:|" * 9]
    for way, runs in result["runs"].items():
        if not runs:
            continue
        cells = [_spread([r[name] for r in runs]) for name in ("S", "wF", "meanE", "F", "MAE", "IoU")]
        cells += [f"{statistics.median(r[n] for r in runs):.0f}" for n in ("seconds an epoch", "peak MB")]
        lines.append(f"| {way} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.pstdev(values):.3f}" if len(values) > 1 else ""  # one seed has none
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
