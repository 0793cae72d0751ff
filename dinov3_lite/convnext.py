"""DINOv3's ConvNeXt, top to bottom (arXiv 2201.03545, figure 4 and section 2; distilled in arXiv 2508.10104, 7.2).

    images (B, 3, H, W)
      stem           4x4 convolution of stride 4, LayerNorm
      stage 1        blocks                                           (B, H/4, W/4, C1)
      stage 2        LayerNorm, 2x2 convolution of stride 2, blocks   (B, H/8, W/8, C2)
      stage 3        likewise                                         (B, H/16, W/16, C3)
      stage 4        likewise                                         (B, H/32, W/32, C4)
      [mean; map]    LayerNorm                                        (B, 1 + h*w, C4)

Letters in the shape comments: B batch, H W image pixels, h w a stage's grid, C its channels. Grids are rounded down.
Inside, channels are last: the depthwise convolutions are fastest so, and norms and matrix products need no copy.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from . import convnext_features as features
from .checks import BATCH, check_dtype, check_kind
from .config import DINOv3ConvNeXtConfig
from .features import dtype_of
from .layers import DropPath, LayerNorm, LayerScale, Mlp, add_ours, untouched
from .model import DINOv3Output
from .pages import huge_pages_ahead
from .pretrained import Opening, Pretrained, open_source
from .tracing import writes_in_place

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Stem(nn.Module):
    """Patches of 4 x 4 pixels, each projected linearly and normed: (B, 3, H, W) -> (B, H/4, W/4, C1)."""

    def __init__(self, config: DINOv3ConvNeXtConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.num_channels, config.hidden_sizes[0], kernel_size=4, stride=4)
        self.norm = LayerNorm(config.hidden_sizes[0], eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        channels_last = pixel_values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.norm(self.conv(channels_last).permute(0, 2, 3, 1))

    @property
    def num_channels(self) -> int:
        """The channels of the images."""
        return self.conv.in_channels


class Downsample(nn.Module):
    """Half the resolution, between two stages: (B, h, w, C) -> (B, h/2, w/2, C').

    In float32 the convolution gets channels first: oneDNN then errs 2 to 5 times less than with channels last (measured
    for C from 96 to 768). In half precision both err alike, and channels last need no copy.
    """

    def __init__(self, channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(channels, eps=eps)
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x).permute(0, 3, 1, 2)
        if normed.dtype == torch.float32:
            normed = normed.contiguous()
        return self.conv(normed).permute(0, 2, 3, 1).to(x.dtype).contiguous()


class NoStep(nn.Identity):
    """What the first stage has in place of a step down."""


class DepthwiseConv(nn.Conv2d):
    """Each channel convolved by itself over 7 x 7 pixels: (B, h, w, C) -> (B, h, w, C).

    It reads the residual stream, which may be wider than the weights. Under bfloat16 weights it computes in bfloat16,
    whose range is float32's; otherwise in the stream's dtype, since float16 can't hold what is there.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.weight.dtype == torch.bfloat16 else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        convolved = self._conv_forward(x.to(dtype).permute(0, 3, 1, 2), self.weight.to(dtype), bias)
        return convolved.permute(0, 2, 3, 1)


class ConvNeXtBlock(nn.Module):
    """(B, h, w, C) -> (B, h, w, C).

    x = x + gamma * mlp(norm(dwconv(x)))
    """

    def __init__(self, config: DINOv3ConvNeXtConfig, channels: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = Mlp(channels, 4 * channels, config.hidden_act)
        self.ls = LayerScale(channels, config.layer_scale_init_value)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ls(x, self.branch(x))

    def add_to(self, x: Tensor) -> Tensor:
        """As `forward`, with the sum written into x. The hooks of this module and of `ls` don't run."""
        return x.addcmul_(self.branch(x), self.ls.gamma)

    def branch(self, x: Tensor) -> Tensor:
        """What gamma scales and the block adds to x: (B, h, w, C) -> (B, h, w, C)."""
        return self.drop_path(self.mlp(self.norm(self.dwconv(x))))


class Stage(nn.Module):
    """The blocks of one resolution, behind the step down to it (none in the first stage, which the stem precedes).

    Stochastic depth grows linearly over all blocks of the model, from 0 in the first to `config.drop_path_rate`.
    """

    def __init__(self, config: DINOv3ConvNeXtConfig, index: int) -> None:
        super().__init__()
        before, self.channels = config.hidden_sizes[max(0, index - 1)], config.hidden_sizes[index]
        first, depth, total = sum(config.depths[:index]), config.depths[index], sum(config.depths)
        rates = [config.drop_path_rate * i / (total - 1) for i in range(first, first + depth)]
        self.downsample = Downsample(before, self.channels, config.layer_norm_eps) if index else NoStep()
        self.blocks = nn.ModuleList(ConvNeXtBlock(config, self.channels, rate) for rate in rates)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        if recompute:
            from torch.utils.checkpoint import checkpoint  # costs a second where it imports sympy (torch 2.6)
        x = self.downsample(x)
        blocks: Any = self.blocks
        overwrites = self._overwrites(x)
        for i, block in enumerate(blocks):
            if recompute:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block.add_to(x) if overwrites and i else block(x)
        return x

    def _overwrites(self, x: Tensor) -> bool:
        """Whether all blocks but the first may write into their input: nobody else sees what one hands to the next.

        New memory for every sum costs up to 5 % of a forward (512 pixels, bfloat16).
        """
        if not writes_in_place(x) or not untouched(*self.blocks):
            return False
        blocks: Any = self.blocks
        return untouched(*(module for block in blocks for module in (block.dwconv, block.ls)))


class DINOv3ConvNeXt(features.Sizes, Pretrained):
    """DINOv3's ConvNeXt: images to feature maps at strides 4, 8, 16 and 32, a CLS token and patch tokens.

    The CLS token is the mean of the last stage's map; there are no register tokens, and no attention. What a ViT calls
    its blocks (`n` of `get_intermediate_layers`, `hidden_states`) are here the four stages.

    Switches, all of them plain attributes that may be set at any time:
        patch_size: None, or a ViT's patch size, to whose grid `get_intermediate_layers` then resizes every map.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        residual_dtype: dtype of the residual stream. None is float32 or wider whatever the weights; `torch.bfloat16`
            under bfloat16 weights is what the references do: less memory traffic, and their error.
    """

    config_class = DINOv3ConvNeXtConfig
    _no_split_modules = ("ConvNeXtBlock",)  # what accelerate leaves whole

    def __init__(self, config: DINOv3ConvNeXtConfig, patch_size: int | None = None) -> None:
        super().__init__(config)
        self.patch_size = patch_size
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None

        self.stem = Stem(config)
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.depths)))
        self.norm = LayerNorm(config.hidden_sizes[-1], eps=config.layer_norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal (std `config.initializer_range`) for weights, zero for biases.

        LayerNorm starts as the identity, LayerScale at `config.layer_scale_init_value`: every parameter is set.
        A model without storage, on the meta device, stays so.
        """
        if self.norm.weight.is_meta:
            return
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("gamma"):
                nn.init.constant_(parameter, self.config.layer_scale_init_value)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        patch_size: int | None = None,
        **opening: Unpack[Opening],
    ) -> DINOv3ConvNeXt:
        """Load a checkpoint, in evaluation mode: every tensor comes from it, or an error names those that don't.

        patch_size: see the class. The other arguments are those of `DINOv3ViT.from_pretrained`: prefix, num_channels,
            channel_rule, subfolder, revision, cache_dir, local_files_only.

        Raises FileNotFoundError if there is no such source, ValueError if it is damaged or of another architecture.
        """
        check_dtype(dtype)
        opened = open_source(source, **opening)
        return cls.from_checkpoint(opened, dtype=dtype, device=device, patch_size=patch_size)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        keep_indices: Tensor | None = None,
    ) -> DINOv3Output | tuple[Tensor, ...]:
        """Compute the features of a batch of normalised images: the last stage's map as tokens, after their mean.

        pixel_values: (B, 3, H, W), floating point, H and W from 32 on; cast to the model's dtype. Where a stage does
            not divide the size, its map leaves out the last rows and columns, as in every reference.
        return_dict: False returns a plain tuple: last_hidden_state, pooler_output and, if asked for, hidden_states.

        `hidden_states` are five: the images as given, then each stage's map (B, C, h, w) before the final LayerNorm.

        Raises ValueError for any other rank, channel count, dtype or size, and for bool_masked_pos or keep_indices,
        which only a ViT takes.
        """
        features.refuse(bool_masked_pos=bool_masked_pos, keep_indices=keep_indices)
        taps = range(self.depth) if output_hidden_states else (self.depth - 1,)
        states = self.run_stages(self.embed(pixel_values), taps)
        grid = states[-1].shape[1], states[-1].shape[2]
        last_hidden_state = self.norm(features.to_tokens(states[-1]))
        hidden_states = None
        if output_hidden_states:
            hidden_states = (pixel_values, *(features.to_map(self, state) for state in states))
        if return_dict:
            return DINOv3Output(last_hidden_state, last_hidden_state[:, 0], hidden_states, grid, self.num_prefix_tokens)
        output = (last_hidden_state, last_hidden_state[:, 0])
        return output if hidden_states is None else (*output, hidden_states)  # type: ignore[return-value]

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the stem's map (B, H/4, W/4, C1), which enters the first stage. Errors as in `forward`."""
        self.check_images(pixel_values)
        return self.embed_patches(pixel_values).to(
            self.residual_dtype or torch.promote_types(self.dtype, torch.float32)
        )

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Cast valid images (B, 3, H, W) to the stem's dtype and run it on them: (B, H/4, W/4, C1)."""
        return self.stem(pixel_values.to(dtype_of(self.stem)))

    def run_stages(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Run the stages up to the last in `taps` (ascending indices); return the maps (B, h, w, C) of those in it."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return run_units(self.stages, x, taps, recompute)

    # What Meta's and timm's classes have, by their names.
    get_intermediate_layers = features.get_intermediate_layers
    forward_features = features.forward_features
    forward_intermediates = features.forward_intermediates
    feature_info = property(features.feature_info)
    block_indices = features.block_indices

    def attention_maps(self, pixel_values: Tensor, block: int = -1) -> NoReturn:
        """Raises ValueError: there is no attention to show."""
        raise ValueError("a ConvNeXt has no attention: compare its patch tokens with the CLS token instead")

    def forward_packed(self, images: Sequence[Tensor]) -> NoReturn:
        """Raises ValueError: convolutions run over rectangles, not over a sequence."""
        raise ValueError("a ConvNeXt can't run images of different sizes as one sequence: call it once for each size")

    def check_images(
        self, images: Tensor, name: str = "pixel_values", dims: tuple[str, ...] = BATCH, pixels: bool = False
    ) -> tuple[int, int]:
        """Return the grid (h, w) of the last stage's map; raise ValueError unless images have 32 x 32 pixels or more.

        name: what errors call them. pixels: allow integer dtypes too.
        """
        check_kind(images, self.num_channels, name, dims, pixels)
        height, width = images.shape[-2:]
        return self.grid_of(height, width)


def run_units(units: Iterable[nn.Module], x: Tensor, taps: Sequence[int], *options: Any) -> list[Tensor]:
    """Run one module after the other, up to the last in `taps`, and return the outputs of those in `taps`."""
    if writes_in_place(x):
        huge_pages_ahead()
    states = []
    for i, unit in enumerate(itertools.islice(units, max(taps) + 1 if taps else 0)):
        x = unit(x, *options)
        if i in taps:
            states.append(x)
    return states


add_ours(Stem, Downsample, DepthwiseConv, ConvNeXtBlock, Stage, NoStep)
