"""RoPE attention's kernels against float64, in triton's interpreter where there is no GPU.

Uninitialised memory is NaN in every test, so that an output that no program writes can't pass by luck.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from dinov3_lite.kernels import attention as ops
from dinov3_lite.kernels import (
    rope_attention,
    rope_attention_packed,
    rope_attention_packed_reference,
    rope_attention_reference,
    tuning,
)
from helpers import TINY, TINY_GATED, relative_error, run_python, write_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_lite import DINOv3ViT
from dinov3_lite.attention import sdpa_attention

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter multiplies bit patterns for bfloat16, so that is tested on GPUs only
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
STRATEGIES = ["fused", "separate"]
OPS = torch.ops.dinov3_lite
SWIGLU = replace(TINY, use_gated_mlp=True, hidden_act="silu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Deterministic algorithms, which also fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(0).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def strategy(request, monkeypatch) -> str:
    """The rotation inside the attention kernel, or in a pass of its own: whatever the number of tokens."""
    limit = {"fused": 10**9, "separate": 0}[request.param]
    monkeypatch.setattr(tuning, "FUSED_UP_TO", dict.fromkeys(tuning.ARCHITECTURES, limit))
    monkeypatch.setattr(tuning, "prefers_sdpa", lambda tokens, head_dim: False)
    return request.param


def inputs(B: int, N: int, heads: int, D: int, P: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The fused projection (B, N, 3, heads, D) and the tables of its last P tokens."""
    angles = 6 * torch.rand(P, D // 2)
    qkv = torch.randn(B, N, 3, heads, D).to(DEVICE, dtype)
    return qkv, angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def whole_table(cos: Tensor, sin: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """The tables with identity rows for the prefix, as the model has them."""
    prefix = N - cos.shape[0], cos.shape[1]
    return torch.cat((cos.new_ones(prefix), cos)), torch.cat((sin.new_zeros(prefix), sin))


def with_gradients(attention, qkv: Tensor, *arguments, **options) -> list[Tensor]:
    """The output, then the gradients of q, k and v, for the same gradient of the output whatever the dtype."""
    leaf = qkv.detach().requires_grad_()
    out = attention(*leaf.unbind(-3), *arguments, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad)[0].unbind(-3)]


def assert_no_worse_than(yardstick: list[Tensor], ours: list[Tensor], truth: list[Tensor]) -> None:
    """Each of ours has its counterpart's dtype, and at most 1.1 times its error or that of a few float32 roundings."""
    for name, a, y, t in zip(("out", "dq", "dk", "dv"), ours, yardstick, truth, strict=True):
        assert (a.dtype, a.shape) == (y.dtype, y.shape), name
        bound = max(1.1 * relative_error(y, t), 4 * torch.finfo(torch.float32).eps)
        assert relative_error(a, t) <= bound, (name, relative_error(a, t), bound)


def check(B: int, N: int, heads: int, D: int, P: int, dtype: torch.dtype, scale: float | None = None) -> None:
    """Output and gradients against float64, beside PyTorch's attention after a rotation of its own."""
    qkv, cos, sin = inputs(B, N, heads, D, P, dtype)
    truth = with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double(), scale)
    yardstick = with_gradients(sdpa_attention, qkv, *whole_table(cos, sin, N), scale)
    assert_no_worse_than(yardstick, with_gradients(rope_attention, qkv, cos, sin, scale), truth)


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
    check(B, N, heads, D, P, dtype)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("N, D, dtype", [(201, 64, torch.float16), (133, 128, torch.float16), (65, 128, torch.float32)])
def test_sizes_of_released_models(strategy, N, D, dtype):
    check(1, N, 1, D, N - 5, dtype)


def test_the_longest_that_own_kernels_take_of_themselves():
    """384 pixels: the strategy is the table's own, and training stays with these kernels."""
    check(1, 581, 1, 64, 576, torch.float16)


@pytest.mark.parametrize("strategy", ["fused"], indirect=True)
@pytest.mark.parametrize("D", range(16, 257, 16))
def test_any_head_dim(strategy, D):
    check(1, 21, 2, D, 16, torch.float16 if D % 32 else torch.float32)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("D", [16, 48, 80, 256])
