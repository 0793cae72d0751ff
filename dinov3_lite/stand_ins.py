"""What stands in for a block on a CPU: the same equations in fewer passes, with weights packed as is fastest there.

    x = x + gamma1 * proj(attend(rotate(qkv(norm1(x)))))
    x = x + gamma2 * mlp(norm2(x))

What is small is cast to float32 once, when the stand-in is made. Rows of the queries' and keys' weights change places,
so that the two numbers which RoPE rotates lie side by side: one product of complex numbers then rotates them all, and
the scores, sums over all numbers of a head, are the same.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import resolve_attention
from .attention_ways import ATTENTIONS, Attend, sdpa, sdpa_of_sixteens, sixteens, ways_of_attention
from .choices import Choices
from .convnext import ConvNeXtBlock, Downsample
from .folding import PixelConv, copy_sharing_weights
from .layers import Block, GatedMlp, LayerNorm, Mlp, PatchEmbed, patches_of
from .packing import Tokens, unpack
from .projection import Projection
from .rope import apply_rope
from .stopwatch import Calls, normal

ANY_TOKENS = (201, 1029, 2030)
"""Where sizes are free, attention is timed with the nearest of these numbers of tokens: of 224, 512 and 720 pixels."""


def way_of_attention(choices: Choices, shape: torch.Size, dtype: torch.dtype, dynamic: bool) -> Attend:
    """The fastest way of attending with queries of this shape, (B, N, heads, D), or about so many if sizes are free."""
    B, N, heads, D = shape
    if dynamic:
        B, N = min(B, 2), min(ANY_TOKENS, key=lambda tokens: abs(tokens - N))
    about = "about " if dynamic else ""
    question = f"attention {about}{B} x {N} tokens, {heads} heads of {D}, {str(dtype).removeprefix('torch.')}"

    def prepare(way: str) -> Calls:
        tokens = min(N, ANY_TOKENS[-1])
        rows = rows_for(ATTENTIONS[way], tokens)
        q, k, v = normal(dtype, B, rows, 3, heads, D).unbind(2)
        return [partial(ATTENTIONS[way], q[:, :tokens], k, v)]

    return ATTENTIONS[choices.way(question, ways_of_attention(dtype), prepare)]


def rows_for(attend: Attend, tokens: int) -> int:
    """How many rows of queries, keys and values a way of attention takes for so many tokens without copying any."""
    return sixteens(tokens) if attend is sdpa_of_sixteens else tokens


class PreparedAttention:
    """The attention of one call, for each of its sequences: in the way that was chosen, or as `name` says."""

    def __init__(self, tokens: Tokens, name: str, choices: Choices, dynamic: bool) -> None:
        self.cos, self.sin, self.shapes = tokens.cos, tokens.sin, tokens.shapes
        self.batch, self.tokens = tokens.x.shape[:2]
        self.name, self.choices, self.dynamic = name, choices, dynamic
        self.chosen: dict[torch.Size, Attend] = {}
        self.rotations: dict[int, Tensor] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As any attention function, for a block that runs as it is."""
        return self.attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)

    def rows(self, num_heads: int, dtype: torch.dtype) -> int:
        """How many rows a fused projection of each sequence is to have: maybe more than there are tokens."""
        if self.name != "auto" or self.shapes is not None:
            return self.tokens
        shape = torch.Size((self.batch, self.tokens, num_heads, 2 * self.cos.shape[-1]))
        return rows_for(self._way(shape, dtype), self.tokens)

    def of_pairs(self, qkv: Tensor, num_heads: int, first: int | None = None) -> Tensor:
        """Rotate and attend within a fused projection whose queries and keys lie pair by pair: (B, `rows`, 3C) ->
        (B, N, C).

        first: compute the outputs of the first so many queries alone, of a projection without more rows: (B, first, C).
        """
        C = qkv.shape[-1] // 3
        rotation = self._rotation(qkv.shape[1])
        q, k = rotate_pairs(qkv[..., : 2 * C].unflatten(-1, (2 * num_heads, -1)), rotation).chunk(2, dim=-2)
        v = qkv[..., 2 * C :].unflatten(-1, (num_heads, -1))
        out = self.attend(q[:, : self.tokens], k, v) if first is None else sdpa(q[:, :first], k, v)
        return out.flatten(-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with queries and keys that are rotated already: (B, N, heads, D) each, or packed."""
        if self.shapes is None:
            return self._one_size(q, k, v)
        batches = zip(*(unpack(x.squeeze(0), self.shapes) for x in (q, k, v)), strict=True)
        return torch.cat([self._one_size(*batch).flatten(0, 1) for batch in batches]).unsqueeze(0)

    def _one_size(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.name == "auto":
            return self._way(q.shape, q.dtype)(q, k, v)
        still = self.cos.new_ones(q.shape[1], q.shape[-1] // 2)
        attend = resolve_attention(self.name)
        return attend(q, k, v, still, torch.zeros_like(still))  # what is rotated stays where it is

    def _way(self, shape: torch.Size, dtype: torch.dtype) -> Attend:
        if shape not in self.chosen:
            self.chosen[shape] = way_of_attention(self.choices, shape, dtype, self.dynamic)
        return self.chosen[shape]

    def _rotation(self, rows: int) -> Tensor:
        """The complex numbers of RoPE, (.., rows, 1, D/2): zero behind the last token."""
        if rows not in self.rotations:
            more = (0, 0, 0, rows - self.cos.shape[-2])
            self.rotations[rows] = torch.complex(F.pad(self.cos, more), F.pad(self.sin, more)).unsqueeze(-2)
        return self.rotations[rows]


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply numbers 2i and 2i + 1 of a head, as one complex number, by the token's i-th: (.., D) -> (.., D).

    An x that is as wide as the rotation is overwritten.
    """
    wide = x.to(rotation.real.dtype)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(rotation)
    return wide.to(x.dtype)


def pair_by_pair(num_heads: int, channels: int) -> Tensor:
    """The order of a fused projection's rows in which a head's i-th and (i + D/2)-th query and key are neighbours."""
    rows = torch.arange(3 * channels, device="cpu")
    qk = rows[: 2 * channels].view(2 * num_heads, 2, -1).transpose(1, 2).flatten()
    return torch.cat((qk, rows[2 * channels :]))


class FastMlp(nn.Module):
    """fc2(act(fc1(x))), with the activation in the first product's own call where that can be."""

    def __init__(self, mlp: Mlp, choices: Choices, dynamic: bool) -> None:
        super().__init__()
        self.fc1 = Projection(mlp.fc1, choices, dynamic, mlp.act)
        self.fc2 = Projection(mlp.fc2, choices, dynamic)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class FastGatedMlp(nn.Module):
    """w3(act(w1 x) * (w2 x))."""

    def __init__(self, mlp: GatedMlp, choices: Choices, dynamic: bool) -> None:
        super().__init__()
        self.act = getattr(F, mlp.act)
        self.w12 = Projection(mlp.w12, choices, dynamic)
        self.w3 = Projection(mlp.w3, choices, dynamic)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.act(gate).mul_(value))


