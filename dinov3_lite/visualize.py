"""Pictures of patch features: principal components as colours, similarity to one patch as heat. Needs pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .extras import needed

if TYPE_CHECKING:
    from PIL import Image

PANEL_HEIGHT, MARGIN, CAPTION_HEIGHT = 448, 8, 24  # pixels
PANEL_WIDTH = 4 * PANEL_HEIGHT  # at most: a panorama's panel is lower instead
NEAREST = 0  # Pillow's number for it


def pca_colours(feature_maps: Tensor) -> Tensor:
    """Colours from patch tokens: their first three principal components, each stretched to [0, 1].

    (B, C, h, w) -> (B, h, w, 3). One basis serves the whole batch: a colour means the same in all of its pictures.
    """
    tokens = _tokens(feature_maps)
    flat = tokens.flatten(0, 2)
    centred = flat - flat.mean(dim=0)
    eigenvectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)[:, :3]  # (C, 3), largest first
    components = centred @ eigenvectors
    low, high = (torch.quantile(components, q, dim=0) for q in (0.01, 0.99))
    return ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(*tokens.shape[:3], 3)


def foreground_pca(feature_maps: Tensor) -> Tensor:
    """Principal components of the foreground alone, on black: (B, C, h, w) -> (B, h, w, 3), in [0, 1].

    The recipe behind the paper's pictures: three components fitted to the foreground's patches, whitened, times two,
    through a sigmoid. The foreground is found without labels: Otsu's threshold on the first component of all patches
    makes two parts, and the one that touches the pictures' borders less is the foreground. Without one, all is black.
    """
    tokens = _tokens(feature_maps)
    B, h, w, _ = tokens.shape
    flat = tokens.flatten(0, 2)
    first = _components(flat, 1)[:, 0]
    inside = (first > _otsu(first)).view(B, h, w)
    border = torch.ones(h, w, dtype=torch.bool, device=tokens.device)
    border[1:-1, 1:-1] = False
    if inside[:, border].float().mean() > (~inside)[:, border].float().mean():
        inside = ~inside
    chosen = inside.flatten()
    colours = torch.zeros(len(flat), 3, dtype=torch.float32, device=flat.device)
    if chosen.sum() > 3:
        components = _components(flat[chosen], 3)
        colours[chosen] = torch.sigmoid(2 * components / components.std(0).clamp_min(1e-12))
    return colours.view(B, h, w, 3)


def _tokens(feature_maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h, w, C), float32. Raises ValueError for another rank."""
    _check("feature_maps", feature_maps, ("batch", "channels", "rows", "columns"))
    return feature_maps.float().permute(0, 2, 3, 1)


def _check(name: str, found: Tensor, axes: tuple[str, ...]) -> None:
    if found.ndim != len(axes):
        raise ValueError(f"{name} has shape {tuple(found.shape)}: expected ({', '.join(axes)})")


def _components(vectors: Tensor, count: int) -> Tensor:
    """The first principal components of vectors (n, C): (n, count), the largest weight of each positive."""
    centred = vectors - vectors.mean(0)
    basis = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)[:, :count]
    largest = basis.take_along_dim(basis.abs().argmax(0, keepdim=True), dim=0)
    return centred @ (basis * largest.sign())


def _otsu(values: Tensor) -> Tensor:
    """The threshold that parts values into two with the least variance within each (Otsu, 1979)."""
    ordered = values.sort().values
    if len(ordered) == 1:
        return ordered[0]
    n = torch.arange(1, len(ordered), device=values.device)
    low = ordered.cumsum(0)[:-1]
    between = (low / n - (ordered.sum() - low) / (len(ordered) - n)) ** 2 * n * (len(ordered) - n)
    cut = between.argmax()
    return (ordered[cut] + ordered[cut + 1]) / 2


def similarity(feature_map: Tensor, row: int, column: int) -> Tensor:
    """Cosine similarity of every patch token to the one at (row, column): (C, h, w) -> (h, w), in [-1, 1]."""
    _check("feature_map", feature_map, ("channels", "rows", "columns"))
    directions = F.normalize(feature_map.float(), dim=0)
    return torch.einsum("chw,c->hw", directions, directions[:, row, column])


def panel_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that a picture of this size is drawn with."""
    scale = min(PANEL_HEIGHT / height, PANEL_WIDTH / width)
    return max(1, round(scale * height)), max(1, round(scale * width))


def draw(rows: list[list[tuple[Tensor, str]]]) -> Image.Image:
    """A sheet of panels with captions: (h, w, 3) colours or (h, w) values, in [0, 1].

    Each row starts with a photo, to whose size its other panels are enlarged.
    """
    with needed("drawing pictures", "Pillow", "'dinov3-lite[images]'"):
        from PIL import Image, ImageDraw

    sheet_rows = []
    for row in rows:
        height, width = row[0][0].shape[:2]
        sheet_rows.append([(_panel(content).resize((width, height), NEAREST), caption) for content, caption in row])
    width = max(sum(panel.width + MARGIN for panel, _ in row) for row in sheet_rows) + MARGIN
    height = sum(row[0][0].height + CAPTION_HEIGHT + MARGIN for row in sheet_rows) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for sheet_row in sheet_rows:
        x = MARGIN
        for panel, caption in sheet_row:
            sheet.paste(panel, (x, y))
            pen.text((x, y + panel.height + 6), caption, fill="black")
            x += panel.width + MARGIN
        y += sheet_row[0][0].height + CAPTION_HEIGHT + MARGIN
    return sheet


def _panel(content: Tensor) -> Image.Image:
    from PIL import Image, ImageOps

    pixels = Image.fromarray((content * 255).round().to(torch.uint8).cpu().numpy())
    return pixels if content.ndim == 3 else ImageOps.colorize(pixels, black="#0b0724", mid="#b63679", white="#fcfdbf")
