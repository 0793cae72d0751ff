"""The ways in which a CPU attends: torch's fused kernel in the model's dtype or in float32, or two products.

    attend(q, k, v) -> (B, N, heads, D)

q, k, v: (B, N, heads, D), rotated already; scores are scaled by D ** -0.5. Which way is fastest differs from processor
to processor, with the dtype and with the number of tokens: `choices` measures it.

PyTorch's kernel takes up to 512 keys at once. With AMX a number of them that is no multiple of 16 takes longer than the
next one that is: 201 keys in bfloat16 1.2 to 1.8 times as long as 208. Hence `sdpa_of_sixteens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .prepacked import error_of_sums, linear_by_onednn, packed_by_onednn, works

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SCORES = 1 << 21  # that are held at a time: what comes next finds them in a cache

LONGEST = 1024  # terms that oneDNN adds up one after the other: longer sums err little more
EXACT_ENOUGH = 1.8  # times the error of PyTorch's own sums of `LONGEST`: of what is weighed, hidden states show little


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
    return _fused(q, k, v, _counts(q, k.shape[1])[None, None, None], scale)


def _fused(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None, scale: float | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, added, scale=scale).transpose(1, 2)


def _counts(q: Tensor, keys: int) -> Tensor:
    """What is added to the scores of so many keys, of which as many count as there are queries: (keys,), 0 or -inf."""
    return F.pad(q.new_zeros(q.shape[1]), (0, keys - q.shape[1]), value=-torch.inf)


def sixteens(tokens: int) -> int:
    """The least multiple of 16 that is not below."""
    return -(-tokens // 16) * 16


def sdpa_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in float32: faster where half precision is emulated."""
    return sdpa(q.float(), k.float(), v.float()).to(q.dtype)


def products(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v as two products, of as many images, heads and queries at a time as `SCORES` allows.

    The softmax is computed in float32. In bfloat16 scores are computed twice, the second time less the greatest of a
    query's before they are rounded, which then changes those least that weigh most.
    """
    B, N, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    images, heads, queries = pieces(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    scores = q.new_empty(heads, queries, N)
    for b in range(0, B, images):
        q_, k_, v_ = (x[b : b + images].transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # (heads, N, D)
        results = torch.empty_like(q_)
        for h in range(0, len(q_), heads):
            some, keys, values = (x[h : h + heads] for x in (q_, k_.transpose(1, 2), v_))
            for rows in slices(N, queries):
                held = scores[: len(some), : some[:, rows].shape[1]]
                torch.baddbmm(held, some[:, rows], keys, beta=0.0, alpha=scale, out=held)
                if q.dtype == torch.bfloat16:
                    held.copy_(_greatest(held).neg_().expand_as(held))
                    torch.baddbmm(held, some[:, rows], keys, alpha=scale, out=held)
                results[h : h + heads, rows] = torch.bmm(_softmax(held), values)
        out[b : b + images] = results.unflatten(0, (-1, H)).transpose(1, 2)
    return out


def _greatest(scores: Tensor) -> Tensor:
    """The greatest of bfloat16 over the last dimension, which stays: of their bits as whole numbers, in a third of the
    time. From 0 on these have the order of the numbers; where all are below, the numbers are asked.
    """
    found = scores.view(torch.int16).amax(dim=-1, keepdim=True).view(scores.dtype)
    return scores.amax(dim=-1, keepdim=True) if (found < 0).any() else found


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; in half precision by oneDNN where it can, which takes a third of PyTorch's time."""
    if scores.dtype == torch.float32 or not works("onednn", scores.dtype):
        return scores.softmax(dim=-1)
    return scores.to_mkldnn().softmax(dim=-1).to_dense()


def pieces(q: Tensor) -> tuple[int, int, int]:
    """How many images, heads of theirs, and queries have their scores held at a time, the queries in equal pieces."""
    B, N, H, _ = q.shape
    scores = max(SCORES, N)
    images = max(1, min(B, scores // (H * N * N)))
    heads = max(1, min(images * H, scores // (N * N)))
    parts = -(-N // min(N, scores // (heads * N)))
    return images, heads, -(-N // parts)


def slices(N: int, each: int) -> Iterator[slice]:
    """So many of N numbers at a time."""
    for start in range(0, N, each):
        yield slice(start, start + each)


def products_by_onednn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in float32, a head at a time, by oneDNN: on some processors the faster library, which PyTorch does not
    use for batches of float32. It is fast for keys up to a multiple of 16, of which those that fill up count nothing.
    """
    B, N, H, D = q.shape
    more = sixteens(N) - N
    counts = _counts(q, sixteens(N))
    k = F.pad(k.transpose(1, 2) * D**-0.5, (0, 0, 0, more)).contiguous()  # (B, H, keys, D)
    v = F.pad(v.permute(0, 2, 3, 1), (0, more)).contiguous()  # (B, H, D, keys)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _, _, queries = pieces(q[:1, :, :1])
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h], v[b, h]
            if queries < N:  # multiplied by more than once
                keys, values = packed_by_onednn(keys), packed_by_onednn(values)
            for rows in slices(N, queries):
                scores = linear_by_onednn(q[b, rows, h], keys, counts)
                out[b, rows, h] = linear_by_onednn(scores.softmax(dim=-1), values)
    return out


def convolutions_by_onednn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in float32 for all heads of an image at once, as two convolutions of one pixel with a group for each
    head: the only batches of float32 products that PyTorch gives to oneDNN. Tokens are the image's pixels.
    """
    B, N, H, D = q.shape
    keys, values = q.new_zeros(H, sixteens(N), D), q.new_zeros(H, D, sixteens(N))
    counts = _counts(q, sixteens(N)).repeat(H)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    parts = -(-N // max(1, SCORES // (H * sixteens(N))))
    for b in range(B):
        torch.mul(k[b].transpose(0, 1), D**-0.5, out=keys[:, :N])
        values[:, :, :N] = v[b].permute(1, 2, 0)
        for rows in slices(N, -(-N // parts)):
            scores = _convolved(q[b, rows], keys, counts)
            out[b, rows] = _convolved(scores.softmax(dim=-1), values)
    return out


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b, with a W for each head: x (n, heads, in), weight (heads, out, in), bias (heads * out,)."""
    image = x.flatten(1)[None, :, None].movedim(-1, 1)  # (1, channels, n, 1), the channels last in memory
    out = F.conv2d(image, weight.flatten(0, 1)[..., None, None], bias, groups=len(weight))
    return out.movedim(1, -1).reshape(len(x), *weight.shape[:2])


HALF_PRECISION: dict[str, Attend] = {
    "sdpa": sdpa,
    "sdpa of sixteens": sdpa_of_sixteens,
    "sdpa in float32": sdpa_in_float32,
    "products": products,
}
FLOAT32: dict[str, Attend] = {
    "sdpa": sdpa,
    "products": products,
    "products by oneDNN": products_by_onednn,
    "convolutions by oneDNN": convolutions_by_onednn,
}
ATTENTIONS = HALF_PRECISION | FLOAT32


def ways_of_attention(dtype: torch.dtype) -> list[str]:
    """The names of those ways that differ for this dtype, and err little more than PyTorch's own; the first wins where
    they are level.
    """
    if dtype != torch.float32:  # float16 can't hold every score
        return [way for way in HALF_PRECISION if dtype == torch.bfloat16 or way != "products"]
    exact = works("onednn", dtype) and error_of_sums(LONGEST) <= EXACT_ENOUGH
    return [way for way in FLOAT32 if exact or "oneDNN" not in way]
