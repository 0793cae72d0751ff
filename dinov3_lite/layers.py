"""What a block is made of, and the block (arXiv 2508.10104, section 3; the ViT itself is arXiv 2010.11929).

Letters in the shape comments: B batch, N tokens, P patch tokens, C embedding, F hidden width of the MLP, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn
from .config import DINOv3Config
from .rope import apply_rope


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

    def fused_bias(self) -> Tensor | None:
        """(3C,), zeros where the config has none; None where it has none at all."""
        biases = [self.q_bias, self.k_bias, self.v_bias]
        if all(b is None for b in biases):
            return None
        absent = self.weight.new_zeros(self.in_features)
        return torch.cat([absent if b is None else b for b in biases])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.fused_bias())


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

    def cls_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The weights softmax(scale q k^T) of the CLS token's query: (B, heads, N), in the tables' dtype."""
        q, k, _ = self.qkv(x).to(cos.dtype).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        scores = torch.einsum("bhd,bnhd->bhn", q[:, 0], apply_rope(k, cos, sin))  # a prefix token is not rotated
        return (scores * q.shape[-1] ** -0.5).softmax(dim=-1)


def activate(name: str, hidden: Tensor, projection: nn.Module) -> Tensor:
    """Apply "gelu" (the exact one, by erf) or "silu" to what `projection` put out.

    In its own memory where nobody else reads it, neither a backward pass nor a hook: a forward's largest tensor is then
    there once, and the allocator need not return and fetch such memory in every block.
    """
    if torch.is_grad_enabled() or projection._forward_hooks:
        return getattr(F, name)(hidden)
    return getattr(torch.ops.aten, f"{name}_")(hidden)


class Mlp(nn.Module):
    """fc2(act(fc1(x))), with the exact (erf) GELU in the released models: (B, N, C) -> (B, N, C).

    It has nothing to fuse: PyTorch's GELU is one pass already.
    """

    def __init__(self, channels: int, hidden: int, act: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        return self.fc2(activate(self.act, self.fc1(x), self.fc1))


class GatedMlp(nn.Module):
    """w3(act(w1 x) * (w2 x)), SwiGLU in the released models (arXiv 2002.05202): (B, N, C) -> (B, N, C).

    w1 (the gate) and w2 (the value) lie one above the other in `w12`, so that one matrix product serves both.
    """

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        self.act = config.hidden_act
        self.w12 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        if fused and self.act == "silu":
            from .kernels import swiglu

            return self.w3(swiglu(self.w12(x)))
        gate, value = self.w12(x).chunk(2, dim=-1)  # (B, N, F) each
        return self.w3(activate(self.act, gate, self.w12) * value)


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

    `fused` takes our kernels for the end of the first line with the norm of the second, and for SwiGLU.
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionFn, fused: bool = False) -> Tensor:
        branch = self.drop_path(self.attn(self.norm1(x), cos, sin, attention))
        if fused:
            from .kernels import add_layer_norm

            x, normed = add_layer_norm(x, branch, self.ls1.gamma, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        else:
            x = self.ls1(x, branch)
            normed = self.norm2(x)
        return self.ls2(x, self.drop_path(self.mlp(normed, fused)))

    def cls_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """How much the CLS token attends to each token in this block: (B, heads, N)."""
        return self.attn.cls_attention(self.norm1(x), cos, sin)
