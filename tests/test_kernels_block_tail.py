"""The two row operations one behind the other, as a block ends: compiled, exported, under autocast."""

from __future__ import annotations

import pytest
import torch
from dinov3_lite.kernels import add_layer_norm, swiglu
from kernel_inputs import DEVICE, EPS, row_inputs, rows_with_gradients
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def block_tail(x, branch, gamma, weight, bias):
    x_new, normed = add_layer_norm(x, branch, gamma, weight, bias, EPS)
    return x_new, swiglu(normed)


slow_on_cpu = pytest.mark.skipif(DEVICE == "cpu", reason="half a minute of C++ compilation: runs where there is a GPU")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow_on_cpu)])
def test_compiled_without_graph_breaks_whatever_the_number_of_rows(backend):
    """One graph, forward and backward, serves every number of rows."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block_tail, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for n in (3, 5, 8):
        inputs = row_inputs((2, n, 136), torch.float32, torch.float16)
        grads = [torch.randn(2, n, 136, device=DEVICE), torch.randn(2, n, 68, device=DEVICE)]
        ours = rows_with_gradients(compiled, inputs, grads=grads)
        assert all(map(torch.equal, ours, rows_with_gradients(block_tail, inputs, grads=grads)))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


class BlockTail(torch.nn.Module):
    def forward(self, *inputs):
        return block_tail(*inputs)


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    inputs = tuple(t.detach() for t in row_inputs((2, 3, 136), torch.float32, torch.float16))
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = (({1: rows}, {1: rows}, None, None, None),)
    program = torch.export.export(BlockTail(), inputs, dynamic_shapes=shapes, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert {"dinov3_lite.add_layer_norm.default", "dinov3_lite.swiglu.default"} <= set(names)
    more = tuple(t.detach() for t in row_inputs((2, 9, 136), torch.float32, torch.float16))
    assert all(map(torch.equal, program.module()(*more), block_tail(*more)))


def test_autocast_changes_nothing():
    inputs = row_inputs((3, 136), torch.float32, torch.float16)
    plain = block_tail(*inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = block_tail(*inputs)
    assert [t.dtype for t in under] == [torch.float32, torch.float16]
    assert all(map(torch.equal, plain, under))
