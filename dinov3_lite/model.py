"""The DINOv3 vision transformer, top to bottom (arXiv 2508.10104, section 3; the ViT itself is arXiv 2010.11929).

Letters in the shape comments: B batch, H W image pixels, h w patch grid, P = h*w patch tokens, R register tokens,
N = 1 + R + P tokens, C embedding, D head dim.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .attention import fuses_rows, packed_attention, resolve_attention, unpack
from .checkpoint import assign, open_checkpoint
from .checkpoint.hub import locate
from .config import FLOAT32_UNDER_HALF, DINOv3Config
from .layers import Block, LayerNorm, PatchEmbed
from .packing import Tokens, pack
from .rope import RotaryEmbedding2D, rope_periods


class DINOv3Output(NamedTuple):
    """What a forward returns. Tokens are ordered CLS, registers, patches row by row."""

    last_hidden_state: Tensor
    """(B, 1 + R + h*w, C), after the final LayerNorm."""
    pooler_output: Tensor
    """(B, C), the CLS token of `last_hidden_state`."""
    hidden_states: tuple[Tensor, ...] | None
    """depth + 1 tensors (B, 1 + R + h*w, C): the embeddings, then each block's output, all before the final LayerNorm.

    In the weights' dtype, but float32 under float16, which can't hold them."""
    grid: tuple[int, int]
    """(h, w), rows and columns of patches."""
    num_prefix_tokens: int
    """1 + R: how many tokens stand before the patch tokens."""

    @property
    def cls_token(self) -> Tensor:
        """(B, C), a view of `last_hidden_state`."""
        return self.last_hidden_state[:, 0]

    @property
    def register_tokens(self) -> Tensor:
        """(B, R, C), a view of `last_hidden_state`."""
        return self.last_hidden_state[:, 1 : self.num_prefix_tokens]

    @property
    def patch_tokens(self) -> Tensor:
        """(B, h*w, C), or (B, K, C) with K `keep_indices`, a view of `last_hidden_state`."""
        return self.last_hidden_state[:, self.num_prefix_tokens :]

    @property
    def feature_map(self) -> Tensor:
        """(B, C, h, w), the patch tokens on their grid, a view of `last_hidden_state`.

        Raises ValueError if only some of the patches were kept.
        """
        return _to_map(self.patch_tokens, self.grid)


# Lets torch.export.save and AOTInductor write programs that return it.
_pytree._register_namedtuple(DINOv3Output, serialized_type_name="dinov3_lite.DINOv3Output")


def _to_map(patch_tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w), a view; ValueError if there are not h*w of them."""
    h, w = grid
    if patch_tokens.shape[1] != h * w:
        raise ValueError(
            f"a feature map needs all {h} x {w} patches, and {patch_tokens.shape[1]} were kept: use the patch tokens"
        )
    return patch_tokens.unflatten(1, grid).permute(0, 3, 1, 2)


