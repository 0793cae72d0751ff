"""RoPE attention's kernels against float64, in triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from dinov3_lite.kernels import (
    rope_attention,
    rope_attention_packed,
    rope_attention_packed_reference,
    rope_attention_reference,
)
from helpers import relative_error
from kernel_inputs import (
    DEVICE,
    DTYPES,
    assert_no_worse_than,
    attention_inputs,
    attention_with_gradients,
    check_attention,
    whole_table,
)

from dinov3_lite.attention import sdpa_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

STRATEGIES = ["fused", "separate"]
OPS = torch.ops.dinov3_lite


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, N, heads, D, P",
    [
        (2, 5, 3, 64, 0),  # no token is rotated
        (2, 6, 3, 64, 1),
        (1, 16, 2, 64, 16),  # every token is, and one tail tile is full
        (3, 17, 1, 64, 12),
        (1, 63, 2, 64, 58),
        (1, 64, 2, 64, 59),
        (2, 65, 1, 64, 60),  # 64 + 1
        (1, 133, 1, 64, 128),  # 2 * 64 + 5
    ],
)
def test_any_number_of_tokens(strategy, dtype, B, N, heads, D, P):
    check_attention(B, N, heads, D, P, dtype)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("N, D, dtype", [(201, 64, torch.float16), (133, 128, torch.float16), (65, 128, torch.float32)])
def test_sizes_of_released_models(strategy, N, D, dtype):
    check_attention(1, N, 1, D, N - 5, dtype)


def test_the_longest_that_own_kernels_take_of_themselves():
    """384 pixels: the strategy is the table's own, and training stays with these kernels."""
    check_attention(1, 581, 1, 64, 576, torch.float16)


@pytest.mark.parametrize("strategy", ["fused"], indirect=True)
@pytest.mark.parametrize("D", range(16, 257, 16))
def test_any_head_dim(strategy, D):
    check_attention(1, 21, 2, D, 16, torch.float16 if D % 32 else torch.float32)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("D", [16, 48, 80, 256])
def test_whole_tiles_of_padded_head_dims(strategy, D):
    check_attention(1, 70, 1, D, 65, torch.float16)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_attends_to_itself(strategy, dtype):
    qkv, cos, sin = attention_inputs(2, 1, 3, 64, 1, dtype)
    out, dq, dk, dv = attention_with_gradients(rope_attention, qkv, cos, sin)
    assert torch.equal(out, qkv[:, :, 2])
    torch.testing.assert_close(dv, attention_with_gradients(rope_attention_reference, qkv, cos, sin)[3])
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5  # zero, but for the rounding of dP - delta


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_attend_to_themselves(strategy, dtype):
    lengths = torch.tensor([70, 6, 0, 1, 37], device=DEVICE)  # an empty one among them
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    qkv, cos, sin = (x.squeeze(0) for x in attention_inputs(1, 114, 2, 64, 114, dtype))
    cos[70:75], sin[70:75] = 1.0, 0.0
    truth = attention_with_gradients(
        rope_attention_packed_reference, qkv.double(), cos.double(), sin.double(), cu_seqlens=cu_seqlens, max_seqlen=70
    )

    def one_by_one(q, k, v, cos, sin):
        sequences = zip(*(x.split(lengths.tolist()) for x in (q, k, v, cos, sin)), strict=True)
        return torch.cat([sdpa_attention(q[None], k[None], v[None], c, s)[0] for q, k, v, c, s in sequences if len(q)])

    yardstick = attention_with_gradients(one_by_one, qkv, cos, sin)
    ours = attention_with_gradients(rope_attention_packed, qkv, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=70)
    assert_no_worse_than(yardstick, ours, truth, "out dq dk dv")


def test_a_pack_has_a_scale_of_its_own():
    qkv, cos, sin = (x.squeeze(0) for x in attention_inputs(1, 21, 2, 32, 21, torch.float32))
    pack = {"cu_seqlens": torch.tensor([0, 4, 21], dtype=torch.int32, device=DEVICE), "max_seqlen": 17, "scale": 0.4}
    truth = attention_with_gradients(rope_attention_packed_reference, qkv.double(), cos.double(), sin.double(), **pack)
    for a, t in zip(attention_with_gradients(rope_attention_packed, qkv, cos, sin, **pack), truth, strict=True):
        assert relative_error(a, t) < 2e-6


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_one_gradient_alone(wanted):
    qkv, cos, sin = attention_inputs(1, 9, 2, 16, 4, torch.float32)
    ours = dict(zip("qkv", qkv.unbind(2), strict=True))
    wide = {name: x.double() for name, x in ours.items()}
    gradients = []
    for tensors, attention in ((ours, rope_attention), (wide, rope_attention_reference)):
        tensors[wanted] = tensors[wanted].clone().requires_grad_()
        out = attention(*tensors.values(), cos.to(tensors["q"].dtype), sin.to(tensors["q"].dtype))
        gradients += torch.autograd.grad(out.square().sum(), tensors[wanted])
    assert relative_error(*gradients) < 2e-6