class FastBlock(nn.Module):
    """A ViT's block: (B, N, C) -> (B, N, C); or (B, first, C), where no others are wanted."""

    def __init__(self, block: Block, choices: Choices, dynamic: bool) -> None:
        super().__init__()
        attn = block.attn
        self.num_heads = attn.num_heads
        self.norm1, self.norm2 = FastNorm(block.norm1), FastNorm(block.norm2)
        self.gamma1, self.gamma2 = block.ls1.gamma.detach().float(), block.ls2.gamma.detach().float()
        order = pair_by_pair(attn.num_heads, attn.qkv.in_features)
        self.qkv = Projection(attn.qkv, choices, dynamic, order=order)
        self.proj = Projection(attn.proj, choices, dynamic)
        fast = FastGatedMlp if isinstance(block.mlp, GatedMlp) else FastMlp
        self.mlp = fast(block.mlp, choices, dynamic)  # type: ignore[arg-type]

    def pack(self, attention: PreparedAttention) -> None:
        """Pack every weight for the rows of this call, if it is not yet."""
        for module in self.modules():
            if isinstance(module, Projection):
                each = attention.rows(self.num_heads, self.norm1.dtype) if module is self.qkv else attention.tokens
                module.packed_for(attention.batch * each)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: PreparedAttention, first: int | None = None
    ) -> Tensor:
        rows = x.shape[1] if first is not None else attention.rows(self.num_heads, self.norm1.dtype)
        attended = attention.of_pairs(self.qkv(self.norm1(x, rows)), self.num_heads, first)
        x = torch.addcmul(x[:, :first], self.proj(attended), self.gamma1).to(x.dtype)
        return x.addcmul_(self.mlp(self.norm2(x)), self.gamma2)  # nobody else holds this sum


