"""`track`: the masks of a first frame carried through a video, from patch to similar patch.

Label propagation (arXiv 2006.14613) with the constants of Meta's notebooks/segmentation_tracking.ipynb: each patch
takes the labels of the 5 most similar patches of the first frame and of the 7 frames before it, among those within 12
patches of its own place, weighted by a softmax of cosines at temperature 0.2. The notebook gives a patch of the first
frame one label, and each pixel the label of its patch, after stretching each object's to its own minimum and maximum;
here a patch has the shares of what lies in it, and pixels take the likeliest of shares interpolated between patches.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needed
from .data import pictures_in, read_picture

CONTEXT, RADIUS, TOP, TEMPERATURE = 7, 12, 5, 0.2
CHUNK = 2**26  # similarities in memory at a time


def track(
    frames: Iterable[np.ndarray], mask: np.ndarray, features: Callable[[np.ndarray], Tensor]
) -> Iterator[np.ndarray]:
    """Yield the mask of each frame, (H, W) uint8 with the values of `mask`; the first is `mask` itself.

    frames: (H, W, 3) uint8, all of one size. mask: (H, W) uint8 of the first frame, 0 and one value an object.
    features: maps a frame to patch features (C, h, w).

    Raises ValueError for a mask without an object or of another size than the frame, and for frames of several sizes.
    """
    values = np.unique(np.append(mask, 0))  # 0, which is the background, first
    if len(values) < 2:
        raise ValueError("the first mask is empty: expected a value other than 0 for each object to follow")
    context: deque[tuple[Tensor, Tensor]] = deque(maxlen=CONTEXT)
    first: tuple[Tensor, Tensor] | None = None
    near: Tensor | None = None
    for i, frame in enumerate(frames):
        if frame.shape[:2] != mask.shape:
            what = "the first mask" if i == 0 else "the first frame"
            raise ValueError(
                f"frame {i} is {frame.shape[0]} x {frame.shape[1]} pixels and {what} {mask.shape[0]} x "
                f"{mask.shape[1]}: expected one size"
            )
        feature_map = F.normalize(features(frame).float(), dim=0)
        h, w = feature_map.shape[1:]
        vectors = feature_map.flatten(1).T  # (patches, C)
        if first is None or near is None:
            labels = _shares(mask, values, (h, w)).to(vectors)
            first, near = (vectors, labels), neighbourhood(h, w, RADIUS).to(vectors.device)
            yield mask
            continue
        labels = propagate(vectors, [first, *context], near)
        context.append((vectors, labels))
        yield _as_mask(labels, values, (h, w), mask.shape)


def propagate(vectors: Tensor, context: list[tuple[Tensor, Tensor]], near: Tensor) -> Tensor:
    """Labels (P, K) of patches with unit vectors (P, C) from frames of (vectors, labels); near: (P, P) bool."""
    keys = torch.cat([v for v, _ in context])  # (frames * P, C)
    labels = torch.cat([share for _, share in context])  # (frames * P, K)
    found = []
    for rows in torch.arange(len(vectors), device=vectors.device).split(max(1, CHUNK // len(keys))):
        similarity = vectors[rows] @ keys.T
        similarity.masked_fill_(~near[rows].repeat(1, len(context)), -torch.inf)
        top, index = similarity.topk(min(TOP, similarity.shape[1]), dim=1)
        weights = (top / TEMPERATURE).softmax(1)
        found.append((weights.unsqueeze(-1) * labels[index]).sum(1))
    return torch.cat(found)


def neighbourhood(h: int, w: int, radius: int) -> Tensor:
    """(P, P) bool: which patches lie within `radius` of one another on a grid of h x w."""
    y, x = (grid.flatten() for grid in torch.meshgrid(*(torch.arange(n, device="cpu") for n in (h, w)), indexing="ij"))
    return (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 <= radius**2


def _shares(mask: np.ndarray, values: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """How much of each patch each value has: (P, K)."""
    one_hot = torch.from_numpy(mask[None] == values[:, None, None]).float()  # (K, H, W)
    return F.interpolate(one_hot[None], grid, mode="area")[0].flatten(1).T


def _as_mask(labels: Tensor, values: np.ndarray, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """Labels (P, K) as the likeliest value of each pixel: (H, W) uint8."""
    maps = labels.T.unflatten(1, grid)[None]
    maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)[0]
    return values[maps.argmax(0).cpu().numpy()].astype(np.uint8)


def read_frames(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Frames (H, W, 3) uint8 with their names: of a folder of pictures, in the order of names and of numbers in them
    (frame2, frame10), or of a video file.

    Raises FileNotFoundError, and ValueError for a folder without pictures or with two of one stem and for a file that
    is no video; where a video ends before the number of frames that it announces, after the last of them.
    """
    if source.is_dir():
        pictures = pictures_in(source)
        if not pictures:
            raise ValueError(f"{source}: holds no picture: expected the frames of a video")
        for stem in sorted(pictures, key=_by_number):
            yield stem, read_picture(pictures[stem])
    elif source.is_file():
        yield from _read_video(source)
    else:
        raise FileNotFoundError(f"{source}: no such video or folder of frames")


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_video(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    with needed(f"{source}: reading videos", "opencv", "'dinov3-lite[tasks]', or give a folder of frames"):
        import cv2
    video = cv2.VideoCapture(str(source))
    try:
        announced = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        count = 0
        while True:
            there, frame = video.read()
            if not there:
                break
            yield f"{count:05d}", np.ascontiguousarray(frame[..., ::-1])
            count += 1
    finally:
        video.release()
    if not count:
        raise ValueError(f"{source}: can't be read as a video: expected a video or a folder of frames")
    if count < announced:
        raise ValueError(f"{source}: ends after {count} of the {announced} frames that it announces")


def jaccard(found: np.ndarray, truth: np.ndarray) -> float:
    """DAVIS' J of two masks (H, W) bool: intersection over union, 1 where both are empty. ValueError for two sizes."""
    if found.shape != truth.shape:
        raise ValueError(f"a mask of {found.shape} pixels beside a true one of {truth.shape}: expected one size")
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def boundary_f(found: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """DAVIS' F of two masks (H, W) bool: the F-measure of their borders, which may be off by `tolerance` of the
    picture's diagonal (Perazzi et al., CVPR 2016, section 4).
    """
    radius = int(np.ceil(tolerance * np.hypot(*found.shape)))
    borders = [torch.from_numpy(_border(m)) for m in (found, truth)]
    counts = [int(border.sum()) for border in borders]
    if 0 in counts:
        return float(counts == [0, 0])
    offsets = torch.arange(-radius, radius + 1, device="cpu")
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()
    wide = [F.conv2d(b.float()[None, None], disk[None, None], padding=radius)[0, 0] > 0.5 for b in borders]
    precision = int((borders[0] & wide[1]).sum()) / counts[0]
    recall = int((borders[1] & wide[0]).sum()) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _border(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or both (the picture's own edge is no border)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != both)


def j_and_f(found: Iterable[np.ndarray], truth: Iterable[np.ndarray]) -> dict[str, float]:
    """DAVIS' J, F and their mean, each averaged over the first mask's objects and all frames but first and last.

    found, truth: masks (H, W) of all frames, looked at one by one. Raises ValueError for fewer than three frames.
    """
    pairs = zip(found, truth, strict=True)
    _, first = next(pairs, (None, np.zeros(0)))
    objects = [value for value in np.unique(first) if value]
    scores = [
        [(jaccard(f == value, t == value), boundary_f(f == value, t == value)) for value in objects]
        for (f, t), _ in pairwise(pairs)
    ]
    if not scores:
        raise ValueError("J and F are taken without the first and the last frame: expected at least 3 frames")
    J, boundary = np.mean(scores, axis=(0, 1))
    return {"J": float(J), "F": float(boundary), "J&F": float((J + boundary) / 2)}
