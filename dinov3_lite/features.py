"""What Meta's and timm's classes have, by their names and with their meaning: sizes, and ways to get features.

The ways are functions over a DINOv3ViT's embed and run_blocks, which the class binds as its methods.
Letters: B batch, R register tokens, h w patch grid, N = 1 + R + h*w, C embedding.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import patch_grid
from .config import DINOv3Config


class Sizes(nn.Module):
    """A model's sizes as attributes, read off its modules: they stay right when some are dropped, added or replaced."""

    cls_token: nn.Parameter
    register_tokens: nn.Parameter
    patch_embed: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module
    config: DINOv3Config

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def embed_dim(self) -> int:
        """C, the width of a token."""
        return self.cls_token.shape[-1]

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """The width of each block's tokens: all alike."""
        return (self.embed_dim,) * self.depth

    @property
    def n_storage_tokens(self) -> int:
        """R, how many register tokens there are."""
        return self.register_tokens.shape[1]

    @property
    def num_prefix_tokens(self) -> int:
        """1 + R, how many tokens stand before the patch tokens."""
        return 1 + self.n_storage_tokens

    @property
    def num_heads(self) -> int:
        """How many attention heads a block has (read off the first)."""
        attn: Any = self.blocks[0].attn
        return attn.num_heads

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels."""
        return getattr(self.patch_embed, "patch_size", self.config.patch_size)

    @property
    def stride(self) -> int:
        """How many pixels a patch token stands for, along one side."""
        return self.patch_size

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each block's patch tokens: all alike."""
        return (self.stride,) * self.depth

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns (h, w) of patch tokens for an image of this size in pixels.

        Raises ValueError unless both sides are multiples of the patch size.
        """
        return patch_grid(height, width, self.patch_size)

    @property
    def layers(self) -> list[tuple[nn.Module, ...]]:
        """The groups of modules that `finetune` counts as layers, first to last: one block each."""
        return [(block,) for block in self.blocks]

    @property
    def num_channels(self) -> int:
        """The channels of an image."""
        return getattr(self.patch_embed, "num_channels", self.config.num_channels)

    n_blocks = depth
    num_features = embed_dim
    packs = True
    """Whether images of different sizes can run as one sequence."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of what `forward` returns. Under float16 some tokens are kept in float32."""
        return dtype_of(self.norm, self.blocks, self.patch_embed)

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        return self.cls_token.device


def dtype_of(*modules: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter of these modules."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def get_intermediate_layers(
    model: Any,
    x: Tensor,
    n: int | str | Sequence[int] = 1,
    reshape: bool = False,
    return_class_token: bool = False,
    return_extra_tokens: bool = False,
    norm: bool = True,
) -> tuple[Any, ...]:
    """Return the outputs of the last n blocks, or of the blocks that n lists, in ascending order: Meta's method.

    x: (B, 3, H, W) normalised images.
    n: a count; a list of block indices, negative ones counted from the end; "quarters", the blocks at 1/4, 2/4, 3/4
        and 4/4 of the depth; or "dpt", the four that Meta's DPT heads read (4, 11, 17 and 23 of 24 blocks, otherwise
        the quarters).
    norm: apply the final LayerNorm, to intermediate blocks too.

    Each output is the patch tokens (B, h*w, C), or (B, C, h, w) with `reshape`. With `return_class_token` or
    `return_extra_tokens` it is a tuple that continues with the CLS token (B, C) and the register tokens (B, R, C).

    Raises ValueError for a count or an index that the model does not have, and for images that `forward` refuses.
    """
    taps = block_indices(model, n)
    tokens, grid = model.embed(x)
    outputs: list[tuple[Tensor, ...]] = []
    for state in model.run_blocks(tokens, taps):
        patches, prefix = patches_and_prefix(model, state, grid, norm, reshape)
        cls_token = (prefix[:, 0],) if return_class_token else ()
        registers = (prefix[:, 1:],) if return_extra_tokens else ()
        outputs.append((patches, *cls_token, *registers))
    return tuple(o if return_class_token or return_extra_tokens else o[0] for o in outputs)


def forward_features(model: Any, x: Tensor | list[Tensor], masks: Any = None) -> Any:
    """Return Meta's dictionary of features, or a list of them for a list of batches.

    x: (B, 3, H, W) normalised images; or a list of such batches, crops of different sizes, which run as one pack.
    masks: as `bool_masked_pos` of `forward`; for a list of batches a list of masks or Nones.

    The dictionary holds x_norm_clstoken (B, C), x_storage_tokens (B, R, C) and x_norm_patchtokens (B, h*w, C), all
    after the final LayerNorm; x_prenorm (B, N, C), the last block's output before it; and masks.

    Raises ValueError as `forward` does, and for lists that are empty or of different lengths.
    """
    if isinstance(x, Tensor):
        return forward_features(model, [x], [masks])[0]
    x = list(x)
    masks = [None] * len(x) if masks is None else masks
    if not x or len(masks) != len(x):
        raise ValueError(f"x is a list of {len(x)} batches and masks of {len(masks)}: expected as many, at least one")
    batches = [model.embed(*pair)[0] for pair in zip(x, masks, strict=True)]
    (prenorms,) = model.run_packed(batches, (model.depth - 1,))
    return [_dictionary(model, prenorm, mask) for prenorm, mask in zip(prenorms, masks, strict=True)]