class FastNorm(nn.Module):
    """LayerNorm in float32, or of a narrower x in float32 inside, returned in the weights' dtype."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps, self.dtype = norm.normalized_shape, norm.eps, norm.weight.dtype
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        self.weight, self.bias = norm.weight.detach().float(), bias.detach().float()

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """rows: of the result, (.., rows, C), zeros behind those of x; None: as many as x has."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = torch.layer_norm(x, self.shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        if rows is None or rows == x.shape[-2]:
            return normed.to(self.dtype)
        out = normed.new_empty(*x.shape[:-2], rows, x.shape[-1], dtype=self.dtype)
        out[..., : x.shape[-2], :] = normed
        out[..., x.shape[-2] :, :] = 0.0
        return out


class FastConvNeXtBlock(nn.Module):
    """A ConvNeXt's block: (B, h, w, C) -> (B, h, w, C)."""

    def __init__(self, block: ConvNeXtBlock, choices: Choices, dynamic: bool) -> None:
        super().__init__()
        self.dwconv = copy_sharing_weights(block.dwconv)
        for name, weight in block.dwconv.named_parameters():
            setattr(self.dwconv, name, nn.Parameter(weight.detach().float(), requires_grad=False))
        self.norm = FastNorm(block.norm)
        self.mlp = FastMlp(block.mlp, choices, dynamic)
        self.gamma = block.ls.gamma.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.mlp(self.norm(self.dwconv(x))), self.gamma).to(x.dtype)


class FastPatchEmbed(nn.Module):
    """A ViT's first layer as a matrix product, in float32 or wider: (B, 3, H, W) -> (B, P, C). Of a PixelConv too.

    What enters the residual stream is not rounded, in a forward as fast as with a convolution in half precision.
    """

    def __init__(self, embed: PatchEmbed, choices: Choices, dynamic: bool) -> None:
        super().__init__()
        conv: nn.Conv2d | PixelConv = embed.proj
        self.sides, self.dtype = tuple(conv.weight.shape[2:]), torch.promote_types(conv.weight.dtype, torch.float32)
        self.centre = conv.centre if isinstance(conv, PixelConv) else None
        weight = conv.weight.detach().to(self.dtype).flatten(1)
        self.product = Projection(as_linear(conv, weight), choices, dynamic)

    def forward(self, x: Tensor) -> Tensor:
        # (B, h, w, 3, p, q); a copy whatever x is, since it is written to
        together = patches_of(x, *self.sides).to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        if self.centre is not None:
            together -= self.centre
        return self.product(together.flatten(3).flatten(1, 2))


class FastDownsample(nn.Module):
    """A ConvNeXt's step down as a matrix product: (B, h, w, C) -> (B, h/2, w/2, C')."""

    def __init__(self, step: Downsample, choices: Choices, dynamic: bool) -> None:
        super().__init__()
        self.norm, self.sides = FastNorm(step.norm), tuple(step.conv.weight.shape[2:])
        weight = step.conv.weight.detach().permute(0, 2, 3, 1).flatten(1)
        self.product = Projection(as_linear(step.conv, weight), choices, dynamic)

    def forward(self, x: Tensor) -> Tensor:
        (p, q), (H, W) = self.sides, x.shape[1:3]
        h, w = H // p, W // q
        pixels = self.norm(x[:, : h * p, : w * q]).unflatten(2, (w, q)).unflatten(1, (h, p))  # (B, h, p, w, q, C)
        return self.product(pixels.transpose(2, 3).flatten(3)).to(x.dtype)


def is_of_patches(conv: nn.Conv2d | PixelConv) -> bool:
    """Whether each patch of a convolution is of its own pixels, and of all channels."""
    return PixelConv.fits(conv) and conv.stride == tuple(conv.weight.shape[2:])  # one number as a stride is no tuple


def as_linear(conv: nn.Conv2d | PixelConv, weight: Tensor) -> nn.Linear:
    """The layer that multiplies patches by this weight, (out, in), and adds the convolution's bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().to(weight.dtype), requires_grad=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


def stand_in(module: nn.Module, choices: Choices, dynamic: bool) -> nn.Module:
    """Return a module that computes the same as this block, step down or first layer; it packs its weights when it
    first runs. A ConvNeXt's stem, and what has another convolution, is returned as it is.
    """
    if isinstance(module, Block):
        return FastBlock(module, choices, dynamic)
    if isinstance(module, ConvNeXtBlock):
        return FastConvNeXtBlock(module, choices, dynamic)
    if isinstance(module, Downsample) and is_of_patches(module.conv):
        return FastDownsample(module, choices, dynamic)
    if isinstance(module, PatchEmbed) and is_of_patches(module.proj):
        return FastPatchEmbed(module, choices, dynamic)
    return module
