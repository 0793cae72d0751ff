"""What a block is made of, and the block (arXiv 2508.10104, section 3; the ViT itself is arXiv 2010.11929).

Letters in the shape comments: B batch, N tokens, P patch tokens, C embedding, F hidden width of the MLP, D head dim.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from .attention import AttentionFn, fuses_rows
from .config import DINOv3Config
from .rope import apply_rope
from .tracing import modes_watch, traced, unseen


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected linearly: (B, 3, H, W) -> (B, P, C)."""

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self._makes_one_column(pixel_values):
            beside = F.pad(pixel_values, (0, pixel_values.shape[-1]))
            return self.proj(beside)[..., :1].flatten(2).transpose(1, 2)
        if pixel_values.is_cuda and self._is_product():
            patches = patches_of(pixel_values, *self.proj.stride).flatten(3).flatten(1, 2)
            return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return self.proj(pixel_values).flatten(2).transpose(1, 2)

    def _is_product(self) -> bool:
        """Whether one matrix product computes the convolution: cuDNN's takes ten times as long on an H200."""
        conv = self.proj
        if traced():  # by what can't follow `untouched`
            unobserved = not (conv._forward_hooks or conv._forward_pre_hooks)
        else:
            unobserved = untouched(conv, past_modes=False)
        return unobserved and self._takes_patches() and conv.dilation == (1, 1) and conv.groups == 1

    def _takes_patches(self) -> bool:
        """Whether this is a convolution that neither pads nor overlaps."""
        conv = self.proj
        return type(conv) is nn.Conv2d and conv.stride == conv.kernel_size and conv.padding == (0, 0)

    def _makes_one_column(self, pixel_values: Tensor) -> bool:
        """Whether one column of patches is asked of a CPU: of five, in bfloat16 with AMX, oneDNN gives noise or NaN."""
        narrow = self._takes_patches() and pixel_values.shape[-1] < 2 * self.proj.stride[1]
        return narrow and pixel_values.is_cpu and not traced()

    @property
    def patch_size(self) -> int:
        """The side of a patch, in pixels."""
        return self.proj.kernel_size[0]

    @property
    def num_channels(self) -> int:
        """The channels of the images."""
        return self.proj.in_channels


