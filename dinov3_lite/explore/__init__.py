"""One self-contained page to look at the features of pictures with: opened by a double click, nothing fetched.

`page.html`, `page.css`, `features.js` and `page.js` are the page; this module measures, packs and puts them together.
Patch vectors go into it as int8, and what that costs in cosine similarity is measured and
written at its foot.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needed
from ..image import ImageProcessor
from ..loading import Backbone

ROOM = Path(__file__).parent
COMFORT, LIMIT = 2_000_000, 100_000_000  # bytes that pages have unless asked for more, and that browsers still open
PHOTO_SIDE = 1024  # pixels, the longer side of photos in the page
PHOTO_BYTES = 250_000  # about, of such a photo


def grid_of(pixels: np.ndarray, size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture (H, W, 3).

    size: pixels of the longer side, at the picture's own aspect; or (height, width).

    Raises ValueError for a size that is no multiple of the patch size.
    """
    sides = (size,) if isinstance(size, int) else size
    if any(side < patch or side % patch for side in sides):
        raise ValueError(f"size is {' x '.join(map(str, sides))}: expected multiples of {patch}, the pixels of a patch")
    if not isinstance(size, int):
        return size[0] // patch, size[1] // patch
    scale = size / max(pixels.shape[:2])
    rows, columns = (max(1, round(scale * side / patch)) for side in pixels.shape[:2])
    return rows, columns


def page_bytes(grids: Sequence[tuple[int, int]], model: Backbone, blocks: Sequence[int]) -> int:
    """About how many bytes a page of pictures with these grids and of these blocks has."""
    patches, heads = sum(rows * columns for rows, columns in grids), model.num_heads
    layers = sum(patches * (C + 4 + heads) + len(grids) * 5 * C for C in (model.embed_dims[i] for i in blocks))
    return 40_000 + len(grids) * PHOTO_BYTES + layers * 4 // 3


