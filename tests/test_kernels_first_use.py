"""A kernel that is wrong where it runs is found at its first use, and plain torch takes over with one warning.

Wrong kernels are made here by hand: one that spoils an element after the right one ran, one that can't be compiled.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from importlib import import_module

import pytest
import torch
from dinov3_lite.kernels import (
    add_layer_norm,
    add_layer_norm_reference,
    first_use,
    layer_norm,
    plain,
    rope_attention,
    rope_attention_launch,
    rope_attention_packed,
    rope_attention_packed_reference,
    rope_attention_reference,
    rotate,
    swiglu,
    swiglu_reference,
    tuning,
)
from dinov3_lite.kernels.first_use import Checked
from helpers import relative_error
from kernel_inputs import (
    DEVICE,
    EPS,
    attention_inputs,
    attention_with_gradients,
    float64,
    row_inputs,
    rows_with_gradients,
)

pytest.importorskip("triton")

SWIGLU = import_module("dinov3_lite.kernels.swiglu")  # the package's name is the function's
CHECKED = {
    "rotate": (rotate._checked, "rotate_triton", "rotate_kernel"),
    "rope_attention": (rope_attention_launch.forward, "rope_attention_triton", "rope_attention_forward_kernel"),
    "rope_attention_backward": (
        *(rope_attention_launch.backward, "rope_attention_backward_triton"),
        "rope_attention_backward_kv_kernel",
    ),
    "add_layer_norm": (layer_norm._forward, "layer_norm_triton", "add_layer_norm_forward_kernel"),
    "add_layer_norm_backward": (layer_norm._backward, "layer_norm_triton", "add_layer_norm_backward_kernel"),
    "swiglu": (SWIGLU._forward, "swiglu_triton", "swiglu_forward_kernel"),
    "swiglu_backward": (SWIGLU._backward, "swiglu_triton", "swiglu_backward_kernel"),
}
OUTPUTS = {
    "rotate": "out_ptr",
    "rope_attention": "out_ptr",
    "rope_attention_backward": "dv_ptr",
    "add_layer_norm": "normed_ptr",
    "add_layer_norm_backward": "grad_branch_ptr",
    "swiglu": "out_ptr",
    "swiglu_backward": "grad_gate_value_ptr",
}


@pytest.fixture(autouse=True)
def unused(monkeypatch) -> None:
    """As in a new process: no kernel was used."""
    for checked, _, _ in CHECKED.values():
        monkeypatch.setattr(checked, "verdicts", {})
    monkeypatch.setattr(first_use, "FAILED", set())


class Spoilt:
    """A kernel that writes one element wrongly, or does not compile; it counts its launches."""

    def __init__(self, kernel, output: str, error: Exception | None = None) -> None:
        self.kernel, self.output, self.error, self.launches = kernel, output, error, 0

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launches += 1
            if self.error is not None:
                raise self.error
            self.kernel[grid](**arguments)
            out = arguments[self.output].view(-1)
            out[out.numel() // 2] += 1

        return launch


@pytest.fixture
def spoil(monkeypatch):
    def replace(operation: str, error: Exception | None = None) -> Spoilt:
        _, file, name = CHECKED[operation]
        module = import_module(f"dinov3_lite.kernels.{file}")
        spoilt = Spoilt(getattr(module, name), OUTPUTS[operation], error)
        monkeypatch.setattr(module, name, spoilt)
        return spoilt

    return replace


def results(operation: str, dtype: torch.dtype, packed: bool = False) -> tuple[list, list]:
    """What the public function makes of some input, with gradients, and the truth."""
    if operation.startswith("swiglu"):
        gate_value = torch.randn(5, 24).to(DEVICE, dtype).requires_grad_()
        grads = [torch.randn(5, 12, device=DEVICE)]
        ours = rows_with_gradients(swiglu, [gate_value], grads=grads)
        return ours, rows_with_gradients(swiglu_reference, float64([gate_value]), grads=grads)
    if operation.startswith("add_layer_norm"):
        inputs = row_inputs((9, 40), torch.float32, dtype)
        grads = [torch.randn(9, 40, device=DEVICE) for _ in range(2)]
        ours = rows_with_gradients(add_layer_norm, inputs, EPS, grads=grads)
        return ours, rows_with_gradients(add_layer_norm_reference, float64(inputs), EPS, grads=grads)
    if packed:
        qkv, cos, sin = (x.squeeze(0) for x in attention_inputs(1, 75, 2, 32, 75, dtype))
        options = {"cu_seqlens": torch.tensor([0, 4, 75], dtype=torch.int32, device=DEVICE), "max_seqlen": 71}
        ours = attention_with_gradients(rope_attention_packed, qkv, cos, sin, **options)
        reference = rope_attention_packed_reference
    else:
        qkv, cos, sin = attention_inputs(2, 21, 2, 32, 16, dtype)
        options, reference = {}, rope_attention_reference
        ours = attention_with_gradients(rope_attention, qkv, cos, sin)
    return ours, attention_with_gradients(reference, qkv.double(), cos.double(), sin.double(), **options)


def assert_right(ours, truth, dtype) -> None:
    for a, t in zip(ours, truth, strict=True):
        assert relative_error(a, t) < (2e-6 if dtype == torch.float32 else 2e-3)


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("operation", ["add_layer_norm", "add_layer_norm_backward"])
@pytest.mark.parametrize("weights", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("branch", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, *HALVES], ids=str)
def test_right_kernels_are_right_in_every_mixture_of_dtypes(operation, stream, branch, weights):
    """The narrowest decides what roundings explain: under autocast the branch is narrower than the weights."""
    kind = (torch.device(DEVICE), weights, 32, stream, branch, weights)
    assert CHECKED[operation][0].problem(kind) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("operation", CHECKED)
def test_a_wrong_kernel_is_replaced_with_one_warning(spoil, operation, dtype):
    spoilt = spoil(operation)
    message = (
        rf"^{operation} is wrong on .* in {dtype} at width \d+: an element is off by .* expected at most .*take over"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert_right(*results(operation, dtype), dtype)
    assert len(caught) == spoilt.launches == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(*results(operation, dtype), dtype)
    assert spoilt.launches == 1


@pytest.mark.parametrize("operation", ["rope_attention", "rope_attention_backward"])
@pytest.mark.parametrize("limit", [0, 100])
def test_a_wrong_kernel_is_replaced_for_packs_and_both_strategies(spoil, monkeypatch, operation, limit):
    monkeypatch.setattr(tuning, "fused_up_to", lambda device: limit)
    spoilt = spoil(operation)
    with pytest.warns(RuntimeWarning, match=f"^{operation} is wrong") as caught:
        for packed in (False, True):
            assert_right(*results(operation, torch.float32, packed), torch.float32)
    assert (len(caught), spoilt.launches) == (1, 2)


@pytest.mark.parametrize("operation", CHECKED)
def test_a_right_kernel_is_checked_once_and_says_so_at_level_info(operation, caplog):
    caplog.set_level(logging.INFO, logger="dinov3_lite.kernels")
    checked, *_ = CHECKED[operation]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(*results(operation, torch.float16), torch.float16)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"{operation} in")]
    assert len(said) == len(checked.verdicts) == 1
    where = first_use._name(torch.device(DEVICE))
    assert "torch.float16 at width" in said[0] and f"was never timed on {where};" in said[0]
    caplog.clear()
    assert_right(*results(operation, torch.float16), torch.float16)
    assert not caplog.records


def test_a_kernel_that_does_not_compile_is_replaced(spoil):
    spoil("swiglu", RuntimeError("out of resource: shared memory"))
    with pytest.warns(RuntimeWarning, match="wrong on .*: RuntimeError: out of resource: shared memory"):
        assert_right(*results("swiglu", torch.float32), torch.float32)


def test_a_check_without_memory_says_nothing_of_the_kernel(spoil):
    spoilt = spoil("swiglu", torch.OutOfMemoryError("no memory"))
    for attempt in (1, 2):
        with pytest.raises(torch.OutOfMemoryError):
            swiglu(torch.randn(2, 8, device=DEVICE))
        assert spoilt.launches == attempt


def test_threads_wait_for_one_check(spoil):
    spoilt = spoil("swiglu")
    gate_value = torch.randn(3, 16, device=DEVICE)
    outputs: list = [None] * 8

    def run(i: int) -> None:
        outputs[i] = swiglu(gate_value)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    with pytest.warns(RuntimeWarning) as caught:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caught) == spoilt.launches == 1
    assert all(relative_error(out, swiglu_reference(gate_value.double())) < 1e-6 for out in outputs)


def test_a_wrong_kernel_in_a_compiled_program(spoil):
    """Tracing checks nothing; the program's first run does, and its backward's."""
    spoil("rope_attention"), spoil("rope_attention_backward")
    compiled = torch.compile(rope_attention, fullgraph=True, backend="aot_eager")
    qkv, cos, sin = attention_inputs(2, 21, 2, 32, 16, torch.float32)
    with pytest.warns(RuntimeWarning) as caught:
        ours = attention_with_gradients(compiled, qkv, cos, sin)
    assert [str(w.message).split()[0] for w in caught] == ["rope_attention", "rope_attention_backward"]
    truth = attention_with_gradients(rope_attention_reference, qkv.double(), cos.double(), sin.double())
    assert_right(ours, truth, torch.float32)


def test_the_check_leaves_no_trace():
    """Neither in the random numbers nor by what is in force around it: autocast, inference mode, a default device."""
    state = torch.get_rng_state()
    gate_value = torch.linspace(-3, 3, 16, device=DEVICE).view(2, 8)
    with (
        torch.inference_mode(),
        torch.autocast(DEVICE, torch.bfloat16),
        torch.device("meta"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        out = swiglu(gate_value)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative_error(out, swiglu_reference(gate_value.double())) < 1e-6
    x, gamma = torch.randn(3, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        _, normed = add_layer_norm(x, x, gamma, gamma, gamma, EPS)
    assert relative_error(normed, add_layer_norm_reference(x.double(), x, gamma, gamma, gamma, EPS)[1]) < 1e-6
    assert len(first_use.FAILED) == 0


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch):
    """The check would wait for the GPU, and be replayed with the graph: the first use after it does it."""
    calls = []
    checked = Checked("op", lambda x: calls.append("launch") or x + 1, lambda x: x, lambda *kind: (torch.ones(3),))
    kind = (torch.device("cuda"), torch.float32, 3)
    monkeypatch.setattr(first_use, "_name", str)
    monkeypatch.setattr(tuning, "is_measured", lambda operation, device, dtype, width: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(checked(kind, torch.zeros(3)), torch.ones(3)) and calls == ["launch"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(
        RuntimeWarning, match=r"^op is wrong on cuda in torch.float32 at width 3: an element is off by 1.0e\+00"
    ):
        assert torch.equal(checked(kind, torch.zeros(3)), torch.zeros(3))
    assert calls == ["launch", "launch"]


def test_what_a_kernel_is_compiled_for_is_checked_by_itself(monkeypatch):
    """LayerScale in a dtype of its own, products in tf32: builds of their own, of which each may be wrong."""
    for dtype in (torch.float16, torch.float32):
        x, branch, gamma, weight, bias = row_inputs((3, 16), torch.float32, torch.float16)
        gamma = gamma.detach().to(dtype).requires_grad_()
        sum(out.sum() for out in add_layer_norm(x, branch, gamma, weight, bias, EPS)).backward()
    assert len(layer_norm._forward.verdicts) == len(layer_norm._backward.verdicts) == 2
    qkv, cos, sin = attention_inputs(1, 21, 1, 16, 16, torch.float32)
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(tuning, "precision", lambda dtype, precision=precision: precision)
        attention_with_gradients(rope_attention, qkv, cos, sin)
    assert len(rope_attention_launch.forward.verdicts) == len(rope_attention_launch.backward.verdicts) == 2


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float32, "ieee", 2**-17),
        (torch.float32, "tf32", 2**-7),
        (torch.float16, "ieee", 2**-7),
        (torch.bfloat16, "ieee", 2**-4),
    ],
    ids=str,
)
def test_what_roundings_explain_is_right_and_what_is_further_off_is_not(dtype, precision, bound, monkeypatch):
    """Relative to the largest element; what is not finite is wrong, too."""
    monkeypatch.setattr(tuning, "precision", lambda dtype: precision)
    for error, right in ((0.9 * bound, True), (1.1 * bound, False), (math.nan, False), (math.inf, False)):
        off = torch.tensor([0.0, 4 * error])
        checked = Checked("op", lambda x, off=off: x + off, lambda x: x, lambda *kind: (torch.tensor([-4.0, 0.0]),))
        assert (checked.problem((torch.device("cpu"), dtype, 2)) is None) == right, error


def test_what_was_measured_here_is_not_checked(monkeypatch):
    monkeypatch.setattr(tuning, "is_measured", lambda operation, device, dtype, width: True)
    checked = Checked("op", lambda x: x + 1, lambda x: x, None)
    assert torch.equal(checked((torch.device("cpu"), torch.float32, 3), torch.zeros(3)), torch.ones(3))


def test_auto_takes_sdpa_once_a_kernel_was_found_wrong(spoil, monkeypatch):
    from dinov3_lite import attention

    monkeypatch.setattr(attention, "_on_gpu", lambda x: True)
    spoilt = spoil("rope_attention")
    qkv, cos, sin = attention_inputs(2, 21, 2, 32, 21, torch.float16)
    truth = rope_attention_reference(*qkv.double().unbind(2), cos.double(), sin.double())
    taken = []
    monkeypatch.setattr(
        attention, "sdpa_attention", lambda *args, f=attention.sdpa_attention: (taken.append("sdpa"), f(*args))[1]
    )
    with pytest.warns(RuntimeWarning):
        first = attention.auto_attention(*qkv.unbind(2), cos, sin)
    assert not taken
    second = attention.auto_attention(*qkv.unbind(2), cos, sin)
    assert taken == ["sdpa"] and spoilt.launches == 1
    assert max(relative_error(first, truth), relative_error(second, truth)) < 1e-3
    # another head dim is another kernel
    other, cos, sin = attention_inputs(1, 6, 2, 16, 6, torch.float16)
    with pytest.warns(RuntimeWarning):
        attention.auto_attention(*other.unbind(2), cos, sin)
    assert taken == ["sdpa"]


@pytest.mark.parametrize("operation", ["rotate", "rope_attention", "rope_attention_backward"])
def test_auto_leaves_kernels_of_which_one_is_wrong(operation, monkeypatch):
    """In that dtype and of that head dim: a model trains with the backward, and long images begin with the rotation."""
    from dinov3_lite import attention

    monkeypatch.setattr(attention, "_on_gpu", lambda x: True)
    q = torch.empty(1, 2, 1, 32, dtype=torch.float16, device=DEVICE)
    assert attention.suits_triton(q)
    first_use.FAILED.add((operation, q.device, q.dtype, 32))
    assert not attention.suits_triton(q)
    assert attention.suits_triton(q.bfloat16()) and attention.suits_triton(q[..., :16])


@pytest.mark.parametrize("packed", [False, True], ids=["images", "pack"])
def test_the_plain_form_of_attention_is_the_same_a_few_rows_at_a_time(packed, monkeypatch):
    """As it takes more scores than memory should hold: no test has so many."""
    kind = (torch.device("cpu"), torch.float32, 32, "ieee")
    arguments = rope_attention_launch._forward_sample(*kind, False, True, packed)
    backward = rope_attention_launch._backward_sample(*kind, packed)
    whole = (*plain.attention(*arguments), *plain.attention_gradients(*backward))
    monkeypatch.setattr(plain, "SCORES", 5000)  # of 532 a row
    for piecewise, expected in zip(
        (*plain.attention(*arguments), *plain.attention_gradients(*backward)), whole, strict=True
    ):
        assert relative_error(piecewise, expected) < 1e-6
