"""The DINOv3 vision transformer, top to bottom (arXiv 2508.10104, section 3; the ViT itself is arXiv 2010.11929).

Letters in the shape comments: B batch, H W image pixels, h w patch grid, P = h*w patch tokens, R register tokens,
N = 1 + R + P tokens, C embedding, F hidden width of the MLP, D head dim.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from .attention import AttentionFn, resolve_attention
from .config import DINOv3Config
from .rope import RotaryEmbedding2D, rope_periods
from .weights import FLOAT32_UNDER_HALF, assign, open_checkpoint


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

    @property
    def cls_token(self) -> Tensor:
        """(B, C), a view of `last_hidden_state`."""
        return self.last_hidden_state[:, 0]

    @property
    def register_tokens(self) -> Tensor:
        """(B, R, C), a view of `last_hidden_state`."""
        return self.last_hidden_state[:, 1 : self._num_prefix_tokens]

    @property
    def patch_tokens(self) -> Tensor:
        """(B, h*w, C), a view of `last_hidden_state`."""
        return self.last_hidden_state[:, self._num_prefix_tokens :]

    @property
    def feature_map(self) -> Tensor:
        """(B, C, h, w), the patch tokens on their grid, a view of `last_hidden_state`."""
        return _to_map(self.patch_tokens, self.grid)

    @property
    def _num_prefix_tokens(self) -> int:
        return self.last_hidden_state.shape[1] - self.grid[0] * self.grid[1]


# Lets torch.export.save and AOTInductor write programs that return it.
_pytree._register_namedtuple(DINOv3Output, serialized_type_name="dinov3_lite.DINOv3Output")


def _to_map(patch_tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return patch_tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, h*w, C) -> (B, C, h, w)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected linearly: (B, 3, H, W) -> (B, P, C)."""

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of a residual stream that may be wider than the weights: computed in x's dtype, returned in theirs."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class QKVProjection(nn.Linear):
    """Queries, keys and values by one matrix product: (B, N, C) -> (B, N, 3C).

    A bias that the config lacks (DINOv3's keys have none) is no parameter, so neither loading nor training can create
    it.
    """

    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__(config.hidden_size, 3 * config.hidden_size, bias=False)
        switches = {"q_bias": config.query_bias, "k_bias": config.key_bias, "v_bias": config.value_bias}
        for name, exists in switches.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(config.hidden_size)) if exists else None)

    def forward(self, x: Tensor) -> Tensor:
        biases = [self.q_bias, self.k_bias, self.v_bias]
        if all(b is None for b in biases):
            return F.linear(x, self.weight)
        absent = self.weight.new_zeros(self.in_features)
        return F.linear(x, self.weight, torch.cat([absent if b is None else b for b in biases]))


class SelfAttention(nn.Module):
    """Multi-head self-attention with RoPE on queries and keys: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = QKVProjection(config)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionFn) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # (B, N, heads, D) each
        return self.proj(attention(q, k, v, cos, sin).flatten(-2))


class Mlp(nn.Module):
    """fc2(act(fc1(x))), with the exact (erf) GELU in the released models: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.act = getattr(F, config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GatedMlp(nn.Module):
    """w3(act(w1 x) * (w2 x)), SwiGLU in the released models (arXiv 2002.05202): (B, N, C) -> (B, N, C).

    w1 (the gate) and w2 (the value) lie one above the other in `w12`, so that one matrix product serves both.
    """

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.act = getattr(F, config.hidden_act)
        self.w12 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)  # (B, N, F) each
        return self.w3(self.act(gate) * value)


