"""2D rotary position embedding: patch centres -> angles -> cosine and sine half tables -> rotated queries and keys.

DINOv3 paper (arXiv 2508.10104), section 3.2; RoPE itself is arXiv 2104.09864.
Letters: P = h*w patches, N tokens (prefix and patches), D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DINOv3Config
from .tracing import writes_in_place


def rope_periods(config: DINOv3Config) -> Tensor:
    """The periods of the D/4 frequencies, theta ** (2i / (D/2)) for i = 0 .. D/4 - 1: (D/4,) float32 on the CPU."""
    # on the CPU, whatever the default device: arithmetic on the meta device would import sympy, a second's work
    exponents = torch.arange(config.head_dim // 4, dtype=torch.float32, device="cpu") / (config.head_dim // 4)
    return config.rope_theta**exponents


def patch_center_coords(h: int, w: int, device: torch.device | None = None) -> Tensor:
    """Patch centres (y, x) of an h x w grid, row by row, each axis scaled to [-1, 1]: (P, 2) float32."""
    y = torch.arange(0.5, h, device=device, dtype=torch.float32) / h
    x = torch.arange(0.5, w, device=device, dtype=torch.float32) / w
    return 2.0 * torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1) - 1.0


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of every head by its token's i-th angle.

    x: (B, N, heads, D); cos, sin: (N, D/2) or (B, N, D/2) float32. The rotation runs in the tables' dtype, the result
    has x's.

        x:   [ x0 x1 .. | y0 y1 .. ]
        out: [ x0 c0 - y0 s0, x1 c1 - y1 s1 .. | y0 c0 + x0 s0, y1 c1 + x1 s1 .. ]
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (.., N, 1, D/2)
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)
    if not writes_in_place(x):
        turned = torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)
        return torch.cat(turned, dim=-1).to(x.dtype)
    # the same numbers in fewer passes, each head's rows side by side, as the attention that follows reads them best
    heads_apart = torch.empty_like(x.transpose(-3, -2), dtype=cos.dtype, memory_format=torch.contiguous_format)
    out = heads_apart.transpose(-3, -2)
    out1, out2 = out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)
    return out.to(x.dtype)


class RotaryEmbedding2D(nn.Module):
    """Cosine and sine tables of a patch grid, in float32 whatever the model's dtype.

    `periods` (D/4,) belongs to the checkpoint: Meta's files hold them rounded to bfloat16, transformers computes them.
    They stay float32 under `.to(dtype)`, `.half()` and `.bfloat16()`.
    """

    periods: Tensor

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.register_buffer("periods", rope_periods(config).to(torch.empty(0).device))
        self.shift = config.pos_embed_shift
        self.jitter = config.pos_embed_jitter
        self.rescale = config.pos_embed_rescale

    def forward(self, h: int, w: int, num_prefix_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin: (num_prefix_tokens + P, D/2), in `dtype`. The rows of prefix tokens are the identity rotation.

        Computed once a forward, for all blocks: 0.1 ms, so that nothing is kept from one call to the next.
        """
        coords = patch_center_coords(h, w, self.periods.device)  # (P, 2)
        if self.training:
            coords = self._augment(coords)
        angles = 2 * math.pi * coords.to(dtype).unsqueeze(-1) / self.periods.to(dtype)  # (P, 2, D/4)
        angles = angles.flatten(1)  # (P, D/2): the frequencies of y, then those of x
        prefix = (0, 0, num_prefix_tokens, 0)
        return F.pad(angles.cos(), prefix, value=1.0), F.pad(angles.sin(), prefix, value=0.0)

    def _augment(self, coords: Tensor) -> Tensor:
        """Shift and jitter each axis, rescale both by one factor: the training-time augmentation of the coordinates.

        Random numbers are drawn in the order of both references, so equal seeds give equal tables.
        """

        def uniform(size: int, bound: float) -> Tensor:
            return torch.empty(size, device=coords.device, dtype=coords.dtype).uniform_(-bound, bound)

        if self.shift is not None:
            coords = coords + uniform(2, self.shift)
        if self.jitter is not None:
            coords = coords * uniform(2, abs(math.log(self.jitter))).exp()
        if self.rescale is not None:
            coords = coords * uniform(1, abs(math.log(self.rescale))).exp()
        return coords

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding2D:
        before = self.periods
        super()._apply(fn, recurse)
        source = self.periods if before.is_meta else before
        self.periods = source.to(self.periods.device, torch.float32)  # moved, never cast
        return self