def test_packed_agrees_with_images_by_themselves():
    """Two images in a pack are the two images in a batch, bit for bit, whatever else max_seqlen would allow."""
    qkv, cos, sin = attention_inputs(2, 21, 2, 64, 21, torch.float16)
    batch = attention_with_gradients(rope_attention, qkv, cos, sin)
    cu_seqlens = torch.tensor([0, 21, 42], dtype=torch.int32, device=DEVICE)
    tables = torch.cat((cos, cos)), torch.cat((sin, sin))
    pack = attention_with_gradients(
        rope_attention_packed, qkv.flatten(0, 1), *tables, cu_seqlens=cu_seqlens, max_seqlen=100
    )
    for one, other in zip(batch, pack, strict=True):
        assert torch.equal(one.flatten(0, 1), other)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
def test_any_strides(strategy):
    """Heads before tokens, one set of keys for the whole batch, every second token: all without a copy."""
    B, N, heads, D = 2, 19, 3, 32
    _, cos, sin = attention_inputs(B, N, heads, D, 14, torch.float32)
    q = torch.randn(B, heads, N, D, device=DEVICE).transpose(1, 2)
    k = torch.randn(1, N, heads, D, device=DEVICE).expand(B, -1, -1, -1)
    v = torch.randn(B, 2 * N, heads, D, device=DEVICE)[:, ::2]
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    assert [x.stride() for x in tensors] == [x.stride() for x in (q, k, v)]
    out = rope_attention(*tensors, cos, sin, 0.3)
    grads = torch.autograd.grad(out.sum(), tensors)  # the gradient of a sum has stride 0
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = rope_attention_reference(*wide, cos.double(), sin.double(), 0.3)
    for a, t in zip((out, *grads), (truth, *torch.autograd.grad(truth.sum(), wide)), strict=True):
        assert relative_error(a, t) < 2e-6


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_thousands(strategy, dtype):
    """Neither the output nor a gradient loses a digit to them: maximum and total of a row are kept apart.

    In float32 most of the error is that of the scores themselves, for everybody: whose is less depends on the order of
    sums. A logarithm of the sum instead cost dv four times PyTorch's error here.
    """
    qkv, cos, sin = attention_inputs(1, 133, 2, 64, 128, torch.float32)
    qkv[:, :, :2] *= 30
    qkv = qkv.to(dtype)
    truth = attention_with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    yardstick = attention_with_gradients(sdpa_attention, qkv, *whole_table(cos, sin, 133))
    _, maximum, _ = OPS.rope_attention(*qkv.unbind(2), cos, sin, None, None, 0.125, True)
    assert maximum.max() > 1000
    ours = attention_with_gradients(rope_attention, qkv, cos, sin)
    assert_no_worse_than(yardstick, ours, truth, "out dq dk dv", factor=2.0 if dtype == torch.float32 else 1.1)


def test_many_tokens_share_a_score_of_thousands():
    """The sum of a row is then as large as the weights are small; its logarithm beside the maximum had no digits left.

    Keys of one length and direction, so every score is about 6000 and every weight about 1/133.
    """
    qkv, cos, sin = attention_inputs(1, 133, 1, 64, 0, torch.float32)
    qkv[:, :, 0] = 27 + 1e-3 * qkv[:, :, 0]
    qkv[:, :, 1] = 27 + 1e-3 * qkv[:, :, 1]
    truth = attention_with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    yardstick = attention_with_gradients(sdpa_attention, qkv, *whole_table(cos, sin, 133))
    ours = attention_with_gradients(rope_attention, qkv, cos, sin)
    assert_no_worse_than(yardstick, ours, truth, "out dq dk dv", factor=2.0)


def test_rows_of_very_negative_scores():
    """Their maximum is far below zero: 2^(0 - maximum), of what lies beyond the edge, is infinite."""
    qkv, cos, sin = attention_inputs(1, 69, 1, 64, 0, torch.float32)
    qkv[:, :, 0], qkv[:, :, 1] = qkv[:, :, 0].abs() - 10, qkv[:, :, 1].abs() + 10
    truth = attention_with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    ours = attention_with_gradients(rope_attention, qkv, cos, sin)
    _, maximum, _ = OPS.rope_attention(*qkv.unbind(2), cos, sin, None, None, 0.125, True)
    assert maximum.max() < -200
    yardstick = attention_with_gradients(sdpa_attention, qkv, *whole_table(cos, sin, 69))
    assert_no_worse_than(yardstick, ours, truth, "out dq dk dv")


def test_gradients_are_the_same_every_time():
    qkv, cos, sin = attention_inputs(1, 70, 1, 64, 65, torch.float16)
    first, second = (attention_with_gradients(rope_attention, qkv, cos, sin) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
def test_images_lie_more_than_2_to_the_31_elements_apart(strategy, monkeypatch):
    """The stride between images fits 32 bits, its double does not."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # untouched, 4 GB cost nothing
    far = torch.empty(2**31 + 6 * 3 * 16, dtype=torch.float16, device=DEVICE)
    qkv = far.as_strided((3, 6, 3, 1, 16), (2**30, 48, 16, 16, 1))
    near, cos, sin = attention_inputs(3, 6, 1, 16, 5, torch.float16)
    qkv.copy_(near)
    assert torch.equal(rope_attention(*qkv.unbind(2), cos, sin), rope_attention(*near.unbind(2), cos, sin))