class LayerScale(nn.Module):
    """The residual update x + gamma * branch, in one pass and in x's dtype (arXiv 2103.17239, section 2)."""

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.hidden_size,), config.layerscale_value))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(x, branch, self.gamma).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, a sample loses its branch with probability p."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return branch
        keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1.0 - self.p)
        return branch * (keep / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Block(nn.Module):
    """One pre-norm transformer block: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SelfAttention(config)
        self.ls1 = LayerScale(config)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GatedMlp(config) if config.use_gated_mlp else Mlp(config)
        self.ls2 = LayerScale(config)
        self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionFn) -> Tensor:
        x = self.ls1(x, self.drop_path(self.attn(self.norm1(x), cos, sin, attention)))
        x = self.ls2(x, self.drop_path(self.mlp(self.norm2(x))))
        return x


class DINOv3ViT(nn.Module):
    """DINOv3's vision transformer: images to CLS, register and patch tokens.

    Switches, all of them plain attributes that may be set at any time:
        attention: "auto", "sdpa" or "eager" (see `dinov3_lite.attention`).
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
        """
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
        if not self.rope_embed.periods.is_meta:
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
        opened = open_checkpoint(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
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
    ) -> DINOv3Output | tuple[Tensor, ...]:
        """Features of a batch of normalised images.

        pixel_values: (B, 3, H, W), floating point, H and W multiples of the patch size; cast to the model's dtype.
        bool_masked_pos: (B, h*w) bool, True where a patch is replaced by the mask token.
        return_dict: False returns a plain tuple: last_hidden_state, pooler_output and, if asked for, hidden_states.

        Raises ValueError for any other rank, channel count, dtype, size or mask shape.
        """
        x, grid = self.embed(pixel_values, bool_masked_pos)
        taps = range(self.depth) if output_hidden_states else (self.depth - 1,)
        states = self.run_blocks(x, grid, taps)
        last_hidden_state = self.norm(states[-1])
        hidden_states = tuple(map(self._as_output, (x, *states))) if output_hidden_states else None
        if return_dict:
            return DINOv3Output(last_hidden_state, last_hidden_state[:, 0], hidden_states, grid)
        output = (last_hidden_state, last_hidden_state[:, 0])
        return output if hidden_states is None else (*output, hidden_states)  # type: ignore[return-value]

    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """The tokens before the first block, (B, 1 + R + h*w, C), and their grid (h, w)."""
        grid = self._check_images(pixel_values)
        weights_dtype = self.patch_embed.proj.weight.dtype
        dtype = self.residual_dtype or torch.promote_types(weights_dtype, torch.float32)
        patches = self.patch_embed(pixel_values.to(weights_dtype)).to(dtype)  # (B, P, C)
        if bool_masked_pos is not None:
            self._check_mask(bool_masked_pos, patches)
            patches = torch.where(bool_masked_pos.unsqueeze(-1), self.mask_token.to(dtype), patches)
        prefix = torch.cat((self.cls_token, self.register_tokens), dim=1).to(dtype)  # (1, 1 + R, C)
        return torch.cat((prefix.expand(patches.shape[0], -1, -1), patches), dim=1), grid

    def run_blocks(self, x: Tensor, grid: tuple[int, int], taps: Sequence[int]) -> list[Tensor]:
        """Outputs of the blocks in `taps` (ascending indices), before the final norm; stops after the last of them."""
        attention = resolve_attention(self.attention)
        table_dtype = torch.promote_types(torch.float32, self.norm.weight.dtype)
        cos, sin = self.rope_embed(*grid, self.num_prefix_tokens, table_dtype)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        if recompute:
            from torch.utils.checkpoint import checkpoint  # costs a second where it imports sympy (torch 2.6)
        states = []
        for i, block in enumerate(self.blocks[: taps[-1] + 1]):
            if recompute:
                x = checkpoint(block, x, cos, sin, attention, use_reentrant=False)
            else:
                x = block(x, cos, sin, attention)
            if i in taps:
                states.append(x)
        return states

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Outputs of the last n blocks, or of the blocks whose indices n lists, in ascending order: Meta's method.

        Each is the patch tokens (B, h*w, C), or (B, C, h, w) with `reshape`. With `return_class_token` and
        `return_extra_tokens` each becomes a tuple that goes on with the CLS token (B, C) and the register tokens (B,
        R, C). `norm` applies the final LayerNorm, to intermediate blocks too.

        Raises ValueError for a count or an index that the model does not have.
        """
        taps = self._block_indices(n)
        tokens, grid = self.embed(x)
        outputs: list[tuple[Tensor, ...]] = []
        for state in self.run_blocks(tokens, grid, taps):
            state = self.norm(state) if norm else self._as_output(state)
            patch_tokens = state[:, self.num_prefix_tokens :]
            output = [_to_map(patch_tokens, grid) if reshape else patch_tokens]
            if return_class_token:
                output.append(state[:, 0])
            if return_extra_tokens:
                output.append(state[:, 1 : self.num_prefix_tokens])
            outputs.append(tuple(output))
        return tuple(o if return_class_token or return_extra_tokens else o[0] for o in outputs)

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor | None]:
        """Meta's dictionary: x_norm_clstoken (B, C), x_storage_tokens (B, R, C), x_norm_patchtokens (B, h*w, C),
        x_prenorm, masks.

        All are after the final LayerNorm but x_prenorm, all N tokens of the last block before it. masks as
        `bool_masked_pos`.
        """
        tokens, grid = self.embed(x, masks)
        (prenorm,) = self.run_blocks(tokens, grid, (self.depth - 1,))
        normed = self.norm(prenorm)
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_storage_tokens": normed[:, 1 : self.num_prefix_tokens],
            "x_norm_patchtokens": normed[:, self.num_prefix_tokens :],
            "x_prenorm": self._as_output(prenorm),
            "masks": masks,
        }

    def extra_repr(self) -> str:
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return f"{self.config.name}, {millions:.1f} M parameters, weights {self.weights_id}"

    def _as_output(self, state: Tensor) -> Tensor:
        """A state of the residual stream as users get it: in the weights' dtype, unless that is too narrow for it."""
        dtype = self.norm.weight.dtype
        return state.to(torch.float32 if dtype == torch.float16 else dtype)

    def _check_images(self, pixel_values: Tensor) -> tuple[int, int]:
        """The patch grid (h, w) of a valid batch of images, or ValueError."""
        channels, p = self.config.num_channels, self.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: expected (batch, {channels}, height, width)"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values is {pixel_values.dtype}: expected normalised floating-point images, "
                "which dinov3_lite.ImageProcessor makes of pictures"
            )
        H, W = pixel_values.shape[2:]
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

    def _block_indices(self, n: int | Sequence[int]) -> list[int]:
        """Ascending block indices of the last n blocks, or of a list of them, counted from the end if negative."""
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
