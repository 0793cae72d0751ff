"""DINOv3's ConvNeXt, top to bottom (arXiv 2201.03545, figure 4 and section 2; distilled in arXiv 2508.10104, 7.2).

    images (B, 3, H, W)
      stem           4x4 convolution of stride 4, LayerNorm
      stage 1        blocks                                           (B, H/4, W/4, C1)
      stage 2        LayerNorm, 2x2 convolution of stride 2, blocks   (B, H/8, W/8, C2)
      stage 3        likewise                                         (B, H/16, W/16, C3)
      stage 4        likewise                                         (B, H/32, W/32, C4)
      [mean; map]    LayerNorm                                        (B, 1 + h*w, C4)

Letters in the shape comments: B batch, H W image pixels, h w a stage's grid, C its channels. Grids are rounded down.
Inside, channels are last: convolutions read such memory as fast as any, and norms and matrix products need no copy.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DINOv3ConvNeXtConfig
from .layers import DropPath, LayerNorm, LayerScale, Mlp
from .model import DINOv3Output

STRIDES = (4, 8, 16, 32)


class Stem(nn.Module):
    """Patches of 4 x 4 pixels, each projected linearly and normed: (B, 3, H, W) -> (B, H/4, W/4, C1)."""

    def __init__(self, config: DINOv3ConvNeXtConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.num_channels, config.hidden_sizes[0], kernel_size=4, stride=4)
        self.norm = LayerNorm(config.hidden_sizes[0], eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.norm(self.conv(pixel_values).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Half the resolution, between two stages: (B, h, w, C) -> (B, h/2, w/2, C')."""

    def __init__(self, channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(channels, eps=eps)
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(x.dtype)


class DepthwiseConv(nn.Conv2d):
    """Each channel convolved by itself over 7 x 7 pixels: (B, h, w, C) -> (B, h, w, C).

    It reads the residual stream, which may be wider than the weights, and computes in its dtype.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return self._conv_forward(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)


class ConvNeXtBlock(nn.Module):
    """(B, h, w, C) -> (B, h, w, C).

    x = x + gamma * mlp(norm(dwconv(x)))
    """

    def __init__(self, config: DINOv3ConvNeXtConfig, channels: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv(channels)
        self.norm = LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = Mlp(channels, 4 * channels, config.hidden_act)
        self.ls = LayerScale(channels, config.layer_scale_init_value)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ls(x, self.drop_path(self.mlp(self.norm(self.dwconv(x)))))


class Stage(nn.Module):
    """Blocks of one resolution, after the step down to it; the first stage has the stem before it instead."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[ConvNeXtBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        if recompute:
            from torch.utils.checkpoint import checkpoint  # costs a second where it imports sympy (torch 2.6)
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x


class DINOv3ConvNeXt(nn.Module):
    """DINOv3's ConvNeXt: images to feature maps at strides 4, 8, 16 and 32, a CLS token and patch tokens.

    The CLS token is the mean of the last stage's map; there are no register tokens, and no attention. What a ViT calls
    its blocks (`n` of `get_intermediate_layers`, `hidden_states`) are here the four stages.

    Switches, all of them plain attributes that may be set at any time:
        patch_size: None, or a ViT's patch size, to whose grid `get_intermediate_layers` then resizes every map.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        residual_dtype: dtype of the residual stream, which the depthwise convolutions read. None is float32 or wider
            whatever the weights; `torch.bfloat16` under bfloat16 weights is what the references do: less memory
            traffic, and their error.
    """

    def __init__(self, config: DINOv3ConvNeXtConfig, patch_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_size = patch_size
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None
        self.weights_id = "random"

        self.embed_dims = config.hidden_sizes
        self.strides = STRIDES
        self.embed_dim = self.num_features = config.hidden_sizes[-1]
        self.depth = self.n_blocks = len(config.depths)
        self.n_storage_tokens = 0
        self.num_prefix_tokens = 1

        rates = iter(torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist())
        self.stem = Stem(config)
        self.stages = nn.ModuleList()
        for i, (channels, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            before = Downsample(config.hidden_sizes[i - 1], channels, config.layer_norm_eps) if i else nn.Identity()
            self.stages.append(Stage(before, [ConvNeXtBlock(config, channels, next(rates)) for _ in range(depth)]))
        self.norm = LayerNorm(self.embed_dim, eps=config.layer_norm_eps)
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
    def from_name(cls, name: str, **config_changes: Any) -> DINOv3ConvNeXt:
        """A released variant with random weights; `config_changes` are fields of `DINOv3ConvNeXtConfig` to replace.

        Raises ValueError for an unknown name or a contradictory config, TypeError for an unknown field.
        """
        return cls(replace(DINOv3ConvNeXtConfig.from_name(name), **config_changes))

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        keep_indices: Tensor | None = None,
    ) -> DINOv3Output | tuple[Tensor, ...]:
        """Features of a batch of normalised images: the last stage's, at stride 32, behind their mean.

        pixel_values: (B, 3, H, W), floating point, H and W from 32 on; cast to the model's dtype. Where a stage does
            not divide the size, its map leaves out the last rows and columns, as in every reference.
        return_dict: False returns a plain tuple: last_hidden_state, pooler_output and, if asked for, hidden_states.

        `hidden_states` are five: the images, then each stage's map (B, C, h, w) before the final LayerNorm.

        Raises ValueError for any other rank, channel count, dtype or size, and for bool_masked_pos or keep_indices,
        which only a ViT takes.
        """
        _refuse(bool_masked_pos=bool_masked_pos, keep_indices=keep_indices)
        taps = range(self.depth) if output_hidden_states else (self.depth - 1,)
        states = self.run_stages(pixel_values, taps)
        grid = states[-1].shape[1], states[-1].shape[2]
        last_hidden_state = self.norm(torch.cat((_mean(states[-1]), states[-1].flatten(1, 2)), dim=1))
        hidden_states = None
        if output_hidden_states:
            hidden_states = (pixel_values.to(self.norm.weight.dtype), *map(self._as_map, states))
        if return_dict:
            return DINOv3Output(last_hidden_state, last_hidden_state[:, 0], hidden_states, grid, self.num_prefix_tokens)
        output = (last_hidden_state, last_hidden_state[:, 0])
        return output if hidden_states is None else (*output, hidden_states)  # type: ignore[return-value]

    def run_stages(self, pixel_values: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Outputs (B, h, w, C) of the stages in `taps` (ascending indices); stops after the last of them."""
        self._check_images(pixel_values)
        weights_dtype = self.norm.weight.dtype
        dtype = self.residual_dtype or torch.promote_types(weights_dtype, torch.float32)
        x = self.stem(pixel_values.to(weights_dtype)).to(dtype)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        states = []
        for i, stage in enumerate(self.stages[: max(taps, default=-1) + 1]):
            x = stage(x, recompute)
            if i in taps:
                states.append(x)
        return states

    # ---- Meta's methods

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | str | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
        patch_size: int | None = None,
    ) -> tuple[Any, ...]:
        """Outputs of the last n stages, or of the stages whose indices n lists, in ascending order: Meta's method.

        n: a count; a list of indices from 0 to 3, counted from the end if negative; "quarters" or "dpt", all four.
        norm: applies the final LayerNorm to the last stage; the others have none and stay as they are.
        patch_size: resizes each map to (H // patch_size, W // patch_size), a ViT's grid, by bilinear interpolation with
            antialiasing; None is the model's own `patch_size`.

        Each is the map's pixels (B, h*w, C), or (B, C, h, w) with `reshape`. With `return_class_token` and
        `return_extra_tokens` each becomes a tuple that goes on with the mean of the stage's map (B, C) and the
        register tokens, which a ConvNeXt has none of (B, 0, C).

        Raises ValueError for a count or an index that the model does not have and for a patch size that is not
        positive or larger than the image.
        """
        taps = self.block_indices(n)
        outputs: list[tuple[Tensor, ...]] = []
        for i, state in zip(taps, self.run_stages(x, taps), strict=True):
            pooled, patches = _mean(state), self._on_grid(state, x, patch_size)  # (B, 1, C) and (B, h, w, C)
            normed = norm and i == self.depth - 1
            pooled, patches = (self.norm(t) if normed else self._as_output(t) for t in (pooled, patches))
            output = [patches.permute(0, 3, 1, 2) if reshape else patches.flatten(1, 2)]
            if return_class_token:
                output.append(pooled[:, 0])
            if return_extra_tokens:
                output.append(pooled[:, 1:])
            outputs.append(tuple(output))
        return tuple(o if return_class_token or return_extra_tokens else o[0] for o in outputs)

    def forward_features(self, x: Tensor | list[Tensor], masks: Any = None) -> Any:
        """Meta's dictionary: x_norm_clstoken (B, C), x_storage_tokens (B, 0, C), x_norm_patchtokens (B, h*w, C),
        x_prenorm, masks.

        All are after the final LayerNorm but x_prenorm, the last stage's map as tokens (B, h*w, C). With a list of
        batches (crops of different sizes), a list of dictionaries.

        Raises ValueError as `forward` does, for an empty list, and for masks.
        """
        if not isinstance(x, Tensor):
            if not x or (masks is not None and len(masks) != len(x)):
                raise ValueError(f"x is a list of {len(x)} batches: expected at least one, and as many masks")
            return [self.forward_features(*pair) for pair in zip(x, masks or [None] * len(x), strict=True)]
        _refuse(masks=masks)
        (state,) = self.run_stages(x, (self.depth - 1,))
        patches = state.flatten(1, 2)
        normed = self.norm(torch.cat((_mean(state), patches), dim=1))
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_storage_tokens": normed[:, 1:1],
            "x_norm_patchtokens": normed[:, 1:],
            "x_prenorm": self._as_output(patches),
            "masks": masks,
        }

    # ---- timm's methods

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | str | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The last map and a list of stages' maps (B, C, h, w), or the list alone: timm's method.

        indices: as n of `get_intermediate_layers`; None is every stage. norm: changes nothing, as in timm, whose final
        LayerNorm comes after pooling: every map is before it. With `intermediates_only` the stages stop at the last
        one wanted, which timm does on `stop_early`; without, `stop_early` makes the first result that of the last
        stage run.

        Raises ValueError for an index that the model does not have and for another output_fmt.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}: expected 'NCHW', all that timm's ConvNeXt has")
        taps = self.block_indices(self.depth if indices is None else indices)
        last = taps[-1] if intermediates_only or stop_early else self.depth - 1
        maps = [self._as_map(state) for state in self.run_stages(x, sorted({*taps, last}))]
        return maps[: len(taps)] if intermediates_only else (maps[-1], maps[: len(taps)])

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Module, num_chs (channels) and reduction (stride) of each stage's map, as timm describes them."""
        return [
            {"num_chs": channels, "reduction": stride, "module": f"stages.{i}"}
            for i, (channels, stride) in enumerate(zip(self.embed_dims, self.strides, strict=True))
        ]

    # ---- what a ConvNeXt has not

    def attention_maps(self, pixel_values: Tensor, block: int = -1) -> NoReturn:
        """Raises ValueError: there is no attention to show."""
        raise ValueError("a ConvNeXt has no attention: compare its patch tokens with the CLS token instead")

    def forward_packed(self, images: Sequence[Tensor]) -> NoReturn:
        """Raises ValueError: convolutions run over rectangles, not over a sequence."""
        raise ValueError("a ConvNeXt can't run images of different sizes as one sequence: call it once for each size")

    # ---- helpers

    def block_indices(self, n: int | str | Sequence[int]) -> list[int]:
        """Ascending indices of stages: see n of `get_intermediate_layers`."""
        if isinstance(n, str):
            if n not in ("quarters", "dpt"):
                raise ValueError(f"n is {n!r}: expected 'quarters' or 'dpt', which are all {self.depth} stages")
            return list(range(self.depth))
        if isinstance(n, int):
            if not 1 <= n <= self.depth:
                raise ValueError(f"n is {n}: expected a count of stages from 1 to {self.depth}, or a list of indices")
            return list(range(self.depth - n, self.depth))
        indices = [operator.index(i) for i in n]
        if not indices or not all(-self.depth <= i < self.depth for i in indices):
            raise ValueError(f"n is {indices}: expected stage indices from {-self.depth} to {self.depth - 1}")
        return sorted({i % self.depth for i in indices})

    def extra_repr(self) -> str:
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return f"{self.config.name}, {millions:.1f} M parameters, weights {self.weights_id}"

    def _on_grid(self, state: Tensor, images: Tensor, patch_size: int | None) -> Tensor:
        """The map (B, h, w, C) on the grid of a ViT with this patch size, the model's own if None."""
        p = self.patch_size if patch_size is None else patch_size
        if p is None:
            return state
        H, W = images.shape[-2:]
        if not 1 <= p <= min(H, W):
            raise ValueError(f"patch_size is {p}: expected 1 to {min(H, W)} for images of {H} x {W} pixels")
        grid = (H // p, W // p)
        return F.interpolate(state.permute(0, 3, 1, 2), grid, mode="bilinear", antialias=True).permute(0, 2, 3, 1)

    def _as_map(self, state: Tensor) -> Tensor:
        return self._as_output(state).permute(0, 3, 1, 2)

    def _as_output(self, state: Tensor) -> Tensor:
        """A state of the residual stream as users get it: in the weights' dtype, unless that is too narrow for it."""
        dtype = self.norm.weight.dtype
        return state.to(torch.float32 if dtype == torch.float16 else dtype)

    def _check_images(self, pixel_values: Tensor) -> None:
        """ValueError unless these are normalised images of 32 pixels and more."""
        channels, least = self.config.num_channels, self.strides[-1]
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: expected (batch, {channels}, height, width)"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values is {pixel_values.dtype}: expected normalised floating-point images, "
                "which dinov3_lite.ImageProcessor makes of pictures"
            )
        H, W = pixel_values.shape[-2:]
        if min(H, W) < least:
            raise ValueError(f"image height {H} and width {W} must be at least {least}, the stride of the last stage")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.weights_id = "from a state dict"


def _mean(state: Tensor) -> Tensor:
    """What stands for the CLS token: (B, h, w, C) -> (B, 1, C)."""
    return state.mean(dim=(1, 2)).unsqueeze(1)


def _refuse(**tensors: Tensor | None) -> None:
    """ValueError for the first of these that is given: only a ViT, which is made of tokens, takes them."""
    for name, tensor in tensors.items():
        if tensor is not None:
            raise ValueError(f"{name} is given: a ConvNeXt has no tokens to mask or leave out, only a DINOv3ViT has")