def test_whole_tiles_of_padded_head_dims(strategy, D):
    check(1, 70, 1, D, 65, torch.float16)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_attends_to_itself(strategy, dtype):
    qkv, cos, sin = inputs(2, 1, 3, 64, 1, dtype)
    out, dq, dk, dv = with_gradients(rope_attention, qkv, cos, sin)
    assert torch.equal(out, qkv[:, :, 2])
    torch.testing.assert_close(dv, with_gradients(rope_attention_reference, qkv, cos, sin)[3])
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5  # zero, but for the rounding of dP - delta


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_attend_to_themselves(strategy, dtype):
    lengths = torch.tensor([70, 6, 0, 1, 37], device=DEVICE)  # an empty one among them
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    qkv, cos, sin = (x.squeeze(0) for x in inputs(1, 114, 2, 64, 114, dtype))
    cos[70:75], sin[70:75] = 1.0, 0.0
    truth = with_gradients(
        rope_attention_packed_reference, qkv.double(), cos.double(), sin.double(), cu_seqlens=cu_seqlens, max_seqlen=70
    )

    def one_by_one(q, k, v, cos, sin):
        sequences = zip(*(x.split(lengths.tolist()) for x in (q, k, v, cos, sin)), strict=True)
        return torch.cat([sdpa_attention(q[None], k[None], v[None], c, s)[0] for q, k, v, c, s in sequences if len(q)])

    yardstick = with_gradients(one_by_one, qkv, cos, sin)
    ours = with_gradients(rope_attention_packed, qkv, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=70)
    assert_no_worse_than(yardstick, ours, truth)


def test_packed_agrees_with_images_by_themselves():
    """Two images in a pack are the two images in a batch, bit for bit, whatever else max_seqlen would allow."""
    qkv, cos, sin = inputs(2, 21, 2, 64, 21, torch.float16)
    batch = with_gradients(rope_attention, qkv, cos, sin)
    cu_seqlens = torch.tensor([0, 21, 42], dtype=torch.int32, device=DEVICE)
    tables = torch.cat((cos, cos)), torch.cat((sin, sin))
    pack = with_gradients(rope_attention_packed, qkv.flatten(0, 1), *tables, cu_seqlens=cu_seqlens, max_seqlen=100)
    for one, other in zip(batch, pack, strict=True):
        assert torch.equal(one.flatten(0, 1), other)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
def test_any_strides(strategy):
    """Heads before tokens, one set of keys for the whole batch, every second token: all without a copy."""
    B, N, heads, D = 2, 19, 3, 32
    _, cos, sin = inputs(B, N, heads, D, 14, torch.float32)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_thousands(dtype):
    """Nothing overflows, and all that the gradients lose is the rounding of lse, which scales a row of P."""
    qkv, cos, sin = inputs(1, 69, 2, 64, 64, torch.float32)
    qkv[:, :, :2] *= 30
    qkv = qkv.to(dtype)
    truth = with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    yardstick = with_gradients(sdpa_attention, qkv, *whole_table(cos, sin, 69))
    ours = with_gradients(rope_attention, qkv, cos, sin)
    _, lse = OPS.rope_attention(*qkv.unbind(2), cos, sin, None, None, None, True)
    assert lse.max() > 1000
    rounding = 2**-24 * math.log(2) * lse.max().item()
    for a, y, t in zip(ours, yardstick, truth, strict=True):
        assert relative_error(a, t) <= 1.1 * relative_error(y, t) + rounding
    assert relative_error(ours[0], truth[0]) <= 1.1 * relative_error(yardstick[0], truth[0])


def test_rows_of_very_negative_scores():
    """Their lse is far below zero: 2^(0 - lse), of what lies beyond the edge, is infinite."""
    qkv, cos, sin = inputs(1, 69, 1, 64, 0, torch.float32)
    qkv[:, :, 0], qkv[:, :, 1] = qkv[:, :, 0].abs() - 10, qkv[:, :, 1].abs() + 10
    truth = with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    ours = with_gradients(rope_attention, qkv, cos, sin)
    _, lse = OPS.rope_attention(*qkv.unbind(2), cos, sin, None, None, None, True)
    assert lse.max() < -200
    yardstick = with_gradients(sdpa_attention, qkv, *whole_table(cos, sin, 69))
    rounding = 2**-24 * math.log(2) * -lse.min().item()
    for a, y, t in zip(ours, yardstick, truth, strict=True):
        assert relative_error(a, t) <= 1.1 * relative_error(y, t) + rounding


