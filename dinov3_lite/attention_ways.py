"""The ways in which a CPU attends: torch's fused kernel in the model's dtype or in float32, or plain products.

    attend(q, k, v) -> (B, N, heads, D)

q, k, v: (B, N, heads, D), rotated already; scores are scaled by D ** -0.5. Which way is fastest differs from processor
to processor, with the dtype and with the number of tokens: `choices` measures it.

PyTorch's kernel takes up to 512 keys at once. With AMX a number of them that is no multiple of 16 takes longer than the
next one that is: 201 keys in bfloat16 1.2 to 1.8 times as long as 208. Hence `sdpa_of_sixteens`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SCORES = 1 << 21  # how many scores are held at a time: one or two megabytes of a second-level cache each


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused kernel."""
    return _fused(q, k, v)


def sdpa_of_sixteens(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The same with keys and values up to a whole number of sixteens, of which as many count as there are queries.

    They may come so, with any finite numbers behind those that count: else they are copied.
    """
    N = q.shape[1]
    if k.shape[1] < sixteens(N):
        k, v = (F.pad(x, (0, 0, 0, 0, 0, sixteens(N) - N)) for x in (k, v))
    counts = F.pad(q.new_zeros(1, 1, 1, N), (0, k.shape[1] - N), value=-torch.inf)
    return _fused(q, k, v, counts, scale)


def _fused(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None, scale: float | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, added, scale=scale).transpose(1, 2)


def sixteens(tokens: int) -> int:
    """The least multiple of 16 that is not below."""
    return -(-tokens // 16) * 16


def sdpa_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in float32: faster where half precision is emulated."""
    return sdpa(q.float(), k.float(), v.float()).to(q.dtype)


def products(q: Tensor, k: Tensor, v: Tensor, at_a_time: int) -> Tensor:
    """softmax(scale q k^T) v as two products, of some heads and so many of their queries that the scores stay in cache.

    The softmax is computed in float32, in half precision of scores that were rounded once.
    """
    B, N, H, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    queries = max(1, min(N, SCORES // (at_a_time * N)))
    scores = q.new_empty(at_a_time, queries, N)
    for b in range(B):
        for h in range(0, H, at_a_time):
            q_, k_, v_, out_ = (x[b, :, h : h + at_a_time].transpose(0, 1) for x in (q, k, v, out))  # (heads, N, D)
            for start in range(0, N, queries):
                some, result = q_[:, start : start + queries], out_[:, start : start + queries]
                held = scores[: some.shape[0], : some.shape[1]]
                torch.baddbmm(held, some, k_.transpose(1, 2), beta=0.0, alpha=D**-0.5, out=held)
                result.copy_(torch.bmm(held.softmax(dim=-1), v_))
    return out


ATTENTIONS: dict[str, Attend] = {
    "sdpa": sdpa,
    "sdpa of sixteens": sdpa_of_sixteens,
    "sdpa in float32": sdpa_in_float32,
    "products, 1 head": partial(products, at_a_time=1),
    "products, 4 heads": partial(products, at_a_time=4),
}


def ways_of_attention(dtype: torch.dtype) -> list[str]:
    """The names of those ways that differ for this dtype; the first wins where they are level."""
    of_half_precision = ("sdpa of sixteens", "sdpa in float32")
    return [name for name in ATTENTIONS if not (dtype == torch.float32 and name in of_half_precision)]
