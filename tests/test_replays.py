"""CUDA graphs of a whole forward, and what decides whether one still holds."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from helpers import TINY, relative_error, write_checkpoint

from dinov3_lite import DINOv3ViT, optimize_for_inference, replays
from dinov3_lite.layers import PatchEmbed
from dinov3_lite.replays import State

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_states_are_equal_if_they_hold_the_same_objects():
    weight, other = torch.ones(3), torch.ones(3)
    assert State([weight], [weight]) == State([weight], [weight])
    assert State([weight]) != State([other]) and State([weight]) != State([weight, other]) and State([weight]) != 0
    before = State([weight], [weight])
    weight.add_(1)
    assert State([weight], [weight]) != before
    before = State([weight], [weight, None])
    weight.data = torch.zeros(3)
    assert State([weight], [weight, None]) != before


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (40, 24), (43, 31)])
def test_patches_times_weights_is_the_convolution(channels, size):
    embed = PatchEmbed(replace(TINY, num_channels=channels)).double()
    images = torch.randn(2, channels, *size, dtype=torch.float64)
    assert embed._is_product()
    product = embed._patches(images) @ embed.proj.weight.flatten(1).mT + embed.proj.bias
    torch.testing.assert_close(product, embed(images), rtol=1e-12, atol=1e-12)


def test_what_is_no_plain_convolution_of_patches_is_no_product():
    for options in ({"padding": 1}, {"stride": 4}, {"dilation": 2}):
        embed = PatchEmbed(TINY)
        embed.proj = torch.nn.Conv2d(3, 8, 8, **{"stride": 8, **options})
        assert not embed._is_product()
    embed = PatchEmbed(TINY)
    embed.proj.register_forward_hook(lambda *_: None)
    assert not embed._is_product()


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(replays, "GAIN", float("inf"))  # a graph is taken whatever it gains
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY), device="cuda")
    return model, optimize_for_inference(model, dynamic=False)


def made(prepared) -> list[object]:
    return list(prepared._replays.made.values())


@needs_gpu
@pytest.mark.parametrize("hidden", [False, True])
def test_a_replay_gives_what_the_model_gives(prepared, hidden):
    model, fast = prepared
    kept = []
    for seed in range(3):
        images = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(seed)).cuda()
        kept.append((fast(images, output_hidden_states=hidden), model(images, output_hidden_states=hidden)))
    assert len(made(fast)) == 1 and made(fast)[0] is not None
    for actual, expected in kept:  # the next replay leaves them alone
        assert relative_error(actual.last_hidden_state, expected.last_hidden_state) < 1e-5
        assert torch.equal(actual.pooler_output, actual.last_hidden_state[:, 0]) and actual.grid == expected.grid
        assert (actual.hidden_states is None) == (not hidden)
        for state, true in zip(actual.hidden_states or (), expected.hidden_states or (), strict=True):
            assert relative_error(state, true) < 1e-5


@needs_gpu
@pytest.mark.parametrize("name", ["cls_token", "patch_embed.proj.weight", "blocks.1.ls2.gamma", "norm.bias"])
@pytest.mark.parametrize("way", ["in place", "data", "anew"])
def test_a_replay_follows_the_weights(prepared, name, way):
    model, fast = prepared
    images = torch.randn(1, 3, 40, 24, device="cuda")
    before, change = fast(images).last_hidden_state, torch.randn_like(model.get_parameter(name))
    owner, _, last = name.rpartition(".")
    for each in (model, fast):
        module = each.get_submodule(owner)
        weight = getattr(module, last)
        with torch.no_grad():
            if way == "in place":
                weight.add_(change if each is model else 0)  # which they share
            elif way == "data":
                weight.data = weight + change
            else:
                setattr(module, last, torch.nn.Parameter(weight + change))
    after, expected = fast(images).last_hidden_state, model(images).last_hidden_state
    assert relative_error(after, expected) < 1e-5 and relative_error(after, before) > 1e-3
    assert len(made(fast)) == 1


@needs_gpu
def test_who_watches_sees_every_forward(prepared):
    model, fast = prepared
    images, seen = torch.randn(1, 3, 40, 24, device="cuda"), []
    fast(images)
    for module in (fast.norm, fast.blocks[1].mlp, fast.rope_embed):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        fast(images)
        handle.remove()
    assert len(seen) == 3
    masked = torch.ones(1, 15, dtype=torch.bool, device="cuda")
    assert relative_error(fast(images, masked)[0], model(images, masked)[0]) < 1e-5
    assert relative_error(fast(images)[0], model(images)[0]) < 1e-5


@needs_gpu
def test_threads_and_streams_do_not_disturb_each_other(prepared):
    model, fast = prepared
    inputs = [torch.randn(1, 3, 40, 24, device="cuda") for _ in range(4)]
    expected = [model(images).last_hidden_state for images in inputs]
    fast(inputs[0])
    torch.cuda.synchronize()
    wrong = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                error = relative_error(fast(inputs[i]).last_hidden_state, expected[i])
                wrong.extend([error] if error > 1e-5 else [])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_gpu
def test_it_runs_inside_of_anothers_graph(prepared):
    model, fast = prepared
    images = torch.randn(1, 3, 40, 24, device="cuda")
    fast(images)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(images).last_hidden_state
    images.copy_(torch.randn_like(images))
    graph.replay()
    assert relative_error(out, model(images).last_hidden_state) < 1e-5


@needs_gpu
def test_a_graph_that_gains_nothing_is_given_up(prepared, monkeypatch):
    monkeypatch.setattr(replays, "GAIN", 0.0)
    model, fast = prepared
    images = torch.randn(1, 3, 40, 24, device="cuda")
    assert relative_error(fast(images)[0], model(images)[0]) < 1e-5
    assert made(fast) == [None]
