"""The attention functions, all of one signature, and the one place that chooses between them.

    attention(q, k, v, cos, sin, scale=None) -> (B, N, heads, D)

q, k, v: (B, N, heads, D), views of one fused projection. cos, sin: (N, D/2), or (B, N, D/2) where every sequence has
its own: the rotation of each token, the identity for prefix tokens. scale: of the scores, D ** -0.5 unless given. The
result has q's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import apply_rope
from .tracing import traced

KEYS_AT_ONCE = 512  # what PyTorch's kernel for CPUs takes: beyond, what a rest costs is not seen
AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v as written, in the tables' dtype (float32 or wider): the definition of the others."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide_q, wide_k, wide_v = (x.to(cos.dtype) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", apply_rope(wide_q, cos, sin), apply_rope(wide_k, cos, sin)) * scale
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), wide_v).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's fused attention after a rotation in float32: memory linear in the tokens, on any device."""
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    if not traced() and suits_sixteens(q):
        from .attention_ways import sdpa_of_sixteens

        return sdpa_of_sixteens(q, k, v, scale)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def suits_sixteens(q: Tensor) -> bool:
    """A number of keys in bfloat16 that a processor with AMX takes longer for than for the next multiple of 16."""
    tokens = q.shape[1]
    return q.is_cpu and q.dtype == torch.bfloat16 and tokens % 16 > 0 and tokens <= KEYS_AT_ONCE and has("amx_tile")


def suits_products(*qkv: Tensor) -> bool:
    """bfloat16 on a processor that multiplies it without AMX, where PyTorch's fused kernel takes 1.3 to 1.8 times as
    long as products. It is taken all the same where gradients are wanted or a program is traced.
    """
    if traced() or not has("avx512_bf16") or has("amx_tile"):
        return False
    plain = all(type(x) is Tensor and x.is_cpu and x.dtype == torch.bfloat16 for x in qkv)
    return plain and not (torch.is_grad_enabled() and any(x.requires_grad for x in qkv))


@cache
def has(instructions: str) -> bool:
    """Whether this processor has such instructions, as far as PyTorch can tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # which older releases lack
    return capabilities is not None and bool(capabilities().get(instructions))


def triton_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float | None = None) -> Tensor:
    """Our own kernels, with the rotation inside where that is faster: see `kernels/README.md`.

    Each is compared with plain torch at its first use, see `kernels/first_use.py`; one that is wrong on this GPU is
    replaced by PyTorch's own operations, with a warning. Raises RuntimeError that says why where they can't run,
    ValueError for a dtype or head dim that they don't take.
    """
    from .kernels import rope_attention, rope_attention_packed

    if cos.ndim == 2:
        return rope_attention(q, k, v, cos, sin, scale)
    # every sequence has its own table: a pack of equal sequences
    B, N = q.shape[:2]
    cu_seqlens = torch.arange(0, B * N + 1, N, dtype=torch.int32, device=q.device)
    packed = (x.flatten(0, 1) for x in (q, k, v, cos, sin))
    return rope_attention_packed(*packed, cu_seqlens, N, scale).unflatten(0, (B, N))


def auto_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float | None = None) -> Tensor:
    """`triton` for the tensors that the kernels are made for, plain products where they are faster on a CPU, `sdpa` for
    all others.
    """
    if suits_products(q, k, v):
        from .attention_ways import products

        return products(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, scale)
    attention = triton_attention if suits_triton(q) else sdpa_attention
    return attention(q, k, v, cos, sin, scale)


def suits_triton(q: Tensor) -> bool:
    """Half precision and a head dim that is a multiple of 16, where the kernels can run."""
    suits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 16 == 0 and q.shape[-1] <= 256 and _on_gpu(q)
    return suits and not _found_wrong(q)


def _found_wrong(q: Tensor) -> bool:
    """Whether our kernels of attention were compared with plain torch at their first use here, and lost.

    A program being traced takes their op in any case: it compares and falls back by itself, though not as fast.
    """
    if traced():
        return False
    from .kernels.first_use import has_failed

    return has_failed(q, "rotate", "rope_attention", "rope_attention_backward")


def _on_gpu(x: Tensor) -> bool:
    """A GPU of capability 8.0 or more, with triton installed."""
    if not x.is_cuda:
        return False
    from .kernels.availability import TRITON_INSTALLED

    return TRITON_INSTALLED and torch.cuda.get_device_properties(x.device).major >= 8


ATTENTION: dict[str, AttentionFn] = {
    "auto": auto_attention,
    "sdpa": sdpa_attention,
    "eager": eager_attention,
    "triton": triton_attention,
}


def resolve_attention(name: str) -> AttentionFn:
    """The attention function of that name. `auto` chooses for each tensor; a named one never falls back to another.

    Raises ValueError for an unknown name.
    """
    if name not in ATTENTION:
        raise ValueError(f"attention is {name!r}: expected one of {', '.join(ATTENTION)}")
    return ATTENTION[name]


def fuses_rows(attention: AttentionFn, x: Tensor) -> bool:
    """Whether a block's passes over the residual stream x (B, N, C) are our kernels too: beside `triton`, and beside
    `auto` on a GPU. torch.compile, which fuses such passes by itself, gets PyTorch's.
    """
    attention = getattr(attention, "within", attention)  # of a packed sequence
    chosen = attention is triton_attention or (attention is auto_attention and _on_gpu(x))
    return chosen and x.dtype != torch.float64 and not traced()
