"""The loop: any network that maps normalised pictures to logits is fitted to pairs of pictures and masks."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.files import whole_files
from ..image import IMAGENET_MEAN, IMAGENET_STD
from .augment import Examples, batches
from .data import Pair, Reading
from .head import sample
from .losses import class_loss, structure_loss
from .measures import Measures

Report = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How a network is fitted. Everything that changes the curve is in here."""

    size: tuple[int, int] = (384, 384)
    epochs: int = 20
    batch_size: int = 8
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it then falls to zero as a cosine."""
    seed: int = 0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}: expected a positive number")


@dataclass
class Fitted:
    """What a run came to."""

    history: list[dict[str, float]] = field(default_factory=list)
    """An entry an epoch: its loss, and the measures on the part held out."""
    best: int = -1
    """The epoch whose weights the network has, counted from 0."""


def train(
    network: nn.Module,
    train_pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    reading: Reading,
    recipe: Recipe,
    *,
    parameter_groups: list[dict[str, Any]] | None = None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    on_best: Callable[[dict[str, float]], None] | None = None,
    resume: Path | None = None,
    report: Report = print,
    workers: int = 0,
) -> Fitted:
    """Fit `network`, and leave it with the weights that did best on the part held out.

    network: maps (B, 3, H, W) to logits (B, K, h, w) of any h and w; what it returns in training mode may be anything
        that `loss` takes. Parameters that need no gradient stay as they are.
    parameter_groups: for AdamW; every parameter that trains, at the recipe's rate, unless given.
    loss: of (what the network returned, masks (B, H, W) int64); `structure_loss` for one foreground and
        `class_loss` for several classes, of logits resized to the masks, unless given.
    on_best: called with the epoch's entry of the history whenever its measures are the best so far, while the network
        has that epoch's weights.
    resume: a file to keep the run's state in after each epoch, removed at the end. A run that finds it goes on from
        there, and its curve is that of one that was never stopped.
    report: called with a line an epoch. workers: processes that read pictures.

    Raises ValueError where `resume` is of a run with other settings, which it names, and where the loss is not finite.
    """
    device = next(network.parameters()).device
    trained: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameter_groups or _groups(trained, recipe.weight_decay), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    examples = Examples(list(train_pairs), reading, recipe.size, augment=True, seed=recipe.seed)
    steps = math.ceil(len(examples) / recipe.batch_size)
    peaks = [group["lr"] for group in optimizer.param_groups]
    loss = loss or (resized_structure_loss if reading.classes == 1 else resized_class_loss)
    normalise = Normalise(recipe.mean, recipe.std).to(device)
    network.train()
    kept = trained | _statistics(network)
    fitted, best_state = Fitted(), _copy(kept)
    identity = _identity(network, recipe, train_pairs, held_out, reading)
    if resume is not None and resume.exists():
        state = _read_state(resume, identity)
        fitted, best_state = Fitted(state["history"], state["best"]), state["best_network"]
        if on_best:  # again, as the run may have been killed before it came to that
            _put(kept, best_state)
            on_best(fitted.history[fitted.best])
        _put(kept, state["network"])
        optimizer.load_state_dict(state["optimizer"])
        report(f"{resume}: going on after epoch {len(fitted.history)}")

    for epoch in range(len(fitted.history), recipe.epochs):
        start = time.perf_counter()
        examples.epoch = epoch
        torch.manual_seed(recipe.seed * 1_000_003 + epoch)  # so that an epoch's order follows from these two alone
        order = torch.randperm(len(examples)).tolist()
        network.train()
        total = torch.zeros((), device=device)
        read = batches(examples, recipe.batch_size, order, workers)
        for step, (pictures, masks) in enumerate(read, start=epoch * steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _warm_cosine(step, recipe.epochs * steps, recipe.warmup)
            value = loss(network(normalise(pictures.to(device))), masks.to(device))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += value.detach() * len(masks)
        mean_loss = total.item() / len(examples)
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss is {mean_loss} in epoch {epoch + 1}: fit with a smaller learning rate")
        measures = measure(network, held_out, reading, recipe, workers=workers)
        fitted.history.append({"loss": mean_loss, **measures})
        better = fitted.best < 0 or _choice(measures) > _choice(fitted.history[fitted.best])
        if better:
            fitted.best, best_state = epoch, _copy(kept)
        if resume is not None:
            _write_state(resume, identity, kept, optimizer, fitted, best_state)
        if better and on_best:
            on_best(fitted.history[epoch])
        figures = "  ".join(f"{name} {value:.4f}" for name, value in fitted.history[-1].items())
        mark = "  best" if better else ""
        report(f"epoch {epoch + 1}/{recipe.epochs}  {figures}  {time.perf_counter() - start:.0f} s{mark}")

    _put(kept, best_state)
    network.eval()
    if resume is not None:
        resume.unlink(missing_ok=True)
    return fitted


@torch.no_grad()
def measure(
    network: nn.Module, pairs: Sequence[Pair], reading: Reading, recipe: Recipe, *, workers: int = 0
) -> dict[str, float]:
    """The measures of `network` on pairs at the recipe's size, without augmentation."""
    device = next(network.parameters()).device
    normalise = Normalise(recipe.mean, recipe.std).to(device)
    network.eval()
    measures = Measures(reading.classes, ("S", "MAE", "IoU"))
    for pictures, masks in batches(Examples(list(pairs), reading, recipe.size), recipe.batch_size, workers=workers):
        logits = resized(network(normalise(pictures.to(device))), masks.shape[1:])
        for prediction, mask in zip(as_bytes(logits), masks.numpy(), strict=True):
            measures.add(prediction.numpy(), mask)
    result = measures.result()
    return {name: result[name] for name in ("S", "MAE", "IoU") if name in result}


