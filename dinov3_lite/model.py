"""The DINOv3 vision transformer, top to bottom (arXiv 2508.10104, section 3; the ViT itself is arXiv 2010.11929).

Letters in the shape comments: B batch, H W image pixels, h w patch grid, P = h*w patch tokens, R register tokens,
N = 1 + R + P tokens, C embedding, D head dim.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from . import features
from .attention import AttentionFn, resolve_attention
from .checks import BATCH, SINGLE, check_dtype, check_images, check_keep_indices, check_mask, check_patches
from .config import FLOAT32_UNDER_HALF, DINOv3Config
from .layers import Block, LayerNorm, PatchEmbed
from .packing import PackedAttention, Tokens, pack, unpack
from .pages import huge_pages_ahead
from .pretrained import Opening, Pretrained, open_source
from .rope import RotaryEmbedding2D, rope_periods
from .tracing import writes_in_place

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack


class DINOv3Output(NamedTuple):
    """What a forward returns. The tokens' order is CLS, the R registers, then the patches row by row."""

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
        return features.to_map(self.patch_tokens, self.grid)


# Lets torch.export.save and AOTInductor write programs that return it.
_pytree._register_namedtuple(DINOv3Output, serialized_type_name="dinov3_lite.DINOv3Output")


class DINOv3ViT(features.Sizes, Pretrained):
    """DINOv3's vision transformer: images to CLS, register and patch tokens.

    Three plain attributes are switches that may be set at any time:
        attention: "auto", "sdpa", "eager" or "triton" (see `dinov3_lite.attention`).
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        residual_dtype: dtype of the residual stream. None is float32 or wider whatever the weights: released models
            reach 155,000 there, where float16 overflows and bfloat16 counts in steps of 1,024. `torch.bfloat16` under
            bfloat16 weights is what the references do: less memory traffic, and their error.

    Sizes (`depth`, `embed_dim`, ...) are read off the modules, which may be dropped, appended and replaced.

    `train()` switches on the augmentation of RoPE coordinates (`pos_embed_rescale` is 2.0 in the released configs):
    features then change from call to call, as in both references.
    """

    config_class = DINOv3Config
    _no_split_modules = ("Block",)  # what accelerate leaves whole: x flows around its parts

    def __init__(self, config: DINOv3Config, attention: str = "auto") -> None:
        super().__init__(config)
        resolve_attention(attention)
        self.attention = attention
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None
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
        if self.cls_token.is_meta:
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
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: str = "auto",
        mesh: DeviceMesh | None = None,
        **opening: Unpack[Opening],
    ) -> DINOv3ViT:
        """Load a checkpoint, in evaluation mode: every tensor comes from it, or an error names those that don't.

        source: a checkpoint folder or a file, in the layout of transformers, Meta, timm or our own, or a hub id. A
            converted file on the CPU is memory-mapped: pages load when first used, and training never writes to it.
        dtype: of the weights; None keeps the checkpoint's own. RoPE periods stay float32, and tokens do under float16.
        device: to load to; None is the CPU. attention: see the class. mesh: to shard over, see `dinov3_lite.sharding`.
        opening: any of these.
            prefix: how the names of the wanted backbone begin, if a file holds several (None: see `checkpoint.choose`).
            num_channels: other than the checkpoint's; channel_rule: "repeat" or "mean", see `checkpoint.channels`.
            subfolder: within the source. revision, cache_dir, local_files_only: as in huggingface_hub, for a hub id.

        Raises FileNotFoundError if there is no such source, ValueError if it is damaged or of another architecture.
        """
        resolve_attention(attention)
        check_dtype(dtype)
        opened = open_source(source, **opening)
        return cls.from_checkpoint(opened, dtype=dtype, device=device, mesh=mesh, attention=attention)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        keep_indices: Tensor | None = None,
    ) -> DINOv3Output | tuple[Tensor, ...]:
        """Compute the features of a batch of normalised images.

        pixel_values: (B, 3, H, W), floating point, H and W multiples of the patch size; cast to the model's dtype.
        bool_masked_pos: (B, h*w) bool, True where a patch is replaced by the mask token.
        output_hidden_states: return these too. return_dict: False returns the first two or three fields as a tuple.
        keep_indices: (B, K) int64, the patches of each image to run on (counted row by row): the others are left out,
            and those that stay keep their RoPE positions. The patch tokens are then the K kept, in this order.

        Raises ValueError for any other rank, channel count, dtype, size or mask shape, and for indices that the grid
        does not have (on the CPU; a GPU reports them as a device-side assertion).
        """
        tokens, grid = self.embed(pixel_values, bool_masked_pos, keep_indices)
        taps = range(self.depth) if output_hidden_states else (self.depth - 1,)
        states = self.run_blocks(tokens, taps)
        last_hidden_state = self.norm(states[-1])
        hidden = (
            tuple(features.as_output(self, state) for state in (tokens.x, *states)) if output_hidden_states else None
        )
        if return_dict:
            return DINOv3Output(last_hidden_state, last_hidden_state[:, 0], hidden, grid, self.num_prefix_tokens)
        output = (last_hidden_state, last_hidden_state[:, 0])
        return output if hidden is None else (*output, hidden)  # type: ignore[return-value]

    def embed(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, keep_indices: Tensor | None = None
    ) -> tuple[Tokens, tuple[int, int]]:
        """Return the tokens that enter the first block, and the patch grid (h, w). Arguments, errors: see `forward`."""
        grid = self.check_images(pixel_values)
        dtype = self.residual_dtype or torch.promote_types(self.dtype, torch.float32)
        patches = self.embed_patches(pixel_values).to(dtype)  # (B, P, C)
        check_patches(patches, grid)
        if bool_masked_pos is not None:
            check_mask(bool_masked_pos, patches)
            patches = torch.where(bool_masked_pos.unsqueeze(-1), self.mask_token.to(dtype), patches)
        prefix = torch.cat((self.cls_token, self.register_tokens), dim=1).to(dtype)  # (1, 1 + R, C)
        x = torch.cat((prefix.expand(patches.shape[0], -1, -1), patches), dim=1)  # (B, N, C)
        table_dtype = torch.promote_types(torch.float32, self.dtype)
        cos, sin = self.rope_embed(*grid, self.num_prefix_tokens, table_dtype)  # (N, D/2)
        if keep_indices is not None:
            check_keep_indices(keep_indices, patches)
            prefix_indices = torch.arange(self.num_prefix_tokens, device=keep_indices.device)
            prefix_indices = prefix_indices.expand(keep_indices.shape[0], -1)
            kept = torch.cat((prefix_indices, keep_indices + self.num_prefix_tokens), dim=1)
            x = x.take_along_dim(kept.unsqueeze(-1), dim=1)  # (B, 1 + R + K, C)
            cos, sin = cos[kept], sin[kept]  # (B, 1 + R + K, D/2)
        return Tokens(x, cos, sin), grid

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Cast valid images (B, 3, H, W) to the projection's dtype and project their patches: (B, h*w, C)."""
        return self.patch_embed(pixel_values.to(features.dtype_of(self.patch_embed)))

    def run_blocks(self, tokens: Tokens, taps: Sequence[int]) -> list[Tensor]:
        """Run the blocks up to the last in `taps` (ascending indices); return the outputs (B, N, C) of those in it."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return run_stack(list(self.blocks), tokens, taps, attention_of(tokens, self.attention), recompute)

    def run_prefix(self, tokens: Tokens, taps: Sequence[int]) -> list[Tensor]:
        """As `run_blocks`, the CLS and register tokens alone: (B, 1 + R, C). A prepared model saves most of a block."""
        return [state[:, : self.num_prefix_tokens] for state in self.run_blocks(tokens, taps)]

    def forward_packed(self, images: Iterable[Tensor]) -> list[DINOv3Output]:
        """Compute the features of images of different sizes as one sequence without padding: one output an image.

        images: (3, H_i, W_i) each. The outputs are those of `forward(image.unsqueeze(0))`, one for one.

        Raises ValueError for an empty list and for an image that `forward` would refuse, naming it.
        """
        images = list(images)
        if not images:
            raise ValueError("images is an empty list: expected at least one image of shape (channels, height, width)")
        members: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            self.check_images(image, f"images[{i}]", SINGLE)
            members.setdefault(image.shape, []).append(i)
        batches = [self.embed(torch.stack([images[i] for i in same])) for same in members.values()]
        (states,) = self.run_packed([tokens for tokens, _ in batches], (self.depth - 1,))
        outputs: dict[int, DINOv3Output] = {}
        for same, state, (_, grid) in zip(members.values(), states, batches, strict=True):
            for i, tokens in zip(same, self.norm(state).split(1), strict=True):
                outputs[i] = DINOv3Output(tokens, tokens[:, 0], None, grid, self.num_prefix_tokens)
        return [outputs[i] for i in range(len(images))]

    def run_packed(self, batches: Sequence[Tokens], taps: Sequence[int]) -> list[list[Tensor]]:
        """Run several batches as one packed sequence: result[t][b] is batch b's output (B, N, C) of block taps[t]."""
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

    def attention_maps(self, pixel_values: Tensor, block: int = -1) -> Tensor:
        """How much the CLS token attends to each patch in one block, per head: (B, heads, h, w), float32 or wider.

        The softmax is over all tokens, so that a map sums to less than 1: CLS and registers get the rest. The weights
        are computed in this block only, for the CLS query only, and no later block runs.

        Raises ValueError for a block that the model does not have.
        """
        index = features.block_index(self, block)
        tokens, grid = self.embed(pixel_values)
        x = self.run_blocks(tokens, (index - 1,))[0] if index else tokens.x
        tapped: Any = self.blocks[index]
        if not hasattr(tapped, "cls_attention"):
            raise ValueError(
                f"block {index} is of the class {type(tapped).__name__}, which has no attention: name another"
            )
        weights = tapped.cls_attention(x, tokens.cos, tokens.sin)  # (B, heads, N)
        return weights[..., self.num_prefix_tokens :].unflatten(-1, grid)

    # What Meta's and timm's classes have, by their names.
    get_intermediate_layers = features.get_intermediate_layers
    forward_features = features.forward_features
    forward_intermediates = features.forward_intermediates
    feature_info = property(features.feature_info)
    block_indices = features.block_indices

    def check_images(
        self, images: Tensor, name: str = "pixel_values", dims: tuple[str, ...] = BATCH, pixels: bool = False
    ) -> tuple[int, int]:
        """Return the patch grid (h, w), or raise ValueError if `forward` refuses these. pixels: integers pass."""
        return check_images(images, self.num_channels, self.patch_size, name, dims, pixels)

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


def attention_of(tokens: Tokens, name: str) -> AttentionFn:
    """The attention function of that name, for tokens that may be packed."""
    attention = resolve_attention(name)
    return attention if tokens.shapes is None else PackedAttention(attention, tokens.shapes, tokens.x.device)


def run_stack(
    blocks: Sequence[nn.Module], tokens: Tokens, taps: Sequence[int], attention: AttentionFn, recompute: bool = False
) -> list[Tensor]:
    """Run one block after the other, up to the last in `taps`, and return the outputs of those in `taps`."""
    if not blocks:
        raise ValueError("the model has no blocks left: expected at least one in model.blocks")
    x, cos, sin, _ = tokens
    if writes_in_place(x):
        huge_pages_ahead()
    if recompute:
        from torch.utils.checkpoint import checkpoint  # costs a second where it imports sympy (torch 2.6)
    states = []
    for i, block in enumerate(blocks[: max(taps) + 1 if taps else 0]):
        if isinstance(block, nn.Identity):  # a block that somebody took out
            x = block(x)
        elif recompute:
            x = checkpoint(block, x, cos, sin, attention, use_reentrant=False)
        else:
            x = block(x, cos, sin, attention)
        if i in taps:
            states.append(x)
    return states
