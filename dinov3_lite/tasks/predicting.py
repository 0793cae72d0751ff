"""`predict`: from pictures to masks at their own sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..window import blend
from .data import folders_of, pictures_in, stem_of
from .head import HeadSettings
from .loop import Normalise, Recipe, as_bytes, resized

LARGEST = 100_000_000  # pixels of a picture that was enlarged until a window fits


def pictures_of(inputs: Sequence[Path]) -> dict[str, Path]:
    """The pictures that a command is given, by what their predictions are called: the stem and, of a folder of data
    sets, before it the data set's name and a slash.

    inputs: files, folders of pictures, data sets (whose masks are left alone), or folders of data sets.

    Raises FileNotFoundError for what is not there, ValueError for a folder without pictures and for two of one name.
    """
    found: dict[str, Path] = {}
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        for name, file in (_of_folder(path) if path.is_dir() else {stem_of(path): path}).items():
            if name in found:
                raise ValueError(f"{file}: has the stem of {found[name]}, and predictions are named by it: rename one")
            found[name] = file
    return found


def _of_folder(folder: Path) -> dict[str, Path]:
    pictures = pictures_in(folder)
    if not pictures:
        for prefix, data_set in (("", folder), *((f"{f.name}/", f) for f in sorted(folder.iterdir()) if f.is_dir())):
            folders = folders_of(data_set)
            pictures |= {prefix + stem: file for stem, file in pictures_in(folders[0]).items()} if folders else {}
    if not pictures:
        raise ValueError(f"{folder}: holds no pictures, and no data sets with a folder of pictures and one of masks")
    return pictures


@torch.no_grad()
def predict(
    network: nn.Module, pixels: np.ndarray, settings: HeadSettings | Recipe, *, sliding: bool = False
) -> np.ndarray:
    """Predict the mask of a picture (H, W, 3) uint8, at the picture's own size: (H, W) uint8.

    With one class, 255 times the foreground's probability; with several, the number of the likeliest class.

    network: in evaluation mode, as `load_head` and `train` leave it. settings: those of the head, or the recipe that a
        network of one's own was fitted with; its size, mean and std count.
    sliding: keep a picture larger than the training size at full resolution and slide a window of that size over it,
        instead of shrinking it.

    Raises ValueError where sliding would first enlarge a picture, which is too narrow for a window, beyond all bounds.
    """
    device = next(network.parameters()).device
    normalise = Normalise(settings.mean, settings.std).to(device)

    def logits_of(pictures: Tensor) -> Tensor:
        """(B, 3, h, w) in 0 to 255 -> (B, K, h, w)."""
        return resized(network(normalise(pictures.to(device))), settings.size)

    picture = torch.from_numpy(pixels).permute(2, 0, 1).float()[None]
    logits = slide(logits_of, picture, settings.size) if sliding else logits_of(_resize(picture, settings.size))
    return as_bytes(resized(logits, pixels.shape[:2]))[0].numpy()


def slide(run: Callable[[Tensor], Tensor], picture: Tensor, window: tuple[int, int]) -> Tensor:
    """Logits (1, K, H, W) of a picture (1, 3, H, W) by windows that overlap by half, blended as
    `sliding_window_features` does. A picture with a side below the window's is enlarged until it fits.
    """
    h, w = window
    scale = max(1.0, h / picture.shape[2], w / picture.shape[3])
    H, W = max(h, round(scale * picture.shape[2])), max(w, round(scale * picture.shape[3]))
    if scale > 1 and H * W > LARGEST:
        raise ValueError(
            f"a picture of {picture.shape[2]} x {picture.shape[3]} pixels would be enlarged to {H} x {W}, so that a "
            f"window of {h} x {w} fits: predict it without sliding"
        )
    picture = _resize(picture, (H, W))
    (tops, rows), (lefts, columns) = blend(H, h, max(1, h // 2)), blend(W, w, max(1, w // 2))
    total: Tensor | None = None
    for y, row in zip(tops, rows, strict=True):
        for x, column in zip(lefts, columns, strict=True):
            logits = run(picture[:, :, y : y + h, x : x + w]).cpu()
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], H, W)
            total[:, :, y : y + h, x : x + w] += torch.outer(row, column).to(logits) * logits
    assert total is not None  # there is one window at least
    return total


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(picture, size, mode="bilinear", antialias=True, align_corners=False)
