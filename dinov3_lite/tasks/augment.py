"""What a training picture goes through: a random window, a flip, other light. On tensors, from one generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data import Pair, Reading, read_picture


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Pairs as tensors of one size: pictures (3, H, W) float32 in 0 to 255, masks (H, W) int64.

    With `augment` each epoch sees other windows, flips and colours; what an example gets follows from (seed, epoch,
    index) alone, so that a run that goes on after a kill sees what it would have seen.
    """

    def __init__(
        self, pairs: list[Pair], reading: Reading, size: tuple[int, int], *, augment: bool = False, seed: int = 0
    ) -> None:
        self.pairs, self.reading, self.size, self.augment, self.seed = pairs, reading, size, augment, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        picture = torch.from_numpy(read_picture(pair.picture)).permute(2, 0, 1).float()
        mask = torch.from_numpy(self.reading.of(pair.mask).astype(np.int64))
        if not self.augment:
            return resize(picture, mask, self.size)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        picture, mask = resize(*window(picture, mask, rng), self.size)
        if rng.random() < 0.5:
            picture, mask = picture.flip(-1), mask.flip(-1)
        return light(picture, rng), mask


def batches(
    examples: Examples, size: int, order: Sequence[int] | None = None, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Examples in batches (B, 3, H, W) and (B, H, W), read by so many processes. What one of them raises is raised here
    as it was: a DataLoader alone would bury a file's name in the process's traceback.
    """
    order = range(len(examples)) if order is None else order
    indices = [order[i : i + size] for i in range(0, len(order), size)]
    loader = DataLoader(_Batches(examples), batch_size=None, sampler=indices, collate_fn=_as_it_is, num_workers=workers)
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _Batches(Dataset[tuple[Tensor, Tensor] | Exception]):
    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | Exception:
        try:
            pictures, masks = zip(*(self.examples[i] for i in indices), strict=True)
            return torch.stack(pictures), torch.stack(masks)
        except Exception as error:
            return error


def _as_it_is(batch: object) -> object:
    return batch


def resize(picture: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(3, H, W) by antialiased bilinear interpolation, (H, W) by nearest neighbours, both to `size`."""
    if picture.shape[1:] != size:
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return picture, F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].to(mask.dtype)


def window(picture: Tensor, mask: Tensor, rng: np.random.Generator, least: float = 0.7) -> tuple[Tensor, Tensor]:
    """A random window of both, each side between `least` and the whole of the picture's."""
    H, W = mask.shape
    h, w = (max(1, round(side * rng.uniform(least, 1))) for side in (H, W))
    y, x = rng.integers(H - h + 1), rng.integers(W - w + 1)
    return picture[:, y : y + h, x : x + w], mask[y : y + h, x : x + w]


def light(picture: Tensor, rng: np.random.Generator, strength: float = 0.3) -> Tensor:
    """Other brightness, contrast and saturation, each by a factor in 1 +- strength, of (3, H, W) in 0 to 255."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    picture = picture * brightness
    mean = picture.mean()
    picture = (picture - mean) * contrast + mean
    grey = picture.mean(0, keepdim=True)
    return ((picture - grey) * saturation + grey).clamp(0, 255)
