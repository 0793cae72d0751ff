"""An epoch of fit beside a plain loop over transformers' backbone: same head, loss, pictures and augmentation.

python benchmarks/fit_speed.py DATA CHECKPOINT [--size 384x384] [--pictures 64] [--rounds 5]

The plain loop is what people write: the frozen transformers model called with output_hidden_states, its final norm
applied to four of them, the head, the loss, AdamW. Both take turns, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment, headline, save
from segmentation import OnPeer
from torch import nn
from torch.utils.data import DataLoader

from dinov3_lite import DINOv3ViT
from dinov3_lite.tasks import DenseHead, Recipe, Segmenter
from dinov3_lite.tasks.augment import Examples
from dinov3_lite.tasks.data import check_pairs, find_pairs
from dinov3_lite.tasks.loop import Normalise, resized_structure_loss


def epoch_of(network: nn.Module, examples: Examples, recipe: Recipe) -> Callable[[], float]:
    """A function that trains for an epoch and returns its mean loss."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=recipe.lr)
    normalise = Normalise(recipe.mean, recipe.std)

    def epoch() -> float:
        network.train()
        total = 0.0
        for pictures, masks in DataLoader(examples, recipe.batch_size):
            loss = resized_structure_loss(network(normalise(pictures)), masks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(masks)
        return total / len(examples)

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", type=lambda t: tuple(map(int, t.split("x"))), default=(384, 384))
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    recipe = Recipe(size=args.size)
    pairs = find_pairs(args.data / "TrainDataset")[: args.pictures]
    examples = Examples(pairs, check_pairs(pairs, 1)[0], recipe.size, augment=True)
    backbone = DINOv3ViT.from_pretrained(args.checkpoint)
    networks: dict[str, nn.Module] = {}
    torch.manual_seed(0)
    networks["fit"] = Segmenter(backbone, DenseHead((backbone.embed_dim,) * 4, 1))
    torch.manual_seed(0)
    networks["transformers"] = OnPeer("transformers", args.checkpoint, backbone.embed_dim)
    epochs = {name: epoch_of(network, examples, recipe) for name, network in networks.items()}
    losses = {name: epoch() for name, epoch in epochs.items()}  # the first is a warm-up, and must agree
    assert abs(losses["fit"] - losses["transformers"]) < 1e-3 * losses["fit"], losses
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for turn in range(args.rounds):
        for name in list(epochs) if turn % 2 else list(epochs)[::-1]:
            start = time.perf_counter()
            epochs[name]()
            seconds[name].append(time.perf_counter() - start)
    ratios = [theirs / ours for ours, theirs in zip(seconds["fit"], seconds["transformers"], strict=True)]
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {"size": args.size, "pictures": len(pairs), "batch": recipe.batch_size},
        "losses of the first epoch": losses,
        "seconds": seconds,
        "ratio": {"median": statistics.median(ratios), "all": ratios},
    }
    save("fit_speed", result)
    print(headline(result))
    for name, values in seconds.items():
        print(f"{name:<14} {statistics.median(values):.1f} s for {len(pairs)} pictures")
    print(f"fit is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
