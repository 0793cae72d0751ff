"""The row kernels against float64, in triton's interpreter where there is no GPU.

Uninitialised memory is NaN in every test, so that an output that no program writes can't pass by luck.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from dinov3_lite.kernels import add_layer_norm, add_layer_norm_reference, rows, swiglu, swiglu_reference
from helpers import relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# residual stream, everything else; the interpreter truncates where bfloat16 rounds, so that is tested on GPUs only
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16)]
if DEVICE == "cuda":
    DTYPES += [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Deterministic algorithms, which also fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def row_inputs(shape: tuple[int, ...], stream: torch.dtype, half: torch.dtype) -> list[Tensor]:
    """x, branch, gamma, weight, bias like a trained model's: rows with a mean, an outlier, gains over a decade."""
    C = shape[-1]
    x = 3 * torch.randn(shape) + torch.randn(*shape[:-1], 1)
    x[..., C // 3] += 300
    vectors = 10 ** (-2 * torch.rand(C)), torch.exp(0.7 * torch.randn(C)), 0.2 * torch.randn(C)
    tensors = [x.to(stream), *(t.to(half) for t in (torch.randn(shape), *vectors))]
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def eager_add_layer_norm(x, branch, gamma, weight, bias, eps):
    """What the model does without the kernel, in the same dtypes."""
    x_new = torch.addcmul(x, branch, gamma).to(x.dtype)
    normed = F.layer_norm(x_new, gamma.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return x_new, normed.to(weight.dtype)


def eager_swiglu(gate_value):
    gate, value = gate_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def with_gradients(function, inputs: list[Tensor], *constants: float, grads: list[Tensor]) -> list[Tensor]:
    """The outputs of a function, then its gradients by every input."""
    outputs = function(*inputs, *constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [
        *outputs,
        *torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]),
    ]


def float64(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def assert_no_worse_than(eager: list[Tensor], ours: list[Tensor], truth: list[Tensor], names: str) -> None:
    """Each of ours has its eager counterpart's dtype, and its error against float64 or that of a few float32 roundings."""
    for name, a, e, t in zip(names.split(), ours, eager, truth, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name
        bound = max(1.1 * relative_error(e, t), 4 * torch.finfo(torch.float32).eps)
        assert relative_error(a, t) <= bound, (name, relative_error(a, t), bound)


ADD_LAYER_NORM = "x_new normed grad_x grad_branch grad_gamma grad_weight grad_bias"


@pytest.mark.parametrize("stream, half", DTYPES, ids=str)
@pytest.mark.parametrize("C", [128, 136, 384, 768, 1024, 1280, 4096])
@pytest.mark.parametrize("shape", [(1,), (3, 5)], ids=str)
def test_add_layer_norm_and_its_gradients(shape, C, stream, half):
    inputs = row_inputs((*shape, C), stream, half)
    grads = [torch.randn(*shape, C, device=DEVICE).to(dtype) for dtype in (stream, half)]
    ours = with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    eager = with_gradients(eager_add_layer_norm, inputs, EPS, grads=grads)
    truth = with_gradients(add_layer_norm_reference, float64(inputs), EPS, grads=grads)
    assert_no_worse_than(eager, ours, truth, ADD_LAYER_NORM)


def test_eps_counts_where_rows_are_small():
    x, branch, *vectors = row_inputs((3, 136), torch.float32, torch.float32)
    inputs = [(1e-4 * x).detach(), (1e-4 * branch).detach(), *vectors]
    grads = [torch.randn(3, 136, device=DEVICE) for _ in range(2)]
    inputs[:2] = (t.requires_grad_() for t in inputs[:2])
    ours = with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    truth = with_gradients(add_layer_norm_reference, float64(inputs), EPS, grads=grads)
    for a, t in zip(ours, truth, strict=True):
        assert relative_error(a, t) < 1e-6


@pytest.mark.parametrize("dtype", dict(DTYPES), ids=str)
@pytest.mark.parametrize("F", [8, 100, 1024, 1536])
@pytest.mark.parametrize("shape", [(1,), (3, 5)], ids=str)
def test_swiglu_and_its_gradient(shape, F, dtype):
    gate_value = (4 * torch.randn(*shape, 2 * F, device=DEVICE)).to(dtype).requires_grad_()
    grads = [torch.randn(*shape, F, device=DEVICE).to(dtype)]
    ours = with_gradients(swiglu, [gate_value], grads=grads)
    eager = with_gradients(eager_swiglu, [gate_value], grads=grads)
    truth = with_gradients(swiglu_reference, float64([gate_value]), grads=grads)
    assert_no_worse_than(eager, ours, truth, "out grad_gate_value")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_swiglu_saturates_without_overflow():
    gate_value = torch.tensor([[-200.0, -90.0, 0.0, 200.0, 3.0, 3.0, 3.0, 3.0]], device=DEVICE, requires_grad=True)
    out = swiglu(gate_value)
    (grad,) = torch.autograd.grad(out.sum(), gate_value)
    assert torch.equal(out, torch.tensor([[0.0, 0.0, 0.0, 600.0]], device=DEVICE))
    assert torch.equal(grad, torch.tensor([[0.0, 0.0, 1.5, 3.0, 0.0, 0.0, 0.0, 200.0]], device=DEVICE))


def test_the_references_are_right():
    """They are the truth above, so they are compared with PyTorch's own functions in float64."""
    inputs, gate_value = float64(row_inputs((7, 136), torch.float32, torch.float32)), torch.randn(7, 20).double()
    for ours, eager in zip(add_layer_norm_reference(*inputs, EPS), eager_add_layer_norm(*inputs, EPS), strict=True):
        assert relative_error(ours, eager) < 1e-14
    assert relative_error(swiglu_reference(gate_value), eager_swiglu(gate_value)) < 1e-15
    assert torch.autograd.gradcheck(add_layer_norm_reference, (*float64(row_inputs((2, 6), *DTYPES[0])), EPS))


def test_no_rows():
    inputs = row_inputs((0, 4, 136), torch.float32, torch.float16)
    x_new, normed = add_layer_norm(*inputs, EPS)
    grads = torch.autograd.grad(x_new.sum() + normed.sum(), inputs)
    assert x_new.shape == normed.shape == grads[0].shape == grads[1].shape == (0, 4, 136)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[2:])
    assert swiglu(torch.empty(0, 6, device=DEVICE)).shape == (0, 3)


def test_twice_the_same_bits():
    inputs = row_inputs((37, 136), torch.float32, torch.float16)
    grads = [torch.randn(37, 136, device=DEVICE), torch.randn(37, 136, device=DEVICE)]
    first = with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    again = with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    assert all(map(torch.equal, first, again))


def test_gradients_of_one_output_and_of_strided_ones():
    """An unused output has no gradient, and a sum's is expanded from one number: neither has rows in memory."""
    inputs = row_inputs((7, 136), torch.float32, torch.float32)
    for i in range(2):
        ours = torch.autograd.grad(add_layer_norm(*inputs, EPS)[i].sum(), inputs[:3])
        truth_inputs = float64(inputs)
        truth = torch.autograd.grad(add_layer_norm_reference(*truth_inputs, EPS)[i].sum(), truth_inputs[:3])
        for a, t in zip(ours, truth, strict=True):
            assert (a - t).abs().max() < 1e-5
    gate_value = torch.randn(7, 12, device=DEVICE, requires_grad=True)
    (ours,) = torch.autograd.grad(swiglu(gate_value).sum(), gate_value)
    (truth,) = torch.autograd.grad(swiglu_reference(gate_value.double()).sum(), gate_value)
    assert relative_error(ours, truth) < 1e-6


def test_only_what_needs_a_gradient_gets_one():
    x, branch, gamma, weight, bias = (t.detach() for t in row_inputs((3, 136), torch.float32, torch.float32))
    branch.requires_grad_()
    x_new, normed = add_layer_norm(x, branch, gamma, weight, bias, EPS)
    (x_new.sum() + normed.sum()).backward()
    assert torch.isfinite(branch.grad).all() and gamma.grad is None
    with torch.no_grad():
        assert not add_layer_norm(x, branch, gamma, weight, bias, EPS)[0].requires_grad


def test_a_second_derivative_is_refused():
    gate_value = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(gate_value).sum(), gate_value, create_graph=True)
    with pytest.raises(RuntimeError, match="swiglu_backward has no gradient: the kernels are differentiable once"):
        grad.sum().backward()


def test_opcheck():
    inputs = row_inputs((2, 3, 136), torch.float32, torch.float16)
    x, branch, gamma, weight, _ = (t.detach() for t in inputs)
    for op, arguments in [
        (torch.ops.dinov3_lite.add_layer_norm, (*inputs, EPS)),
        (torch.ops.dinov3_lite.add_layer_norm_backward, (x, branch, gamma, weight, x, branch, EPS)),
        (torch.ops.dinov3_lite.swiglu, (inputs[0],)),
        (torch.ops.dinov3_lite.swiglu_backward, (x, x[..., :68].contiguous())),
    ]:
        torch.library.opcheck(op.default, arguments)


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
        ours = with_gradients(compiled, inputs, grads=grads)
        assert all(map(torch.equal, ours, with_gradients(block_tail, inputs, grads=grads)))
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


def changed(**changes):
    """Arguments of add_layer_norm, all right but for the changes."""
    good = {"x": torch.zeros(2, 3, 16), "branch": torch.zeros(2, 3, 16), "eps": EPS}
    return good | {name: torch.zeros(16) for name in ("gamma", "weight", "bias")} | changes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (changed(branch=torch.zeros(2, 4, 16)), "branch has shape (2, 4, 16): expected (2, 3, 16), the shape of x"),
        (changed(branch=torch.zeros(16)), "branch has shape (16,): expected (2, 3, 16), the shape of x"),
        (changed(gamma=torch.zeros(1)), "gamma has shape (1,): expected (16,), x's channels"),
        (changed(weight=torch.zeros(1, 16)), "weight has shape (1, 16): expected (16,), x's channels"),
        (changed(bias=torch.zeros(8)), "bias has shape (8,): expected (16,), x's channels"),
        (changed(bias=torch.zeros(16).half()), "bias is torch.float16: expected torch.float32, the dtype of weight"),
        (changed(x=torch.zeros(2, 3, 16).double()), "x is torch.float64: expected torch.float32, float16 or bfloat16"),
        (changed(gamma=torch.zeros(16).int()), "gamma is torch.int32: expected torch.float32, float16 or bfloat16"),
        (
            changed(x=torch.zeros(3, 2, 16).transpose(0, 1)),
            "x has strides (16, 32, 1) for shape (2, 3, 16): expected it contiguous",
        ),
        (
            changed(branch=torch.zeros(2, 3, 32)[..., ::2]),
            "branch has strides (96, 32, 2) for shape (2, 3, 16): expected it contiguous",
        ),
        (changed(branch=torch.zeros(2, 3, 16, device="meta")), "branch is on meta: expected cpu, the device of x"),
        (changed(bias=torch.zeros(16, device="meta")), "bias is on meta: expected cpu, the device of x"),
        (changed(x=torch.tensor(1.0)), "x has shape (): expected at least one channel"),
        (changed(x=torch.zeros(1, 4104), branch=torch.zeros(1, 4104)), "x has 4104 channels: expected at most 4096"),
    ],
)
def test_bad_input_of_add_layer_norm(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        add_layer_norm(**arguments)


@pytest.mark.parametrize(
    "gate_value, message",
    [
        (torch.zeros(2, 7), "gate_value has 7 channels: expected an even number, gates and values"),
        (torch.zeros(2, 0), "gate_value has shape (2, 0): expected at least one channel"),
        (torch.zeros(2, 8).double(), "gate_value is torch.float64: expected torch.float32, float16 or bfloat16"),
        (torch.zeros(8, 2).t(), "gate_value has strides (1, 2) for shape (2, 8): expected it contiguous"),
    ],
)
def test_bad_input_of_swiglu(gate_value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        swiglu(gate_value)


def test_where_no_kernel_can_run(monkeypatch):
    monkeypatch.setattr(rows, "interpreted", lambda: False)
    message = "gate_value is on cpu: expected a CUDA device, or the CPU under TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        swiglu(torch.zeros(2, 8))
    monkeypatch.setattr(rows, "unavailable_reason", lambda: "triton is not installed")
    with pytest.raises(RuntimeError, match="^add_layer_norm can't run: triton is not installed$"):
        add_layer_norm(**changed())