class DINOv3ViT(nn.Module):
    """DINOv3's vision transformer: images to CLS, register and patch tokens.

    Switches, all of them plain attributes that may be set at any time:
        attention: "auto", "sdpa", "eager" or "triton" (see `dinov3_lite.attention`).
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        residual_dtype: dtype of the residual stream. None is float32 or wider whatever the weights: released models
            reach 155,000 there, where float16 overflows and bfloat16 counts in steps of 1,024. `torch.bfloat16` under
            bfloat16 weights is what the references do: less memory traffic, and their error.

    `train()` switches on the augmentation of RoPE coordinates (`pos_embed_rescale` is 2.0 in the released configs):
    features then change from call to call, as in both references.
    """

    def __init__(self, config: DINOv3Config, attention: str = "auto") -> None:
        super().__init__()
        resolve_attention(attention)
        self.config = config
        self.attention = attention
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None
        self.weights_id = "random"

        self.embed_dim = self.num_features = config.hidden_size
        self.patch_size = config.patch_size
        self.depth = self.n_blocks = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.n_storage_tokens = config.num_register_tokens
        self.num_prefix_tokens = config.num_prefix_tokens

        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, config.hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embed = PatchEmbed(config)
        self.rope_embed = RotaryEmbedding2D(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal (std `config.initializer_range`) for weights and tokens, zero for biases and mask token.

        LayerNorm starts as the identity, LayerScale at `config.layerscale_value`: every parameter and buffer is set.
        A model without storage, on the meta device, stays so.
        """
        if self.norm.weight.is_meta:
            return
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == "mask_token":
                nn.init.zeros_(parameter)
            elif name.endswith("gamma"):
                nn.init.constant_(parameter, self.config.layerscale_value)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=std)
        self.rope_embed.periods.copy_(rope_periods(self.config))

    @classmethod
    def from_name(cls, name: str, **config_changes: Any) -> DINOv3ViT:
        """A released variant with random weights; `config_changes` are fields of `DINOv3Config` to replace.

        Raises ValueError for an unknown name or a contradictory config, TypeError for an unknown field.
        """
        return cls(replace(DINOv3Config.from_name(name), **config_changes))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: str = "auto",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> DINOv3ViT:
        """Load a checkpoint, in evaluation mode: every tensor comes from it, or an error names those that don't.

        source: a checkpoint folder, a .safetensors or .pth file, in the layout of transformers, Meta, timm or our own;
            or a hub id. A converted file on the CPU is not read but memory-mapped: its pages are loaded when first
            used, and training never writes to the file.
        dtype: of the weights; None keeps the checkpoint's own. RoPE periods stay float32, and tokens do under float16.
        device: to load to; None is the CPU. attention: see the class.
        revision, cache_dir, local_files_only: as in huggingface_hub, for a hub id.

        Raises FileNotFoundError if there is no such source, ValueError if it is damaged, of another architecture, or
        does not fit its config.
        """
        resolve_attention(attention)
        if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype is {dtype!r}: expected torch.float32, float16, bfloat16, float64 or None")
        path = locate(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        opened = open_checkpoint(path)
        with torch.device("meta"):
            model = cls(opened.config, attention)
        assign(model, opened, dtype=dtype, device=device)
        model.weights_id = opened.weights_id
        return model.eval()

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        keep_indices: Tensor | None = None,
    ) -> DINOv3Output | tuple[Tensor, ...]:
        """Features of a batch of normalised images.

        pixel_values: (B, 3, H, W), floating point, H and W multiples of the patch size; cast to the model's dtype.
        bool_masked_pos: (B, h*w) bool, True where a patch is replaced by the mask token.
        return_dict: False returns a plain tuple: last_hidden_state, pooler_output and, if asked for, hidden_states.
        keep_indices: (B, K) int64, the patches of each image to run on (counted row by row): the others are left out,
            and those that stay keep their RoPE positions. The patch tokens are then the K kept, in this order.

        Raises ValueError for any other rank, channel count, dtype, size or mask shape, and for indices that the grid
        does not have (on the CPU; a GPU reports them as a device-side assertion).
        """
        tokens, grid = self.embed(pixel_values, bool_masked_pos, keep_indices)
        taps = range(self.depth) if output_hidden_states else (self.depth - 1,)
        states = self.run_blocks(tokens, taps)
        last_hidden_state = self.norm(states[-1])
        hidden_states = tuple(map(self._as_output, (tokens.x, *states))) if output_hidden_states else None
        if return_dict:
            return DINOv3Output(last_hidden_state, last_hidden_state[:, 0], hidden_states, grid, self.num_prefix_tokens)
        output = (last_hidden_state, last_hidden_state[:, 0])
        return output if hidden_states is None else (*output, hidden_states)  # type: ignore[return-value]

    def forward_packed(self, images: Sequence[Tensor]) -> list[DINOv3Output]:
        """Features of images of different sizes, run as one sequence without padding: one output an image.

        images: (3, H_i, W_i) each. The outputs are those of `forward(image.unsqueeze(0))`, one for one.

        Raises ValueError for an empty list and for an image that `forward` would refuse, naming it.
        """
        if not len(images):
            raise ValueError("images is an empty list: expected at least one image of shape (channels, height, width)")
        members: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            self._check_images(image, f"images[{i}]", ("channels", "height", "width"))
            members.setdefault(image.shape, []).append(i)
        batches = [self.embed(torch.stack([images[i] for i in same])) for same in members.values()]
        (states,) = self._run_packed([tokens for tokens, _ in batches], (self.depth - 1,))
        outputs: dict[int, DINOv3Output] = {}
        for same, state, (_, grid) in zip(members.values(), states, batches, strict=True):
            for i, tokens in zip(same, self.norm(state).split(1), strict=True):
                outputs[i] = DINOv3Output(tokens, tokens[:, 0], None, grid, self.num_prefix_tokens)
        return [outputs[i] for i in range(len(images))]

    def embed(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, keep_indices: Tensor | None = None
    ) -> tuple[Tokens, tuple[int, int]]:
        """What the first block gets, and the patch grid (h, w)."""
        grid = self._check_images(pixel_values)
        weights_dtype = self.patch_embed.proj.weight.dtype
        dtype = self.residual_dtype or torch.promote_types(weights_dtype, torch.float32)
        patches = self.patch_embed(pixel_values.to(weights_dtype)).to(dtype)  # (B, P, C)
        if bool_masked_pos is not None:
            self._check_mask(bool_masked_pos, patches)
            patches = torch.where(bool_masked_pos.unsqueeze(-1), self.mask_token.to(dtype), patches)
        prefix = torch.cat((self.cls_token, self.register_tokens), dim=1).to(dtype)  # (1, 1 + R, C)
        x = torch.cat((prefix.expand(patches.shape[0], -1, -1), patches), dim=1)  # (B, N, C)
        table_dtype = torch.promote_types(torch.float32, self.norm.weight.dtype)
        cos, sin = self.rope_embed(*grid, self.num_prefix_tokens, table_dtype)  # (N, D/2)
        if keep_indices is not None:
            self._check_keep_indices(keep_indices, patches)
            kept = torch.cat((self._prefix_indices(keep_indices), keep_indices + self.num_prefix_tokens), dim=1)
            x = x.take_along_dim(kept.unsqueeze(-1), dim=1)  # (B, 1 + R + K, C)
            cos, sin = cos[kept], sin[kept]  # (B, 1 + R + K, D/2)
        return Tokens(x, cos, sin), grid

    def run_blocks(self, tokens: Tokens, taps: Sequence[int]) -> list[Tensor]:
        """Outputs of the blocks in `taps` (ascending indices), before the final norm; stops after the last of them."""
        x, cos, sin, shapes = tokens
        attention = resolve_attention(self.attention)
        fused = fuses_rows(attention, x)
        if shapes is not None:
            attention = packed_attention(attention, shapes, x.device)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        if recompute:
            from torch.utils.checkpoint import checkpoint  # costs a second where it imports sympy (torch 2.6)
        states = []
        for i, block in enumerate(self.blocks[: max(taps, default=-1) + 1]):
            if recompute:
                x = checkpoint(block, x, cos, sin, attention, fused, use_reentrant=False)
            else:
                x = block(x, cos, sin, attention, fused)
            if i in taps:
                states.append(x)
        return states

    def _run_packed(self, batches: Sequence[Tokens], taps: Sequence[int]) -> list[list[Tensor]]:
        """For each tap, what `run_blocks` gives for each of the batches."""
        if len(batches) == 1:
            return [[state] for state in self.run_blocks(batches[0], taps)]
        if self.training and self.config.drop_path_rate:
            raise ValueError(
                f"drop_path_rate is {self.config.drop_path_rate}: stochastic depth drops whole samples, which a packed "
                "sequence does not have; train with 0, or with batches of one size"
            )
        packed = pack(batches)
        assert packed.shapes is not None
        return [unpack(state.squeeze(0), packed.shapes) for state in self.run_blocks(packed, taps)]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | str | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Outputs of the last n blocks, or of the blocks whose indices n lists, in ascending order: Meta's method.

        n: a count; a list of indices, counted from the end if negative; "quarters", the blocks at 1/4, 2/4, 3/4 and 4/4
            of the depth; or "dpt", the four that Meta's DPT heads read (its depther: 4, 11, 17, 23 of 24 blocks, else
            the quarters).

        Each is the patch tokens (B, h*w, C), or (B, C, h, w) with `reshape`. With `return_class_token` and
        `return_extra_tokens` each becomes a tuple that goes on with the CLS token (B, C) and the register tokens (B,
        R, C). `norm` applies the final LayerNorm, to intermediate blocks too.

        Raises ValueError for a count or an index that the model does not have.
        """
        taps = self.block_indices(n)
        tokens, grid = self.embed(x)
        outputs: list[tuple[Tensor, ...]] = []
        for state in self.run_blocks(tokens, taps):
            patches, prefix = self.patches_and_prefix(state, grid, norm, reshape)
            output = [patches]
            if return_class_token:
                output.append(prefix[:, 0])
            if return_extra_tokens:
                output.append(prefix[:, 1:])
            outputs.append(tuple(output))
        return tuple(o if return_class_token or return_extra_tokens else o[0] for o in outputs)

    def forward_features(self, x: Tensor | list[Tensor], masks: Any = None) -> Any:
        """Meta's dictionary: x_norm_clstoken (B, C), x_storage_tokens (B, R, C), x_norm_patchtokens (B, h*w, C),
        x_prenorm, masks.

        All are after the final LayerNorm but x_prenorm, all N tokens of the last block before it. masks as
        `bool_masked_pos`. With a list of batches (crops of different sizes) and a list of masks or Nones, a list of
        dictionaries, from one packed run.

        Raises ValueError as `forward` does, and for lists that are empty or of different lengths.
        """
        if isinstance(x, Tensor):
            return self.forward_features([x], [masks])[0]
        masks = [None] * len(x) if masks is None else masks
        if not x or len(masks) != len(x):
            raise ValueError(
                f"x is a list of {len(x)} batches and masks of {len(masks)}: expected as many, at least one"
            )
        batches = [self.embed(*pair)[0] for pair in zip(x, masks, strict=True)]
        (prenorms,) = self._run_packed(batches, (self.depth - 1,))
        return [self._features(prenorm, mask) for prenorm, mask in zip(prenorms, masks, strict=True)]

    def _features(self, prenorm: Tensor, masks: Tensor | None) -> dict[str, Tensor | None]:
        normed = self.norm(prenorm)
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_storage_tokens": normed[:, 1 : self.num_prefix_tokens],
            "x_norm_patchtokens": normed[:, self.num_prefix_tokens :],
            "x_prenorm": self._as_output(prenorm),
            "masks": masks,
        }

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | str | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The last hidden state and a list of block outputs, or the list alone: timm's method.

        indices: as n of `get_intermediate_layers`; None is every block. output_fmt: "NCHW" for maps (B, C, h, w), "NLC"
        for tokens (B, h*w, C). With `return_prefix_tokens` each is a pair with the prefix tokens (B, 1 + R, C).
        `norm` applies the final LayerNorm to them. With `intermediates_only` the blocks stop at the last one wanted,
        which timm does on `stop_early`; without, `stop_early` makes the first result that of the last block run.

        Raises ValueError for an index that the model does not have and for another output_fmt.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}: expected 'NCHW' or 'NLC'")
        taps = self.block_indices(self.depth if indices is None else indices)
        last = taps[-1] if intermediates_only or stop_early else self.depth - 1
        tokens, grid = self.embed(x)
        states = self.run_blocks(tokens, sorted({*taps, last}))
        outputs: list[Any] = []
        for state in states[: len(taps)]:
            patches, prefix = self.patches_and_prefix(state, grid, norm, output_fmt == "NCHW")
            outputs.append((patches, prefix) if return_prefix_tokens else patches)
        return outputs if intermediates_only else (self.norm(states[-1]), outputs)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Module, num_chs (channels) and reduction (stride) of each block's output, as timm describes them."""
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": self.patch_size}
            for i in range(self.depth)
        ]

    def attention_maps(self, pixel_values: Tensor, block: int = -1) -> Tensor:
        """How much the CLS token attends to each patch in one block, per head: (B, heads, h, w), float32 or wider.

        The softmax runs over all tokens: a map's sum is what CLS and registers leave of 1. Only this block's weights
        are computed, for one query, and no later block runs.

        Raises ValueError for a block that the model does not have.
        """
        (index,) = self.block_indices([block])
        tokens, grid = self.embed(pixel_values)
        x = self.run_blocks(tokens, (index - 1,))[0] if index else tokens.x
        tapped: Any = self.blocks[index]
        weights = tapped.cls_attention(x, tokens.cos, tokens.sin)  # (B, heads, N)
        return weights[..., self.num_prefix_tokens :].unflatten(-1, grid)

    def extra_repr(self) -> str:
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return f"{self.config.name}, {millions:.1f} M parameters, weights {self.weights_id}"

    def patches_and_prefix(
        self, state: Tensor, grid: tuple[int, int], norm: bool, reshape: bool
    ) -> tuple[Tensor, Tensor]:
        """A block's output: patch tokens (B, h*w, C), or (B, C, h, w) with `reshape`; prefix tokens (B, 1 + R, C)."""
        state = self.norm(state) if norm else self._as_output(state)
        prefix, patches = state[:, : self.num_prefix_tokens], state[:, self.num_prefix_tokens :]
        return _to_map(patches, grid) if reshape else patches, prefix

    def _as_output(self, state: Tensor) -> Tensor:
        """A state of the residual stream as users get it: in the weights' dtype, unless that is too narrow for it."""
        dtype = self.norm.weight.dtype
        return state.to(torch.float32 if dtype == torch.float16 else dtype)

    def _check_images(
        self,
        pixel_values: Tensor,
        name: str = "pixel_values",
        dims: tuple[str, ...] = ("batch", "channels", "height", "width"),
    ) -> tuple[int, int]:
        """The patch grid (h, w) of valid images, or ValueError."""
        channels, p = self.config.num_channels, self.patch_size
        if pixel_values.ndim != len(dims) or pixel_values.shape[-3] != channels:
            expected = ", ".join(dims).replace("channels", str(channels))
            raise ValueError(f"{name} has shape {tuple(pixel_values.shape)}: expected ({expected})")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"{name} is {pixel_values.dtype}: expected normalised floating-point images, "
                "which dinov3_lite.ImageProcessor makes of pictures"
            )
        H, W = pixel_values.shape[-2:]
        if p > H or p > W or H % p or W % p:
            raise ValueError(
                f"image height {H} and width {W} must be multiples of the patch size {p}: "
                f"the nearest that work are height {_nearest_multiples(H, p)} and width {_nearest_multiples(W, p)}"
            )
        return H // p, W // p

    def _check_mask(self, bool_masked_pos: Tensor, patches: Tensor) -> None:
        if bool_masked_pos.shape != patches.shape[:2] or bool_masked_pos.dtype != torch.bool:
            raise ValueError(
                f"bool_masked_pos is {bool_masked_pos.dtype} of shape {tuple(bool_masked_pos.shape)}: "
                f"expected torch.bool of shape {tuple(patches.shape[:2])}, one value a patch"
            )

    def _check_keep_indices(self, keep_indices: Tensor, patches: Tensor) -> None:
        B, P = patches.shape[:2]
        if keep_indices.ndim != 2 or keep_indices.shape[0] != B or keep_indices.dtype != torch.int64:
            raise ValueError(
                f"keep_indices is {keep_indices.dtype} of shape {tuple(keep_indices.shape)}: "
                f"expected torch.int64 of shape ({B}, number of patches to keep)"
            )
        if torch.compiler.is_compiling() or keep_indices.device.type != "cpu" or not keep_indices.numel():
            return
        if keep_indices.min() < 0 or keep_indices.max() >= P:
            raise ValueError(
                f"keep_indices goes from {keep_indices.min()} to {keep_indices.max()}: expected 0 to {P - 1}, "
                "the patches of the image row by row"
            )

    def _prefix_indices(self, keep_indices: Tensor) -> Tensor:
        prefix = torch.arange(self.num_prefix_tokens, device=keep_indices.device)
        return prefix.expand(keep_indices.shape[0], -1)

    def block_indices(self, n: int | str | Sequence[int]) -> list[int]:
        """Ascending indices of blocks: see n of `get_intermediate_layers`."""
        if isinstance(n, str):
            if n not in ("quarters", "dpt") or self.depth < 4:
                raise ValueError(
                    f"n is {n!r} and the model has {self.depth} blocks: expected 'quarters' or 'dpt', and 4"
                )
            quarters = [self.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
            return [4, 11, 17, 23] if n == "dpt" and self.depth == 24 else quarters
        if isinstance(n, int):
            if not 1 <= n <= self.depth:
                raise ValueError(f"n is {n}: expected a count of blocks from 1 to {self.depth}, or a list of indices")
            return list(range(self.depth - n, self.depth))
        indices = [operator.index(i) for i in n]
        if not indices or not all(-self.depth <= i < self.depth for i in indices):
            raise ValueError(f"n is {indices}: expected block indices from {-self.depth} to {self.depth - 1}")
        return sorted({i % self.depth for i in indices})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DINOv3ViT:
        """`.half()` and its like keep float32 where float16 is too narrow."""
        tokens = {name: getattr(self, name).data for name in FLOAT32_UNDER_HALF}
        super()._apply(fn, recurse)
        for name, before in tokens.items():
            token = getattr(self, name)
            if token.dtype == torch.float16:
                token.data = (token.data if before.is_meta else before).to(token.device, torch.float32)
                token.grad = None if token.grad is None else token.grad.float()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.weights_id = "from a state dict"


def _nearest_multiples(size: int, p: int) -> str:
    below = size // p * p
    if below == size and size:
        return f"{size}"
    return f"{below} or {below + p}" if below else f"{p}"