def test_gradients_are_the_same_every_time():
    qkv, cos, sin = inputs(1, 70, 1, 64, 65, torch.float16)
    first, second = (with_gradients(rope_attention, qkv, cos, sin) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
def test_images_lie_more_than_2_to_the_31_elements_apart(strategy, monkeypatch):
    """The stride between images fits 32 bits, its double does not."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # untouched, 4 GB cost nothing
    far = torch.empty(2**31 + 6 * 3 * 16, dtype=torch.float16, device=DEVICE)
    qkv = far.as_strided((3, 6, 3, 1, 16), (2**30, 48, 16, 16, 1))
    near, cos, sin = inputs(3, 6, 1, 16, 5, torch.float16)
    qkv.copy_(near)
    assert torch.equal(rope_attention(*qkv.unbind(2), cos, sin), rope_attention(*near.unbind(2), cos, sin))


# strategies


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels that are launched, and PyTorch's attention, in order."""
    from dinov3_lite.kernels import attention_triton

    launched = []

    class Spy:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(attention_triton, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("rotate", "attention_forward", "attention_backward_q", "attention_backward_kv"):
        monkeypatch.setattr(attention_triton, name, Spy(name))
    sdpa = ops.F.scaled_dot_product_attention
    monkeypatch.setattr(
        ops.F,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (launched.append("sdpa"), sdpa(*args, **kwargs))[1],
    )
    return launched


OWN_BACKWARD = ["rotate", "attention_backward_q", "attention_backward_kv"]


@pytest.mark.parametrize(
    "limit, training, deterministic, expected",
    [
        (450, False, False, ["attention_forward"]),
        (450, True, False, ["attention_forward", *OWN_BACKWARD]),
        (5, False, False, ["rotate", "sdpa"]),
        (5, True, False, ["rotate", "sdpa", "rotate"]),
        (5, True, True, ["rotate", "attention_forward", *OWN_BACKWARD]),
    ],
)
def test_strategies(monkeypatch, launches, limit, training, deterministic, expected):
    """The rotation inside, up to a number of tokens; beyond, a pass of its own and PyTorch's attention where it may."""
    torch.use_deterministic_algorithms(deterministic)
    monkeypatch.setattr(tuning, "FUSED_UP_TO", dict.fromkeys(tuning.ARCHITECTURES, limit))
    monkeypatch.setattr(tuning, "prefers_sdpa", lambda tokens, head_dim: tokens > limit)
    qkv, cos, sin = inputs(2, 9, 2, 32, 4, torch.float32)
    truth = with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    if training:
        ours = with_gradients(rope_attention, qkv, cos, sin)
    else:
        ours, truth = [rope_attention(*qkv.unbind(2), cos, sin)], truth[:1]
    assert launches == expected
    for a, t in zip(ours, truth, strict=True):
        assert relative_error(a, t) < 1e-6


@pytest.mark.parametrize("N, D, expected", [(450, 64, False), (600, 64, False), (601, 64, True), (451, 128, True)])
def test_where_pytorch_takes_over(N, D, expected):
    assert tuning.prefers_sdpa(N, D) == expected


# PyTorch


def test_opcheck():
    qkv, cos, sin = inputs(1, 6, 1, 16, 4, torch.float32)
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(2))
    cu_seqlens = torch.tensor([0, 5, 6], dtype=torch.int32, device=DEVICE)
    tables = whole_table(cos, sin, 6)
    torch.library.opcheck(OPS.rope_attention.default, (q, k, v, cos, sin, None, None, None, True))
    torch.library.opcheck(OPS.rope_attention.default, (*qkv.unbind(2), cos, sin, None, None, 0.3, False))
    torch.library.opcheck(OPS.rope_attention.default, (q, k, v, *tables, cu_seqlens, 5, None, True))
    torch.library.opcheck(OPS.rotate.default, (q, k, cos, sin, False))
    with torch.no_grad():
        out, lse = OPS.rope_attention(q, k, v, cos, sin, None, None, None, True)
    saved = (*qkv.unbind(2), cos, sin, None, None, None, out, lse)
    torch.library.opcheck(OPS.rope_attention_backward.default, (torch.randn_like(out), *saved))


def loss(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope_attention(*qkv.unbind(2), cos, sin).square().sum()


@pytest.mark.parametrize("backend, sizes", [("aot_eager", (6, 9)), ("inductor", (6,))])
def test_a_training_step_compiles_whole(backend, sizes):
    compiled = torch.compile(loss, fullgraph=True, dynamic=len(sizes) > 1, backend=backend)
    for N in sizes:
        qkv, cos, sin = inputs(2, N, 2, 16, N - 2, torch.float32)
        results = []
        for function in (loss, compiled):
            leaf = qkv.clone().requires_grad_()
            out = function(leaf, cos, sin)
            results.append((out.detach(), *torch.autograd.grad(out, leaf)))
        torch.testing.assert_close(*results)


def test_a_training_step_through_pytorch_compiles_whole():
    """More tokens than our own backward takes: the rotation is an op of its own, differentiable by itself."""
    torch.use_deterministic_algorithms(False)
    qkv, cos, sin = inputs(1, 601, 1, 64, 596, torch.float32)
    leaf = qkv.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, cos, sin).backward()
    other = qkv.clone().requires_grad_()
    rope_attention_reference(*other.unbind(2), cos, sin).square().sum().backward()
    assert relative_error(leaf.grad, other.grad) < 2e-6


def test_packed_compiles_whole():
    cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32, device=DEVICE)
    qkv, cos, sin = (x.squeeze(0) for x in inputs(1, 9, 2, 16, 9, torch.float32))
    arguments = (*qkv.unbind(1), cos, sin, cu_seqlens, 5)
    compiled = torch.compile(rope_attention_packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), rope_attention_packed(*arguments))


