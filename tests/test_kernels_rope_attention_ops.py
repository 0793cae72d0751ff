"""RoPE attention as PyTorch sees it: which kernels a call launches, autograd, torch.compile, torch.library."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from dinov3_lite.kernels import (
    rope_attention,
    rope_attention_packed,
    rope_attention_packed_reference,
    rope_attention_reference,
    tuning,
)
from dinov3_lite.kernels.measured import Tiles
from dinov3_lite.kernels.reference import rotate_reference
from helpers import relative_error
from kernel_inputs import DEVICE, attention_inputs, attention_with_gradients, whole_table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = torch.ops.dinov3_lite
KERNELS = {
    "rotate": "rotate_triton",
    "rope_attention_forward": "rope_attention_triton",
    "rope_attention_backward_q": "rope_attention_backward_triton",
    "rope_attention_backward_kv": "rope_attention_backward_triton",
}


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels that are launched, and PyTorch's attention, in order."""
    launched = []

    class Spy:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name, file in KERNELS.items():
        module = import_module(f"dinov3_lite.kernels.{file}")
        monkeypatch.setattr(module, f"{name}_kernel", Spy(name, getattr(module, f"{name}_kernel")))
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (launched.append("sdpa"), sdpa(*args, **kwargs))[1],
    )
    return launched


OWN_BACKWARD = ["rotate", "rope_attention_backward_q", "rope_attention_backward_kv"]


@pytest.mark.parametrize(
    "limit, training, deterministic, expected",
    [
        (450, False, False, ["rope_attention_forward"]),
        (450, True, False, ["rope_attention_forward", *OWN_BACKWARD]),
        (5, False, False, ["rotate", "sdpa"]),
        (5, True, False, ["rotate", "sdpa", "rotate"]),
        (5, True, True, ["rotate", "rope_attention_forward", *OWN_BACKWARD]),
    ],
)
def test_strategies(monkeypatch, launches, limit, training, deterministic, expected):
    """The rotation inside, up to a number of tokens; beyond, a pass of its own and PyTorch's attention where it may."""
    torch.use_deterministic_algorithms(deterministic)
    monkeypatch.setattr(tuning, "fused_up_to", lambda device: limit)
    monkeypatch.setattr(tuning, "prefers_sdpa", lambda tokens, head_dim, device, training: tokens > limit)
    qkv, cos, sin = attention_inputs(2, 9, 2, 32, 4, torch.float32)
    truth = attention_with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    for _ in range(2):  # a kernel's first use is checked: launches of its own
        launches.clear()
        if training:
            ours = attention_with_gradients(rope_attention, qkv, cos, sin)
        else:
            ours = [rope_attention(*qkv.unbind(2), cos, sin)]
    assert launches == expected
    truth = truth[: len(ours)]
    for a, t in zip(ours, truth, strict=True):
        assert relative_error(a, t) < 1e-6


def test_each_kernel_is_launched_with_tiles_of_its_own(monkeypatch):
    tiles = {"forward": (16, 32), "backward_q": (32, 16), "backward_kv": (16, 16)}
    monkeypatch.setattr(tuning, "fused_up_to", lambda device: 450)
    monkeypatch.setattr(tuning, "tiles", lambda kernel, arch, D, itemsize: Tiles(*tiles[kernel], 4, 1))
    launched = {}

    class Spy:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(**arguments):
                launched[self.name.removeprefix("rope_attention_")] = arguments["BLOCK_M"], arguments["BLOCK_N"]
                self.kernel[grid](**arguments)

            return launch

    for name, file in list(KERNELS.items())[1:]:
        module = import_module(f"dinov3_lite.kernels.{file}")
        monkeypatch.setattr(module, f"{name}_kernel", Spy(name, getattr(module, f"{name}_kernel")))
    qkv, cos, sin = attention_inputs(1, 37, 1, 16, 36, torch.float32)
    ours = attention_with_gradients(rope_attention, qkv, cos, sin)
    assert launched == tiles
    truth = attention_with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    for a, t in zip(ours, truth, strict=True):
        assert relative_error(a, t) < 2e-6


def test_a_scale_reaches_pytorchs_attention(monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(tuning, "prefers_sdpa", lambda tokens, head_dim, device, training: True)
    qkv, cos, sin = attention_inputs(2, 9, 2, 32, 4, torch.float32)
    truth = attention_with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double(), 0.4)
    ours = attention_with_gradients(rope_attention, qkv, cos, sin, 0.4)
    for a, t in zip([rope_attention(*qkv.unbind(2), cos, sin, 0.4), *ours], [truth[0], *truth], strict=True):
        assert relative_error(a, t) < 1e-6


def test_gradient_of_a_strided_gradient_of_the_rotation():
    """A sum's gradient is expanded from one number, and one of both is a view of another."""
    qkv, cos, sin = attention_inputs(2, 9, 2, 32, 4, torch.float32)
    q, k = (x.clone().requires_grad_() for x in qkv.unbind(2)[:2])
    weights = torch.randn(2, 2, 32, 2, 9, device=DEVICE).permute(0, 1, 4, 3, 2)
    for loss in (lambda rotated: rotated.sum(), lambda rotated: (rotated * weights).sum()):
        ours = torch.autograd.grad(loss(OPS.rotate(q, k, cos, sin)), (q, k))
        wide = [x.detach().double().requires_grad_() for x in (q, k)]
        truth = loss(torch.stack([rotate_reference(x, cos.double(), sin.double()) for x in wide]))
        for a, t in zip(ours, torch.autograd.grad(truth, wide), strict=True):
            assert relative_error(a, t) < 1e-6