def patches_of(images: Tensor, down: int, across: int) -> Tensor:
    """Patches in the order of a convolution's weights: (B, 3, H, W) -> (B, h, w, 3, down, across), a view."""
    h, w = images.shape[-2] // down, images.shape[-1] // across  # what is left over is left out
    patches = images[..., : h * down, : w * across].unflatten(3, (w, across)).unflatten(2, (h, down))
    return patches.permute(0, 2, 4, 1, 3, 5)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of an x that may be wider than the weights (a residual stream) or narrower (what autocast's
    convolutions return): computed in the wider of both dtypes, returned in the weights'.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.unrounded(x).to(self.weight.dtype)

    def unrounded(self, x: Tensor) -> Tensor:
        """As `forward`, but returned in the dtype that it is computed in: not cast to the weights'."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(wide)  # nn.LayerNorm may have none
        return F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), bias, self.eps)


class QKVProjection(nn.Linear):
    """Queries, keys and values by one matrix product: (B, N, C) -> (B, N, 3C). It is an nn.Linear, as tools expect.

    `bias` is (3C,): the queries' third, the keys', the values'. A third that the config lacks (DINOv3's keys have none)
    is zero and stays zero: it gets no gradient, and whatever else writes there is undone when `bias` is next read or
    saved (but not what `.data` is written in place, which PyTorch does not report).
    """

    _cleared = (0, 0)  # address and version of the bias when its absent thirds were last made zero

    def __init__(self, config: DINOv3Config) -> None:
        self.has_bias = {"q_bias": config.query_bias, "k_bias": config.key_bias, "v_bias": config.value_bias}
        super().__init__(config.hidden_size, 3 * config.hidden_size, bias=any(self.has_bias.values()))

    def reset_parameters(self) -> None:
        """As nn.Linear's, with a bias of zero."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        recorded = torch.is_grad_enabled() or torch.jit.is_tracing()  # what is traced may be trained
        if bias is not None and bias.requires_grad and recorded and not all(self.has_bias.values()):
            bias = self._with_zeros(bias)  # through which no gradient comes
        return F.linear(x, self.weight, bias)

    def _with_zeros(self, bias: Tensor) -> Tensor:
        thirds = zip(bias.chunk(3), self.has_bias.values(), strict=True)
        return torch.cat([third if present else torch.zeros_like(third) for third, present in thirds])

    def _absent(self, bias: Tensor) -> list[Tensor]:
        return [third for third, present in zip(bias.chunk(3), self.has_bias.values(), strict=True) if not present]

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name == "bias" and not torch.compiler.is_compiling() and type(value) is nn.Parameter:
            self._clear(value)
        return value

    def _clear(self, bias: nn.Parameter) -> None:
        """Undo what an initialisation, an addition of noise or another `.data` put where the config has no bias."""
        if bias.is_meta or bias.is_inference() or (state := (bias.data_ptr(), bias._version)) == self._cleared:
            return
        unseen(lambda: [third.zero_() for third in self._absent(bias.data)])  # .data: its version stays
        self._cleared = state

    def _save_to_state_dict(self, *args: Any) -> None:
        getattr(self, "bias", None)  # whose reading clears it
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        """Also takes the thirds by the names that our files have for them: q_bias, k_bias and v_bias, (C,) each.

        Where all are there, they count: PyTorch's and accelerate's loaders put `bias` as it was beside them.
        """
        name, own = f"{prefix}bias", self._parameters.get("bias")
        if own is not None:
            there = [f"{prefix}{third}" for third, present in self.has_bias.items() if present]
            given = {third: state_dict[third] for third in there if third in state_dict}
            if len(given) == len(there) or (given and name not in state_dict):
                zeros = torch.zeros_like(next(iter(given.values())))
                joined = torch.cat([given.get(f"{prefix}{third}", zeros) for third in self.has_bias])
                missing.extend(third for third in there if third not in given)
                state_dict[name] = joined if len(given) == len(there) else own  # of which nothing changes
                for third in given:
                    del state_dict[third]
            bias: Any = state_dict.get(name)
            is_plain = type(bias) in (Tensor, nn.Parameter) and bias.shape == own.shape and not bias.is_meta
            if is_plain and any(third.any() for third in self._absent(bias)):
                warnings.warn(f"{name} is not zero where the config has no bias: it is zero there", stacklevel=2)
                state_dict[name] = self._with_zeros(bias)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RoPE on queries and keys: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv = QKVProjection(config)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionFn) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)  # (B, N, heads, D) each
        return self.proj(attention(q, k, v, cos, sin).flatten(-2))

    def cls_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The weights softmax(scale q k^T) of the CLS token's query: (B, heads, N), in the tables' dtype."""
        q, k, _ = self.qkv(x).to(cos.dtype).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("bhd,bnhd->bhn", q[:, 0], apply_rope(k, cos, sin))  # a prefix token is not rotated
            return (scores * q.shape[-1] ** -0.5).softmax(dim=-1)


class Mlp(nn.Module):
    """fc2(act(fc1(x))), with the exact (erf) GELU in the released models: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, hidden: int, act: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.act, self.fc1(x), self.fc1))

    fused = forward  # there is nothing to fuse: PyTorch's GELU is one pass already


class GatedMlp(nn.Module):
    """w3(act(w1 x) * (w2 x)), SwiGLU in the released models (arXiv 2002.05202): (B, N, C) -> (B, N, C).

    w1 (the gate) and w2 (the value) lie one above the other in `w12`, so that one matrix product serves both.
    """

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.act = config.hidden_act
        self.w12 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)  # (B, N, F) each
        return self.w3(activate(self.act, gate, self.w12) * value)

    def fused(self, x: Tensor) -> Tensor:
        """`forward`, with our kernel between the projections."""
        if self.act != "silu":
            return self.forward(x)
        from .kernels import swiglu

        return self.w3(swiglu(self.w12(x)))


