"""Graphs of inductor's are made once a kind, tried before they are used, and never the end of a process."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from convnexts import made
from helpers import TINY, relative_error, write_checkpoint

from dinov3_lite import DINOv3ViT, graphs, optimize_for_inference

CONFIG = replace(TINY, num_hidden_layers=1)


@pytest.fixture
def model(tmp_path) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, CONFIG))


@pytest.fixture
def compiled(monkeypatch) -> list[object]:
    """What was compiled, by a stand-in for inductor that compiles nothing."""
    made = []

    def compile_(function, **options):
        made.append(function)
        return lambda *args: [state.clone() for state in function(*args)]

    monkeypatch.setattr(torch, "compile", compile_)
    return made


@torch.no_grad()
def test_threads_that_come_at_once_make_one_graph(model, compiled):
    fast = optimize_for_inference(model, backend="inductor")
    images = torch.randn(2, 3, 16, 24)
    expected = model(images).last_hidden_state
    barrier, errors = threading.Barrier(8), []

    def work():
        barrier.wait()
        for _ in range(3):
            errors.append(relative_error(fast(images).last_hidden_state, expected))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 24 and max(errors) < 2e-6 and len(compiled) == 1


@torch.no_grad()
def test_one_graph_a_kind_of_call(model, compiled):
    """One image or several, the blocks asked for, patches kept, attention: not the size, nor inference mode."""
    fast = optimize_for_inference(model, backend="inductor")
    assert fast.warm_up(4, 16, 24) > 0 and len(compiled) == 2
    for mode in (torch.no_grad, torch.inference_mode):
        for batch, height, width in ((1, 16, 16), (1, 8, 64), (2, 16, 16), (5, 40, 8)):
            with mode():
                images = torch.randn(batch, 3, height, width)
                fast(images), fast.forward_features(images), fast.get_intermediate_layers(images)
    fast.forward_packed([torch.randn(3, 8, 8), torch.randn(3, 8, 16)])
    fast(torch.randn(2, 3, 16, 16), bool_masked_pos=torch.ones(2, 4, dtype=torch.bool))
    assert len(compiled) == 2
    fast(torch.randn(2, 3, 16, 16), keep_indices=torch.tensor([[0], [3]]))
    assert len(compiled) == 3
    fast.attention = "eager"
    fast(torch.randn(2, 3, 16, 16))
    assert len(compiled) == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(torch.ones(2, 3, 16, 16))[0], fast(torch.ones(2, 3, 16, 16))[0])
    assert len(compiled) == 5
    assert fast(torch.randn(0, 3, 16, 16)).last_hidden_state.shape == (0, 9, 32)
    for dynamic, graphs_of_one in ((True, 2), (False, 1)):  # one image and several, or that very shape
        compiled.clear()
        optimize_for_inference(model, backend="inductor", dynamic=dynamic).warm_up(1, 16, 24)
        assert len(compiled) == graphs_of_one
    compiled.clear()
    optimize_for_inference(model, backend="inductor", dynamic=False)(torch.randn(0, 3, 16, 16))
    assert not compiled


@torch.no_grad()
def test_weights_of_another_kind_have_another_graph(model, compiled):
    """Of another dtype, or fewer of them; new numbers have the same."""
    fast, images = optimize_for_inference(model, backend="inductor"), torch.randn(2, 3, 16, 16)
    for made_so_far, change in (
        (1, lambda m: m.blocks[0].mlp.fc1.weight.mul_(2)),
        (1, lambda m: setattr(m.blocks[0].mlp.fc1, "weight", torch.nn.Parameter(m.blocks[0].mlp.fc1.weight * 2))),
        (2, lambda m: setattr(m.blocks[0].mlp.fc1, "bias", None)),
        (3, lambda m: m.blocks.bfloat16()),
        (4, lambda m: setattr(m.blocks[0].mlp.fc2, "bias", None)),
        (5, lambda m: m.blocks.float()),
        (6, lambda m: m.blocks.double()),
    ):
        fast(images)
        change(fast), change(model)
        bound = 2e-6 if model.blocks[0].mlp.fc1.weight.dtype == torch.float32 else 1e-2
        assert relative_error(fast(images).last_hidden_state, model(images).last_hidden_state) < bound
        assert len(compiled) == made_so_far


@torch.no_grad()
def test_a_step_down_that_somebody_looks_at_is_not_compiled(compiled):
    """Nor are the stages that it stands between."""
    model, seen = made(), []
    fast = optimize_for_inference(model, backend="inductor")
    fast.stages[2].downsample.conv.register_forward_hook(lambda _, args, out: seen.append(out))
    images = torch.randn(1, 3, 64, 64)
    assert relative_error(fast(images).last_hidden_state, model(images).last_hidden_state) < 2e-6
    assert len(seen) == 1 and not compiled


@torch.no_grad()
def test_a_model_that_gives_nan_itself_is_compiled_without_a_word(model, compiled):
    """There is nothing to compare, and nothing wrong with the graph."""
    model.blocks[0].ls1.gamma[3] = float("nan")
    fast = optimize_for_inference(model, backend="inductor")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert fast(torch.randn(1, 3, 16, 16)).last_hidden_state.isnan().any()
    assert len(compiled) == 1


@torch.no_grad()
def test_beyond_a_number_of_graphs_calls_run_eagerly_with_one_warning(model, compiled, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    fast = optimize_for_inference(model, backend="inductor", dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width in range(8, 88, 8):
            images = torch.randn(1, 3, 8, width)
            assert relative_error(fast(images).last_hidden_state, model(images).last_hidden_state) < 2e-6
    messages = [str(w.message) for w in caught if "graphs" in str(w.message)]
    assert len(compiled) == 3 and len(messages) == 1 and "run eagerly" in messages[0]


@torch.no_grad()
def test_a_graph_that_computes_something_else_is_made_anew_or_not_used(model, monkeypatch):
    """As those that were cached on disk by a processor of other instructions: NaN."""
    tries = []

    def wrong_at_first(function, **options):
        tries.append(torch._inductor.config.force_disable_caches)
        broken = len(tries) <= wrong
        return lambda *args: [state * float("nan") if broken else state for state in function(*args)]

    monkeypatch.setattr(torch, "compile", wrong_at_first)
    images = torch.randn(1, 3, 16, 16)
    expected = model(images).last_hidden_state
    for wrong, warned in ((1, 0), (2, 1)):  # noqa: B007 - wrong_at_first reads it
        tries.clear()
        fast = optimize_for_inference(model, backend="inductor")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                assert relative_error(fast(images).last_hidden_state, expected) < 2e-6
        assert tries == [False, True]
        assert sum("differs from the model" in str(w.message) for w in caught) == warned


@pytest.mark.parametrize(
    ("dtype", "autocast", "passes"),
    [(torch.float32, False, False), (torch.bfloat16, False, True), (torch.float32, True, True)],
)
@torch.no_grad()
def test_a_graph_may_err_as_its_narrowest_dtype_does(model, monkeypatch, dtype, autocast, passes):
    """In a deep model of bfloat16 graphs round elsewhere than eager execution: that is no fault, and runs."""

    def rounded_elsewhere(function, **options):
        return lambda *args: [state * 1.03 for state in function(*args)]

    monkeypatch.setattr(torch, "compile", rounded_elsewhere)
    fast = optimize_for_inference(copy.deepcopy(model).to(dtype), backend="inductor")
    with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", enabled=autocast):
        warnings.simplefilter("always")
        fast(torch.randn(1, 3, 16, 16))
    assert any("differs from the model" in str(w.message) for w in caught) == (not passes)


@torch.no_grad()
def test_a_compiled_call_that_fails_runs_eagerly(model, monkeypatch):
    calls = []

    def fails_later(function, **options):
        def run(*args):
            calls.append(args)
            if len(calls) > 1:
                raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached")
            return function(*args)

        return run

    class Held(dict):
        """Graphs that nobody adds to while somebody goes through them."""

        def items(self):
            assert fast._graphs.lock._is_owned()
            return super().items()

    monkeypatch.setattr(torch, "compile", fails_later)
    fast = optimize_for_inference(model, backend="inductor")
    fast._graphs.made = Held()
    images = torch.randn(1, 3, 16, 16)
    with pytest.warns(UserWarning, match="a compiled call failed; calls of its kind run eagerly from now on"):
        out = fast(images)
    assert relative_error(out.last_hidden_state, model(images).last_hidden_state) < 2e-6
    fast(images)
    assert len(calls) == 2