def test_differentiable_once_and_in_q_k_v_only():
    qkv, cos, sin = inputs(1, 6, 1, 16, 6, torch.float32)
    leaf = qkv.clone().requires_grad_()
    (grad,) = torch.autograd.grad(rope_attention(*leaf.unbind(2), cos, sin).sum(), leaf, create_graph=True)
    with pytest.raises(
        RuntimeError, match="rope_attention_backward has no gradient: the kernels are differentiable once"
    ):
        grad.square().sum().backward()
    with pytest.raises(ValueError, match="cos or sin requires a gradient: expected tables without"):
        rope_attention(*qkv.unbind(2), cos.clone().requires_grad_(), sin)


# the model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 24, 16, device=DEVICE)


def weighted_sum(out: Tensor) -> Tensor:
    """A loss of well-conditioned gradients. That of out ** 2 is not: the final LayerNorm keeps it nearly constant."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)).sum()


def model_with_gradients(model: DINOv3ViT, attention: str, images: Tensor) -> list[Tensor]:
    model.attention = attention
    model.zero_grad()
    out = model(images).last_hidden_state
    weighted_sum(out).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
def test_model_is_as_exact_as_eager(config, tmp_path):
    """Outputs and gradients with all kernels, those of rows too, beside PyTorch's float32: mean error against float64."""
    folder = write_checkpoint(tmp_path, config)
    model = DINOv3ViT.from_pretrained(folder, device=DEVICE)
    exact = DINOv3ViT.from_pretrained(folder, dtype=torch.float64, device=DEVICE)
    errors = {"eager": 0.0, "triton": 0.0}
    for _ in range(4):
        images = torch.randn(2, 3, 24, 16, device=DEVICE)
        truth = model_with_gradients(exact, "eager", images)
        for name in errors:
            actual = model_with_gradients(model, name, images)
            assert len(actual) == len(truth) > 10
            errors[name] += sum(relative_error(a, t) for a, t in zip(actual, truth, strict=True)) / len(truth) / 4
    assert errors["triton"] < 1.5 * errors["eager"] < 1e-5

    plain = model_with_gradients(model, "triton", images)
    model.gradient_checkpointing = True
    for recomputed, p in zip(model_with_gradients(model, "triton", images), plain, strict=True):
        assert torch.equal(recomputed, p)