def _dictionary(model: Any, prenorm: Tensor, masks: Tensor | None) -> dict[str, Tensor | None]:
    normed = model.norm(prenorm)
    return {
        "x_norm_clstoken": normed[:, 0],
        "x_storage_tokens": normed[:, 1 : model.num_prefix_tokens],
        "x_norm_patchtokens": normed[:, model.num_prefix_tokens :],
        "x_prenorm": as_output(model, prenorm),
        "masks": masks,
    }


def forward_intermediates(
    model: Any,
    x: Tensor,
    indices: int | str | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> Any:
    """Return the last hidden state and a list of block outputs, or the list alone: timm's method.

    x: (B, 3, H, W) normalised images.
    indices: as n of `get_intermediate_layers`; None is every block.
    return_prefix_tokens: make each block's output a pair with its prefix tokens (B, 1 + R, C).
    norm: apply the final LayerNorm to the blocks' outputs.
    stop_early: run no block after the last one asked for; the first result is then the norm of that block's output.
    output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h*w, C).
    intermediates_only: return the list alone, and run no block after the last one asked for.

    Raises ValueError for an index that the model does not have and for another output_fmt.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is {output_fmt!r}: expected 'NCHW' or 'NLC'")
    taps = block_indices(model, model.depth if indices is None else indices, "indices")
    last = taps[-1] if intermediates_only or stop_early else model.depth - 1
    tokens, grid = model.embed(x)
    states = model.run_blocks(tokens, sorted({*taps, last}))
    outputs: list[Any] = []
    for state in states[: len(taps)]:
        patches, prefix = patches_and_prefix(model, state, grid, norm, output_fmt == "NCHW")
        outputs.append((patches, prefix) if return_prefix_tokens else patches)
    return outputs if intermediates_only else (model.norm(states[-1]), outputs)


def feature_info(model: Any) -> list[dict[str, Any]]:
    """The module, num_chs (channels) and reduction (stride) of each block's output, as timm describes them."""
    info = {"num_chs": model.embed_dim, "reduction": model.patch_size}
    return [{"module": f"blocks.{i}", **info} for i in range(model.depth)]


def block_index(model: Any, block: int) -> int:
    """The index of a block, counted from the end if negative. Raises ValueError for one that there is not."""
    try:
        return range(model.depth)[block]
    except (IndexError, TypeError):
        raise ValueError(
            f"block is {block!r}: expected the index of a block, from {-model.depth} to {model.depth - 1}"
        ) from None


def block_indices(model: Any, n: int | str | Sequence[int], name: str = "n") -> list[int]:
    """Return the ascending indices of the blocks that n stands for: see n of `get_intermediate_layers`.

    name: what errors call it.

    Raises ValueError for a count, a name or an index that the model does not have.
    """
    depth = model.depth
    n = n.tolist() if hasattr(n, "tolist") else n  # an array, a tensor, or a number out of one
    if isinstance(n, str):
        if n not in ("quarters", "dpt") or depth < 4:
            raise ValueError(f"{name} is {n!r} and the model has {depth} blocks: expected 'quarters' or 'dpt', and 4")
        quarters = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        return [4, 11, 17, 23] if n == "dpt" and depth == 24 else quarters
    if isinstance(n, int):
        if not 1 <= n <= depth:
            raise ValueError(f"{name} is {n}: expected a count of blocks from 1 to {depth}, or a list of indices")
        return list(range(depth - n, depth))
    try:
        indices = [operator.index(i) for i in n]
    except TypeError:
        raise ValueError(
            f"{name} is {n!r:.100}: expected a count of blocks, a list of their indices, 'quarters' or 'dpt'"
        ) from None
    if not indices or not all(-depth <= i < depth for i in indices):
        raise ValueError(f"{name} is {indices}: expected block indices from {-depth} to {depth - 1}")
    return sorted({i % depth for i in indices})


def patches_and_prefix(
    model: Any, state: Tensor, grid: tuple[int, int], norm: bool, reshape: bool
) -> tuple[Tensor, Tensor]:
    """Turn a block's output (B, N, C) into what users get: patch tokens (B, h*w, C), or (B, C, h, w) with `reshape`,
    and prefix tokens (B, 1 + R, C).

    norm: apply the final LayerNorm, which returns the weights' dtype; otherwise cast as `as_output` does.
    """
    state = model.norm(state) if norm else as_output(model, state)
    prefix, patches = state[:, : model.num_prefix_tokens], state[:, model.num_prefix_tokens :]
    return to_map(patches, grid) if reshape else patches, prefix


def to_map(patch_tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """View (B, h*w, C) as (B, C, h, w). Raises ValueError if there are not h*w tokens."""
    h, w = grid
    if patch_tokens.shape[1] != h * w:
        raise ValueError(
            f"a feature map needs all {h} x {w} patches, and {patch_tokens.shape[1]} were kept: use the patch tokens"
        )
    return patch_tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def as_output(model: Any, state: Tensor) -> Tensor:
    """Cast a state of the residual stream, which is float32 or wider inside, to the dtype that users get it in: the
    weights', but float32 where those are float16, which can't hold it.
    """
    return state.to(torch.float32 if model.dtype == torch.float16 else model.dtype)