def as_bytes(logits: Tensor) -> Tensor:
    """Logits (B, K, H, W) as predictions are kept: (B, H, W) uint8 on the CPU, 255 times the probability of the
    foreground, or the number of the likeliest class.
    """
    if logits.shape[1] == 1:
        return (torch.sigmoid(logits[:, 0].float()) * 255).round().to(torch.uint8).cpu()
    return logits.argmax(1).to(torch.uint8).cpu()


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits at another size, by bilinear interpolation."""
    return F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False)


def resized_structure_loss(logits: Tensor, masks: Tensor) -> Tensor:
    return structure_loss(resized(logits, masks.shape[1:]), masks)


def resized_class_loss(logits: Tensor, masks: Tensor) -> Tensor:
    return class_loss(resized(logits, masks.shape[1:]), masks)


class Normalise(nn.Module):
    """Pictures (B, 3, H, W) in 0 to 255 as a backbone takes them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return (pictures - self.mean) / self.std


def _choice(measures: dict[str, float]) -> float:
    """What epochs are compared by: the S-measure or, with several classes, the mean IoU."""
    return measures.get("S", measures["IoU"])


def _groups(trained: dict[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay; norms, biases and scales without."""
    decays = {True: weight_decay, False: 0.0}
    return [
        {"params": [p for p in trained.values() if (p.ndim > 1) == matrices], "weight_decay": decays[matrices]}
        for matrices in (True, False)
    ]


def _warm_cosine(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, as a share of its peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _identity(
    network: nn.Module, recipe: Recipe, train_pairs: Sequence[Pair], held_out: Sequence[Pair], reading: Reading
) -> dict[str, str]:
    """What a run must have in common with the one that it goes on from, by what people call it."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in network.named_parameters()]
    frozen = [sample(p) for p in network.parameters() if not p.requires_grad]
    return {name.replace("_", " "): str(value) for name, value in asdict(recipe).items()} | {
        "classes": str(reading.classes),
        "foreground above": str(reading.above),
        "pictures to train on": _counted(train_pairs),
        "pictures held out": _counted(held_out),
        "parameters that train": f"{trained} ({_digest(shapes)})",
        "frozen weights": _digest(frozen),
    }


def _counted(pairs: Sequence[Pair]) -> str:
    return f"{len(pairs)} ({_digest([(str(pair.picture.resolve()), str(pair.mask.resolve())) for pair in pairs])})"


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:8]


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    """Buffers of the modules that are in training mode: a batch norm's running statistics change though none trains."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in network.named_modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
    }


def _copy(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}


@torch.no_grad()
def _put(kept: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name, tensor in kept.items():
        tensor.copy_(state[name])


def _write_state(
    file: Path,
    identity: dict[str, str],
    kept: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    fitted: Fitted,
    best_state: dict[str, Tensor],
) -> None:
    state = {
        "identity": identity,
        "network": _copy(kept),
        "optimizer": optimizer.state_dict(),
        "history": fitted.history,
        "best": fitted.best,
        "best_network": best_state,
    }
    with whole_files() as out, out.create(file) as opened:
        torch.save(state, opened)


def _read_state(file: Path, identity: dict[str, str]) -> dict[str, Any]:
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
        theirs = dict(state["identity"])
    except Exception as error:
        raise ValueError(f"{file}: is no state of an unfinished run ({error}): remove it to begin anew") from error
    other = [f"{name} {theirs.get(name)}, not {value}" for name, value in identity.items() if theirs.get(name) != value]
    if other:
        raise ValueError(
            f"{file}: is of an unfinished run with {'; '.join(other)}: run that again to go on with it, or remove the "
            "file to begin anew"
        )
    return state
