"""An epoch of fit beside plain loops over transformers' backbone: same head, pictures and augmentation.

python benchmarks/fit_speed.py DATA CHECKPOINT [--size 384x384] [--pictures 32] [--rounds 5]

A plain loop is what people write: the frozen transformers model called with output_hidden_states, its final norm
applied to four of them, the head, the structure loss as it is published (its mean over 31 x 31 pixels in one piece),
AdamW. A second one has our loss, so that the backbone's share can be told; and a third and fit once more have the
backbone in bfloat16. All take turns; ratios are taken round by round, to the fit of the same dtype.
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


# whether it is ours, its loss, the backbone's dtype
WAYS: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor], torch.dtype]] = {
    "fit": (True, resized_structure_loss, torch.float32),
    "plain loop": (False, published_loss, torch.float32),
    "plain loop with our loss": (False, resized_structure_loss, torch.float32),
    "fit, bfloat16": (True, resized_structure_loss, torch.bfloat16),
    "plain loop, bfloat16": (False, published_loss, torch.bfloat16),
}


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
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    recipe = Recipe(size=args.size)
    pairs = find_pairs(args.data / "TrainDataset")[: args.pictures]
    examples = Examples(pairs, check_pairs(pairs, 1)[0], recipe.size, augment=True)
    epochs = {}
    for name, (ours, loss_of, dtype) in WAYS.items():
        torch.manual_seed(0)
        backbone = DINOv3ViT.from_pretrained(args.checkpoint, dtype=dtype)
        network: nn.Module
        if ours:
            network = Segmenter(backbone, DenseHead((backbone.embed_dim,) * 4, 1))
        else:
            network = OnPeer("transformers", args.checkpoint, backbone.embed_dim, dtype)
        epochs[name] = epoch_of(network, examples, recipe, loss_of)
    losses = {name: epoch() for name, epoch in epochs.items()}  # the first is a warm-up, and must agree
    for name, loss in losses.items():
        tolerance = 1e-3 if WAYS[name][2] == torch.float32 else 3e-2
        assert abs(loss - losses["fit"]) < tolerance * losses["fit"], losses
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for turn in range(args.rounds):
        for name in list(epochs) if turn % 2 else list(epochs)[::-1]:
            start = time.perf_counter()
            epochs[name]()
            seconds[name].append(time.perf_counter() - start)
    ratios = {}
    for name, (ours, _, dtype) in WAYS.items():
        fit = next(way for way, (is_ours, _, its) in WAYS.items() if is_ours and its == dtype)
        if not ours:
            ratios[name] = [theirs / mine for mine, theirs in zip(seconds[fit], seconds[name], strict=True)]
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {"size": args.size, "pictures": len(pairs), "batch": recipe.batch_size},
        "losses of the first epoch": losses,
        "seconds": seconds,
        "ratios": {name: {"median": statistics.median(values), "all": values} for name, values in ratios.items()},
    }
    save("fit_speed", result)
    print(headline(result))
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Seconds an epoch, and how many times as fast fit of the same dtype is, as markdown."""
    settings = result["settings"]
    size = " x ".join(map(str, settings["size"]))
    lines = [
        f"| {settings['pictures']} pictures at {size}, batches of {settings['batch']} | s an epoch | fit beside it |"
    ]
    lines.append("|---|---:|---:|")
    for name, values in result["seconds"].items():
        ratios = result["ratios"].get(name, {}).get("all")
        cell = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        lines.append(f"| {name} | {statistics.median(values):.1f} | {cell} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