def activate(name: str, hidden: Tensor, projection: nn.Module) -> Tensor:
    """Apply "gelu" (the exact one, by erf) or "silu" to the output of `projection`.

    In place where nothing else can read that output, neither a backward pass nor an observer: the forward's largest
    tensor then exists once, and the allocator need not return and fetch such memory in every block.
    """
    if torch.is_grad_enabled() or traced() or not untouched(projection):
        return getattr(F, name)(hidden)
    return IN_PLACE[name](hidden)


IN_PLACE = {"gelu": torch.ops.aten.gelu_.default, "silu": torch.ops.aten.silu_.default}


class LayerScale(nn.Module):
    """The residual update x + gamma * branch, in one pass and in x's dtype (arXiv 2103.17239, section 2)."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), value))

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
        keep = branch.new_empty(branch.shape[0], *(1,) * (branch.ndim - 1)).bernoulli_(1.0 - self.p)
        return branch * (keep / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Block(nn.Module):
    """One pre-norm transformer block: (B, N, C) -> (B, N, C).

    x = x + ls1(attn(norm1(x)))
    x = x + ls2(mlp(norm2(x)))
    """

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SelfAttention(config)
        self.ls1 = LayerScale(config.hidden_size, config.layerscale_value)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.use_gated_mlp:
            self.mlp: Mlp | GatedMlp = GatedMlp(config)
        else:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)
        self.ls2 = LayerScale(config.hidden_size, config.layerscale_value)
        self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionFn) -> Tensor:
        if fuses_rows(attention, x) and self._is_fusible():
            return self._fused(x, cos, sin, attention)
        x = self.ls1(x, self.drop_path(self.attn(self.norm1(x), cos, sin, attention)))  # adds the branch to x
        return self.ls2(x, self.drop_path(self.mlp(self.norm2(x))))

    def _is_fusible(self) -> bool:
        return untouched(self.ls1, self.norm2, self.mlp, past_modes=False) and self.norm2.bias is not None

    def _fused(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionFn) -> Tensor:
        """The same two lines in fewer passes: our kernels read the weights of ls1 and norm2 directly."""
        from .kernels import add_layer_norm

        branch = self.drop_path(self.attn(self.norm1(x), cos, sin, attention))
        x, normed = add_layer_norm(x, branch, self.ls1.gamma, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        return self.ls2(x, self.drop_path(self.mlp.fused(normed)))

    def cls_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """How much the CLS token attends to each token in this block: (B, heads, N)."""
        return self.attn.cls_attention(self.norm1(x), cos, sin)


OURS: dict[type, Any] = {}
"""The classes that faster ways know, with the `forward` that each of them has."""


def add_ours(*classes: type[nn.Module]) -> None:
    """Register classes of ours, as they are now: `untouched` lets faster ways stand in for modules of these alone."""
    OURS.update({cls: cls.forward for cls in classes})


add_ours(Block, LayerNorm, SelfAttention, QKVProjection, Mlp, GatedMlp, LayerScale, DropPath, PatchEmbed)
add_ours(nn.Linear, nn.Conv2d)
CALL = nn.Module.__call__
GLOBAL_HOOKS = (
    *(of_all_modules._global_forward_pre_hooks, of_all_modules._global_forward_hooks),
    *(of_all_modules._global_backward_pre_hooks, of_all_modules._global_backward_hooks),
)


def untouched(*modules: nn.Module, past_modes: bool = True) -> bool:
    """Whether a faster way may stand in for these modules: they are ours, plain, and unobserved. Not their children.

    Everything that is not plain eager execution (fused kernels, activations in place, folded and prepacked weights,
    compiled graphs) goes past modules or changes what flows between them. It asks this first, and declines if anybody
    replaced or wrapped a module, gave it or its class another `forward`, gave it another kind of parameter, put a hook
    on it or on all modules, or gave all another `__call__`. past_modes: also if a mode watches PyTorch's functions or
    operators, which our kernels need not mind: they are operators like others, and overwrite nothing.
    """
    observed = any(GLOBAL_HOOKS) or nn.Module.__call__ is not CALL or (past_modes and modes_watch())
    return not observed and all(
        OURS.get(type(module)) is type(module).forward
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and all(p is None or type(p) is nn.Parameter for p in dict.values(module._parameters))
        for module in modules
    )
