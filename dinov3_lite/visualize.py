"""Pictures of patch features: principal components as colours, similarity to one patch as heat. Needs pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

PANEL_HEIGHT, MARGIN, CAPTION_HEIGHT = 448, 8, 24  # pixels
NEAREST = 0  # Pillow's number for it


def pca_colours(feature_maps: Tensor) -> Tensor:
    """The first three principal components of all patch tokens, each stretched to [0, 1]: (B, C, h, w) -> (B, h, w, 3).

    One basis serves the whole batch, so that colours mean the same in all of its pictures.
    """
    tokens = feature_maps.float().permute(0, 2, 3, 1)  # (B, h, w, C)
    flat = tokens.flatten(0, 2)
    centred = flat - flat.mean(dim=0)
    eigenvectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)[:, :3]  # (C, 3), largest first
    components = centred @ eigenvectors
    low, high = (torch.quantile(components, q, dim=0) for q in (0.01, 0.99))
    return ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(*tokens.shape[:3], 3)


def similarity(feature_map: Tensor, row: int, column: int) -> Tensor:
    """Cosine similarity of every patch token to the one at (row, column): (C, h, w) -> (h, w), in [-1, 1]."""
    directions = F.normalize(feature_map.float(), dim=0)
    return torch.einsum("chw,c->hw", directions, directions[:, row, column])


def draw(rows: list[list[tuple[Tensor, str]]]) -> Image.Image:
    """A sheet of panels with captions: (h, w, 3) colours or (h, w) values, in [0, 1].

    Each row starts with a photo of PANEL_HEIGHT pixels, and its other panels are enlarged to the photo's size.
    """
    from PIL import Image, ImageDraw

    sheet_rows = []
    for row in rows:
        height, width = row[0][0].shape[:2]
        sheet_rows.append([(_panel(content).resize((width, height), NEAREST), caption) for content, caption in row])
    width = max(sum(panel.width + MARGIN for panel, _ in row) for row in sheet_rows) + MARGIN
    height = len(rows) * (PANEL_HEIGHT + CAPTION_HEIGHT + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for sheet_row in sheet_rows:
        x = MARGIN
        for panel, caption in sheet_row:
            sheet.paste(panel, (x, y))
            pen.text((x, y + PANEL_HEIGHT + 6), caption, fill="black")
            x += panel.width + MARGIN
        y += PANEL_HEIGHT + CAPTION_HEIGHT + MARGIN
    return sheet


def _panel(content: Tensor) -> Image.Image:
    from PIL import Image, ImageOps

    pixels = Image.fromarray((content * 255).round().to(torch.uint8).cpu().numpy())
    return pixels if content.ndim == 3 else ImageOps.colorize(pixels, black="#0b0724", mid="#b63679", white="#fcfdbf")
