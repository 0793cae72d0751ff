"""What only a GPU shows: CUDA graphs, streams, compiled programs. Everything else runs in the interpreter too."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from dinov3_lite.kernels import (
    add_layer_norm,
    first_use,
    rope_attention,
    rope_attention_launch,
    rope_attention_packed,
    rope_attention_reference,
    swiglu,
)
from helpers import relative_error
from kernel_inputs import EPS, attention_inputs, row_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def in_a_graph(function, *tensors: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """The function captured after a run outside of the graph, which compiles and checks its kernels; its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*tensors)
    return graph, out


@pytest.mark.parametrize("N", [133, 700], ids=["own attention", "PyTorch's attention"])
def test_attention_in_a_graph(N):
    qkv, cos, sin = attention_inputs(2, N, 2, 64, N - 5, torch.bfloat16)
    graph, out = in_a_graph(lambda x: rope_attention(*x.unbind(2), cos, sin), qkv)
    qkv.copy_(torch.randn_like(qkv))
    graph.replay()
    assert torch.equal(out, rope_attention(*qkv.unbind(2), cos, sin))


def test_a_pack_in_a_graph_takes_other_borders():
    """Nothing is read back from the GPU, so one graph serves every pack of its capacity."""
    qkv, cos, sin = (x.squeeze(0) for x in attention_inputs(1, 150, 2, 64, 150, torch.bfloat16))
    borders = torch.tensor([0, 70, 150], dtype=torch.int32, device="cuda")
    graph, out = in_a_graph(lambda x: rope_attention_packed(*x.unbind(1), cos, sin, borders, 130), qkv)
    borders.copy_(torch.tensor([0, 20, 150]))
    graph.replay()
    assert torch.equal(out, rope_attention_packed(*qkv.unbind(1), cos, sin, borders, 130))


def test_rows_in_a_graph():
    x, branch, *vectors = (t.detach() for t in row_inputs((5, 384), torch.float32, torch.bfloat16))

    def tail(x: torch.Tensor) -> torch.Tensor:
        return swiglu(add_layer_norm(x, branch, *vectors, EPS)[1])

    graph, out = in_a_graph(tail, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, tail(x))


def test_a_first_use_in_a_graph_waits_for_its_check(monkeypatch):
    qkv, cos, sin = attention_inputs(1, 37, 2, 64, 32, torch.bfloat16)
    run = lambda x: rope_attention(*x.unbind(2), cos, sin)  # noqa: E731
    run(qkv)  # compiled
    forward = rope_attention_launch.forward
    monkeypatch.setattr(forward, "verdicts", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(qkv)
    assert not forward.verdicts
    graph.replay()
    assert torch.equal(out, run(qkv)) and all(forward.verdicts.values()) and len(forward.verdicts) == 1


def test_on_another_stream():
    qkv, cos, sin = attention_inputs(2, 201, 6, 64, 196, torch.bfloat16)
    expected = rope_attention(*qkv.unbind(2), cos, sin)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = rope_attention(*qkv.unbind(2), cos, sin)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inductor_gives_what_eager_gives(dtype):
    qkv, cos, sin = attention_inputs(2, 201, 2, 64, 196, dtype)
    compiled = torch.compile(lambda x: 2 * rope_attention(*(x + 0).unbind(2), cos, sin), fullgraph=True)
    assert torch.equal(compiled(qkv), 2 * rope_attention(*qkv.unbind(2), cos, sin))


def test_no_kernel_was_found_wrong_here():
    """Of all that the other tests of this process launched: the checks at first use passed on this GPU."""
    for D in (64, 128):
        qkv, cos, sin = attention_inputs(1, 201, 2, D, 196, torch.bfloat16)
        leaf = qkv.requires_grad_()
        out = rope_attention(*leaf.unbind(2), cos, sin)
        out.sum().backward()
        truth = rope_attention_reference(*qkv.detach().double().unbind(2), cos.double(), sin.double())
        assert relative_error(out.detach(), truth) < 1e-2
    import_module("dinov3_lite.kernels.swiglu")
    assert not first_use.FAILED