def blocks_that_fit(grids: Sequence[tuple[int, int]], model: Backbone) -> list[int]:
    """Indices of as many blocks as fit into a page of two megabytes: spread over the depth, the last among them."""
    spread = [sorted({model.depth - 1 - (model.depth * i) // n for i in range(n)}) for n in range(1, model.depth + 1)]
    fits = [blocks for blocks in spread if page_bytes(grids, model, blocks) <= COMFORT]
    return fits[-1] if fits else spread[0]


def check_size(grids: Sequence[tuple[int, int]], model: Backbone, blocks: Sequence[int]) -> None:
    """Raise ValueError where the page would be more than a browser opens."""
    size = page_bytes(grids, model, blocks)
    if size > LIMIT:
        raise ValueError(
            f"the page would have about {size / 1e6:.0f} MB, for {len(grids)} pictures and {len(blocks)} blocks, and "
            f"browsers open up to {LIMIT / 1e6:.0f}: give a smaller size, fewer pictures or fewer blocks"
        )


@dataclass(frozen=True)
class Quantised:
    """Vectors (n, C) as int8, with a scale for each vector and one for each channel, as some channels are far larger
    than others: scales[i] * channels[c] * values[i, c] is about the vectors.
    """

    values: Tensor
    scales: Tensor
    channels: Tensor

    @classmethod
    def of(cls, vectors: Tensor, channels: Tensor | None = None) -> Quantised:
        """channels: scales to use, those of other vectors; the largest magnitude of each channel unless given."""
        channels = vectors.abs().amax(0).clamp_min(1e-12) if channels is None else channels
        even = vectors / channels
        scales = even.abs().amax(1).clamp_min(1e-12) / 127
        return cls((even / scales[:, None]).round().to(torch.int8), scales, channels)

    def cosine_error(self, vectors: Tensor, queries: int = 512) -> float:
        """The largest error of a cosine similarity between up to `queries` of the vectors and all of them."""
        some = torch.linspace(0, len(vectors) - 1, min(queries, len(vectors)), device="cpu").long()
        exact, kept = (F.normalize(v.double(), dim=1) for v in (vectors, self.channels * self.values))
        return (exact[some] @ exact.T - kept[some] @ kept.T).abs().max().item()


@torch.no_grad()
def explore(
    pictures: Sequence[tuple[str, np.ndarray]],
    model: Backbone,
    processor: ImageProcessor,
    grids: Sequence[tuple[int, int]],
    blocks: Sequence[int],
) -> str:
    """Compute the features of pictures and return one self-contained HTML page that shows them.

    model: a ConvNeXt's stages are its blocks, on the grid of its `patch_size`, which must be set.
    pictures: (name, (H, W, 3) uint8). grids: (rows, columns) of patches for each. blocks: ascending block indices;
        their outputs are shown after the final LayerNorm (of a ConvNeXt the last alone, as the others have none).
    """
    packed, error, p = [], 0.0, model.patch_size
    assert p is not None  # else a ConvNeXt's stages have a grid each
    for (name, pixels), (rows, columns) in zip(pictures, grids, strict=True):
        size = (rows * p, columns * p)
        pixel_values = replace(processor, size=size)(pixels)["pixel_values"].to(model.device)
        layers = []
        outputs = model.get_intermediate_layers(pixel_values, n=list(blocks), return_class_token=True)
        for block, (patches, cls) in zip(blocks, outputs, strict=True):
            vectors = patches[0].float().cpu()
            quantised = Quantised.of(vectors)
            error = max(error, quantised.cosine_error(vectors))
            attention = torch.empty(0, len(vectors))  # (heads, patches)
            if model.num_heads:
                attention = model.attention_maps(pixel_values, block)[0].float().cpu().flatten(1)
            peaks = attention.amax(1).clamp_min(1e-12)
            layers.append(
                {
                    "vectors": _base64(quantised.values),
                    "scales": _base64(quantised.scales),
                    "channels": _base64(quantised.channels),
                    "cls": _base64(Quantised.of(cls.float().cpu(), quantised.channels).values),
                    "attention": _base64((255 * attention / peaks[:, None]).round().to(torch.uint8)),
                    "peaks": peaks.tolist(),
                }
            )
        packed.append(
            {
                "name": name,
                "width": pixels.shape[1],
                "height": pixels.shape[0],
                "rows": rows,
                "columns": columns,
                "photo": _photo(pixels),
                "layers": layers,
            }
        )
    content = {
        "model": model.config.name,
        "weights": model.weights_id,
        "dims": [model.embed_dims[i] for i in blocks],
        "heads": model.num_heads,
        "patch": p,
        "blocks": list(blocks),
        "cosineError": error,
        "pictures": packed,
    }
    return _page(content, "made, not trained" in model.weights_id)


def _page(content: dict[str, Any], made: bool) -> str:
    style, features, page = ((ROOM / name).read_text("utf-8") for name in ("page.css", "features.js", "page.js"))
    names = ", ".join(picture["name"] for picture in content["pictures"])
    weights = f"{content['model']}, weights {content['weights']}"
    made_banner = (
        '<p class="banner" role="note">The weights are made, not trained: what looks alike here means nothing.</p>'
    )
    parts = {
        "policy": (
            f"default-src 'none'; img-src data:; style-src {_source(style)}; "
            f"script-src {_source(features)} {_source(page)}; base-uri 'none'; form-action 'none'"
        ),
        "title": html.escape(f"{names} · {weights}"),
        "weights": html.escape(weights),
        "banner": made_banner if made else "",
        "style": style,
        "features": features,
        "page": page,
        # the data ends where its element does, so no "<" may stand in it; in JSON it can be written otherwise
        "data": json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (ROOM / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], template)


def _source(text: str) -> str:
    """What a content security policy calls an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _base64(tensor: Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def _photo(pixels: np.ndarray) -> str:
    """A JPEG of the picture as a data URL, its longer side at most PHOTO_SIDE pixels."""
    with needed("writing photos into the page", "Pillow", "'dinov3-lite[images]'"):
        from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    buffer = BytesIO()
    picture.save(buffer, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
