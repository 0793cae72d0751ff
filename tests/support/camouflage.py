"""Made camouflage: objects that only the run of their texture gives away, as a data set on disk.

Object and ground are the same two-coloured noise of one frequency band and one distribution of colours; the object's
is turned by 50 to 90 degrees. Shapes are lobed and lie anywhere, one or two a picture, over 3 to 20 % of it; borders
are soft, light falls unevenly over everything, and there is noise.

`python tests/support/camouflage.py FOLDER [COUNT]` writes TrainDataset and TestDataset/made, and prints what a colour
threshold finds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (192, 224)


def texture(size: tuple[int, int], frequency: float, angle: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W) noise of unit variance around one frequency (cycles a pixel) and direction."""
    fy, fx = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None]
    cy, cx = frequency * np.sin(angle), frequency * np.cos(angle)
    width = 0.35 * frequency
    band = sum(np.exp(-((fy - s * cy) ** 2 + (fx - s * cx) ** 2) / (2 * width**2)) for s in (1, -1))
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(size)) * band, size)
    return noise / noise.std()


def lobed(size: tuple[int, int], radius: float, centre: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """(H, W) signed: above zero inside a star-shaped blob of about `radius` pixels."""
    y, x = np.mgrid[: size[0], : size[1]]
    dy, dx = y - centre[0], x - centre[1]
    phi = np.arctan2(dy, dx)
    stretch = rng.uniform(0.7, 1.4)
    lobes = sum(rng.normal(0, 0.22 / k) * np.cos(k * phi + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    return radius * (1 + lobes) - np.hypot(dy * stretch, dx / stretch)


def example(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) and its mask (H, W), both uint8, the mask 0 or 255."""
    H, W = size
    while True:
        blobs = [
            lobed(
                size,
                min(H, W) * rng.uniform(0.11, 0.24),
                (H * rng.uniform(0.15, 0.85), W * rng.uniform(0.15, 0.85)),
                rng,
            )
            for _ in range(1 + (rng.random() < 0.3))
        ]
        inside = np.max(blobs, axis=0)
        if 0.03 < (inside > 0).mean() < 0.2:
            break
    frequency, angle = rng.uniform(0.09, 0.16), rng.uniform(0, np.pi)
    turned = angle + rng.choice([-1, 1]) * np.deg2rad(rng.uniform(50, 90))
    blend = np.clip(inside / 3 + 0.5, 0, 1)[..., None]  # three pixels from one to the other
    colours = rng.normal(0, 1, (2, 3))
    ground, thing = (
        np.einsum("yxc,cd->yxd", np.stack([texture(size, frequency, a, rng) for _ in colours], -1), colours)
        for a in (angle, turned)
    )
    picture = (1 - blend) * ground + blend * thing
    y, x = np.mgrid[-1 : 1 : H * 1j, -1 : 1 : W * 1j]
    light = 1 + 0.3 * (rng.normal() * y + rng.normal() * x).clip(-1, 1)
    picture = 128 + 128 * 0.22 * picture / colours.std() * light[..., None] + 40 * (light - 1)[..., None]
    picture += rng.normal(0, 6, picture.shape)
    return picture.clip(0, 255).astype(np.uint8), np.where(inside > 0, 255, 0).astype(np.uint8)


def write(
    folder: Path, count: int, seed: int, size: tuple[int, int] = SIZE, names: tuple[str, str] = ("Image", "GT")
) -> Path:
    """A data set of `count` pairs."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture, mask = example(rng, size)
        Image.fromarray(picture).save(folder / names[0] / f"made-{i:04d}.png")
        Image.fromarray(mask).save(folder / names[1] / f"made-{i:04d}.png")
    return folder


def colour_threshold(picture: np.ndarray, mask: np.ndarray) -> float:
    """IoU of the best threshold, above or below, on any channel or their mean, smoothed or not: found by looking at the
    mask, so more than a colour threshold could know.
    """
    truth = mask > 127
    size = picture.shape[1::-1]
    small = Image.fromarray(picture).resize((size[0] // 8, size[1] // 8), Image.Resampling.BOX)
    smooth = np.asarray(small.resize(size, Image.Resampling.BILINEAR))
    best = 0.0
    for source in (picture.astype(float), smooth.astype(float)):
        for channel in (*np.moveaxis(source, -1, 0), source.mean(-1)):
            for threshold in np.quantile(channel, np.linspace(0.02, 0.98, 17)):
                for found in (channel > threshold, channel <= threshold):
                    best = max(best, (found & truth).sum() / (found | truth).sum())
    return best


if __name__ == "__main__":
    root, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 400
    write(root / "TrainDataset", count, seed=0)
    write(root / "TestDataset" / "made", count // 4, seed=1)
    rng = np.random.default_rng(2)
    found = [colour_threshold(*example(rng)) for _ in range(40)]
    print(
        f"{root}: {count} pictures to train on, {count // 4} to test on; a colour threshold's IoU {np.mean(found):.3f}"
    )