@pytest.mark.parametrize(
    ("config", "row_kernels"), [(TINY, {"add_layer_norm"}), (SWIGLU, {"add_layer_norm", "swiglu"})]
)
def test_model_runs_the_row_kernels_beside_attention(config, row_kernels, images):
    model = DINOv3ViT(config, attention="triton").to(DEVICE).eval()
    for name, expected in (("triton", {"rope_attention"} | row_kernels), ("sdpa", set())):
        model.attention = name
        with Launches() as launches, torch.no_grad():
            model(images)
        assert launches.ops == expected


class Launches(TorchDispatchMode):
    """Which of our ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dinov3_lite":
            self.ops.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_model_under_autocast(images):
    model = DINOv3ViT(TINY).to(DEVICE).eval()
    with torch.autocast(DEVICE, torch.float16):
        eager, ours = (model_with_gradients(model, name, images) for name in ("eager", "triton"))
    for a, e in zip(ours, eager, strict=True):
        assert relative_error(a, e) < 5e-3


def test_training_step_of_the_model_compiles_whole(images, tmp_path):
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY), attention="triton", device=DEVICE)
    expected = model_with_gradients(model, "triton", images)
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(images).last_hidden_state
    weighted_sum(out).backward()
    for a, e in zip([out, *(p.grad for p in model.parameters() if p.grad is not None)], expected, strict=True):
        assert relative_error(a, e) < 1e-5  # the rows of a compiled model are PyTorch's


def test_export_with_dynamic_resolution(images):
    from torch.export import Dim, export

    model = DINOv3ViT(replace(TINY, num_hidden_layers=1), attention="triton").to(DEVICE).eval()
    shapes = ({0: Dim("batch", max=64), 2: 8 * Dim("h", max=64), 3: 8 * Dim("w", max=64)},)
    with torch.no_grad():
        program = export(model, (images,), dynamic_shapes=shapes, strict=False)
        other = torch.randn(3, 3, 16, 40, device=DEVICE)
        torch.testing.assert_close(program.module()(other).last_hidden_state, model(other).last_hidden_state)


# bad input


def changed(**changes):
    """Arguments of rope_attention, some of them changed by a function of the right one."""
    qkv, cos, sin = inputs(2, 6, 2, 32, 4, torch.float32)
    right = dict(zip("qkv", qkv.unbind(2), strict=True)) | {"cos": cos, "sin": sin, "scale": None}
    return {name: changes[name](x) if name in changes else x for name, x in right.items()}


BAD_INPUTS = [
    ({"q": lambda q: q[0]}, "q has 3 dimensions: expected (B, N, heads, D)"),
    ({"k": lambda k: k[:, 1:]}, "k has shape (2, 5, 2, 32): expected q's, (2, 6, 2, 32)"),
    ({"v": lambda v: v[..., :16]}, "v has shape (2, 6, 2, 16): expected q's, (2, 6, 2, 32)"),
    ({"v": lambda v: v.half()}, "v is torch.float16: expected q's dtype, torch.float32"),
    ({"q": lambda q: q.long()}, "q is torch.int64: expected torch.float16, torch.bfloat16 or torch.float32"),
    ({"q": lambda q: q.double()}, "q is torch.float64: expected torch.float16, torch.bfloat16 or torch.float32"),
    ({"k": lambda k: k.mT.contiguous().mT}, "k has stride 2 in its last dimension: expected 1"),
    ({x: lambda x: x[..., :24] for x in "qkv"}, "q has head dim 24: expected a multiple of 16 from 16 to 256"),
    (
        {x: lambda x: x.repeat(1, 1, 1, 9) for x in "qkv"},
        "q has head dim 288: expected a multiple of 16 from 16 to 256",
    ),
    (
        {x: lambda x: x.repeat(2, 1) for x in ("cos", "sin")},
        "cos has shape (8, 16): expected (P, 16) with P at most 6 tokens",
    ),
    ({"cos": lambda cos: cos[:, :8]}, "cos has shape (4, 8): expected (P, 16) with P at most 6 tokens"),
    ({"sin": lambda sin: sin[1:]}, "sin has shape (3, 16): expected cos's, (4, 16)"),
    ({"sin": lambda sin: sin.double()}, "sin is torch.float64: expected torch.float32"),
    ({"cos": lambda cos: cos.mT.contiguous().mT}, "cos has strides (1, 4): expected a contiguous table"),
    ({"scale": lambda scale: -1.0}, "scale is -1.0: expected a positive number"),
    ({"scale": lambda scale: float("nan")}, "scale is nan: expected a positive number"),
]


@pytest.mark.parametrize("changes, message", BAD_INPUTS, ids=[message for _, message in BAD_INPUTS])
def test_bad_input_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rope_attention(**changed(**changes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens is torch.int64 of shape (2,): expected torch.int32 of shape (S + 1,)"),
        ({"q": torch.zeros(6, 32)}, "q has 2 dimensions: expected (T, heads, D)"),
        ({"cos": torch.ones(5, 16), "sin": torch.ones(5, 16)}, "cos has 5 rows: expected one for each of the 6 tokens"),
        ({"max_seqlen": -1}, "max_seqlen is -1: expected the length of the longest sequence"),
    ],
)  # fmt: skip
def test_bad_pack_is_one_sentence(change, message):
    q = torch.zeros(6, 2, 32)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
    right = {"q": q, "k": q, "v": q, "cos": torch.ones(6, 16), "sin": torch.zeros(6, 16), "cu_seqlens": cu_seqlens}
    arguments = {**right, "max_seqlen": 6, **change}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rope_attention_packed(**{k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in arguments.items()})


def test_an_image_of_2_to_the_31_elements_is_refused():
    q = torch.empty_strided((1, 2**15 + 1, 1, 64), (2**32, 2**16, 64, 1), device="meta")
    table = torch.empty(5, 32, device="meta")
    with pytest.raises(
        ValueError, match=r"q spans 2\^31 elements or more in a sequence of 32769 tokens: expected fewer"
    ):
        ops._check(q, q, table, table, q.shape[1])


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's own limit")
def test_the_interpreter_refuses_what_it_multiplies_wrongly():
    qkv, cos, sin = inputs(1, 6, 1, 16, 6, torch.bfloat16)
    with pytest.raises(ValueError, match=r"q is torch.bfloat16: expected .* under triton's interpreter"):
        rope_attention(*qkv.unbind(2), cos, sin)


CALL = """
import os, sys, torch
os.environ.pop("TRITON_INTERPRET", None)
{before}
from dinov3_lite.kernels import is_available, rope_attention, unavailable_reason
assert "triton" not in sys.modules or sys.modules["triton"] is None
x, table = torch.zeros(1, 6, 1, 16), torch.zeros(6, 8)
print(is_available(), unavailable_reason())
try:
    rope_attention(x, x, x, table, table)
except RuntimeError as error:
    print(error)
print("triton" in sys.modules and sys.modules["triton"] is not None)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine that has no GPU")
@pytest.mark.parametrize(
    "before, reason",
    [
        ("", "there is no CUDA device, and TRITON_INTERPRET=1 is not set"),
        ("sys.modules['triton'] = None", "triton is not installed"),
    ],
)
def test_where_the_kernels_cannot_run_they_say_why(before, reason):
    done = run_python(CALL.format(before=before))
    assert done.stdout.splitlines() == [f"False {reason}", f"rope_attention can't run: {reason}", "False"], done.stderr


def test_tensors_of_the_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(ops, "interpreted", lambda: False)
    qkv, cos, sin = (x.cpu() for x in inputs(1, 6, 1, 16, 6, torch.float32))
    with pytest.raises(RuntimeError, match="q is on cpu: expected a CUDA device, or the CPU under TRITON_INTERPRET=1"):
        rope_attention(*qkv.unbind(2), cos, sin)
