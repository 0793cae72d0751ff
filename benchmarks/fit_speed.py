"""An epoch of fit beside plain loops over transformers' backbone: same head, pictures and augmentation.

python benchmarks/fit_speed.py DATA CHECKPOINT [--size 384x384] [--pictures 64] [--rounds 5]

A plain loop is what people write: the frozen transformers model called with output_hidden_states, its final norm
applied to four of them, the head, the structure loss as it is published (its mean over 31 x 31 pixels in one piece),
AdamW. A second one has our loss, so that the backbone's share can be told. All take turns; ratios are taken round by
round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment, headline, save
from segmentation import OnPeer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dinov3_lite import DINOv3ViT
from dinov3_lite.tasks import DenseHead, Recipe, Segmenter
from dinov3_lite.tasks.augment import Examples
from dinov3_lite.tasks.data import check_pairs, find_pairs
from dinov3_lite.tasks.loop import Normalise, resized, resized_structure_loss


def published_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """The structure loss with one pooling of 31 x 31."""
    mask = masks.unsqueeze(1).float()
    weight = 1 + 5 * (F.avg_pool2d(mask, 31, stride=1, padding=15) - mask).abs()
    logits = resized(logits, masks.shape[1:])
    bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    bce = (weight * bce).sum((2, 3)) / weight.sum((2, 3))
    p = torch.sigmoid(logits)
    common, total = (weight * p * mask).sum((2, 3)), (weight * (p + mask)).sum((2, 3))
    return (bce + 1 - (common + 1) / (total - common + 1)).mean()


def epoch_of(
    network: nn.Module, examples: Examples, recipe: Recipe, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], float]:
    """A function that trains for an epoch and returns its mean loss."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=recipe.lr)
    normalise = Normalise(recipe.mean, recipe.std)

    def epoch() -> float:
        network.train()
        total = 0.0
        for pictures, masks in DataLoader(examples, recipe.batch_size):
            loss = loss_of(network(normalise(pictures)), masks)
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
    ways = {"fit": resized_structure_loss, "plain": published_loss, "plain with our loss": resized_structure_loss}
    epochs = {}
    for name, loss_of in ways.items():
        torch.manual_seed(0)
        network: nn.Module
        if name == "fit":
            network = Segmenter(backbone, DenseHead((backbone.embed_dim,) * 4, 1))
        else:
            network = OnPeer("transformers", args.checkpoint, backbone.embed_dim)
        epochs[name] = epoch_of(network, examples, recipe, loss_of)
    losses = {name: epoch() for name, epoch in epochs.items()}  # the first is a warm-up, and must agree
    assert max(losses.values()) - min(losses.values()) < 1e-3 * losses["fit"], losses
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for turn in range(args.rounds):
        for name in list(epochs) if turn % 2 else list(epochs)[::-1]:
            start = time.perf_counter()
            epochs[name]()
            seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: [theirs / ours for ours, theirs in zip(seconds["fit"], seconds[name], strict=True)]
        for name in list(ways)[1:]
    }
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {"size": args.size, "pictures": len(pairs), "batch": recipe.batch_size},
        "losses of the first epoch": losses,
        "seconds": seconds,
        "ratios": {name: {"median": statistics.median(values), "all": values} for name, values in ratios.items()},
    }
    save("fit_speed", result)
    print(headline(result))
    for name, values in seconds.items():
        print(f"{name:<20} {statistics.median(values):.1f} s for {len(pairs)} pictures")
    for name, values in ratios.items():
        print(f"{name}: fit is {statistics.median(values):.2f} times as fast ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