def test_pytorchs_attention_lies_in_memory_as_it_was_traced(monkeypatch):
    """A compiled program goes by the strides that the op promises, whichever of PyTorch's kernels it takes."""
    monkeypatch.setattr(tuning, "prefers_sdpa", lambda tokens, head_dim, device, training: True)
    qkv, cos, sin = attention_inputs(2, 9, 2, 32, 4, torch.float32)
    for backends in ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]):
        with sdpa_kernel(backends):
            torch.library.opcheck(OPS.rope_attention.default, (*qkv.unbind(2), cos, sin, None, None, 0.3, False))
            assert rope_attention(*qkv.unbind(2), cos, sin).is_contiguous()


def test_a_pack_is_as_long_as_its_longest_sequence(monkeypatch, launches):
    """Many short sequences are rotated inside, and never given to PyTorch's attention, however many tokens they are."""
    monkeypatch.setattr(tuning, "fused_up_to", lambda device: 8)
    monkeypatch.setattr(tuning, "prefers_sdpa", lambda tokens, head_dim, device, training: tokens > 8)
    qkv, cos, sin = (x.squeeze(0) for x in attention_inputs(1, 24, 2, 32, 24, torch.float32))
    for borders, longest, expected in [
        ((0, 8, 16, 24), 8, ["rope_attention_forward"]),
        ((0, 9, 24), 15, ["rotate", "rope_attention_forward"]),
    ]:
        pack = torch.tensor(borders, dtype=torch.int32, device=DEVICE), longest
        ours = rope_attention_packed(*qkv.unbind(1), cos, sin, *pack)
        launches.clear()
        assert torch.equal(rope_attention_packed(*qkv.unbind(1), cos, sin, *pack), ours) and launches == expected
        truth = rope_attention_packed_reference(*qkv.double().unbind(1), cos.double(), sin.double(), *pack)
        assert relative_error(ours, truth) < 1e-6


@pytest.mark.parametrize("N, D, expected", [(450, 64, False), (600, 64, False), (601, 64, True), (451, 128, True)])
@pytest.mark.usefixtures("unmeasured")
def test_where_pytorch_takes_over(N, D, expected):
    assert tuning.prefers_sdpa(N, D, torch.device("cpu"), training=False) == expected


def test_opcheck():
    qkv, cos, sin = attention_inputs(1, 6, 1, 16, 4, torch.float32)
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(2))
    cu_seqlens = torch.tensor([0, 5, 6], dtype=torch.int32, device=DEVICE)
    tables = whole_table(cos, sin, 6)
    torch.library.opcheck(OPS.rope_attention.default, (q, k, v, cos, sin, None, None, 0.125, True))
    torch.library.opcheck(OPS.rope_attention.default, (*qkv.unbind(2), cos, sin, None, None, 0.3, False))
    torch.library.opcheck(OPS.rope_attention.default, (q, k, v, *tables, cu_seqlens, 5, 0.125, True))
    torch.library.opcheck(OPS.rotate.default, (q, k, cos, sin, False))
    with torch.no_grad():
        out, maximum, total = OPS.rope_attention(q, k, v, cos, sin, None, None, 0.125, True)
    saved = (*qkv.unbind(2), cos, sin, None, None, 0.125, out, maximum, total)
    torch.library.opcheck(OPS.rope_attention_backward.default, (torch.randn_like(out), *saved))


def loss(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope_attention(*qkv.unbind(2), cos, sin).square().sum()


@pytest.mark.parametrize("backend, sizes", [("aot_eager", (6, 9)), ("inductor", (6,))])
def test_a_training_step_compiles_whole(backend, sizes):
    compiled = torch.compile(loss, fullgraph=True, dynamic=len(sizes) > 1, backend=backend)
    for N in sizes:
        qkv, cos, sin = attention_inputs(2, N, 2, 16, N - 2, torch.float32)
        results = []
        for function in (loss, compiled):
            leaf = qkv.clone().requires_grad_()
            out = function(leaf, cos, sin)
            results.append((out.detach(), *torch.autograd.grad(out, leaf)))
        torch.testing.assert_close(*results)


def test_a_training_step_through_pytorch_compiles_whole():
    """More tokens than our own backward takes: the rotation is an op of its own, differentiable by itself."""
    torch.use_deterministic_algorithms(False)
    qkv, cos, sin = attention_inputs(1, 601, 1, 64, 596, torch.float32)
    leaf = qkv.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, cos, sin).backward()
    other = qkv.clone().requires_grad_()
    rope_attention_reference(*other.unbind(2), cos, sin).square().sum().backward()
    assert relative_error(leaf.grad, other.grad) < 2e-6


def test_packed_compiles_whole():
    cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32, device=DEVICE)
    qkv, cos, sin = (x.squeeze(0) for x in attention_inputs(1, 9, 2, 16, 9, torch.float32))
    arguments = (*qkv.unbind(1), cos, sin, cu_seqlens, 5)
    compiled = torch.compile(rope_attention_packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), rope_attention_packed(*arguments))


def test_differentiable_once_and_in_q_k_v_only():
    qkv, cos, sin = attention_inputs(1, 6, 1, 16, 6, torch.float32)
    leaf = qkv.clone().requires_grad_()
    (grad,) = torch.autograd.grad(rope_attention(*leaf.unbind(2), cos, sin).sum(), leaf, create_graph=True)
    with pytest.raises(
        RuntimeError, match="rope_attention_backward has no gradient: the kernels are differentiable once"
    ):
        grad.square().sum().backward()
    with pytest.raises(ValueError, match="cos or sin requires a gradient: expected tables without"):
        rope_attention(*qkv.unbind(2), cos.clone().requires_grad_(), sin)
