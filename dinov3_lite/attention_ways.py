"""The ways in which a CPU attends: torch's fused kernel in the model's dtype or in float32, or plain products.

    attend(q, k, v) -> (B, N, heads, D)

q, k, v: (B, N, heads, D), rotated already; scores are scaled by D ** -0.5. Which way is fastest differs from processor
to processor, with the dtype and with the number of tokens: `choices` measures it.
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
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


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
    "sdpa in float32": sdpa_in_float32,
    "products, 1 head": partial(products, at_a_time=1),
    "products, 4 heads": partial(products, at_a_time=4),
}


def ways_of_attention(dtype: torch.dtype) -> list[str]:
    """The names of those ways that differ for this dtype; the first wins where they are level."""
    return [name for name in ATTENTIONS if not (dtype == torch.float32 and name == "sdpa in float32")]
