"""Ways of computing are measured where they run, kept on disk, told and pinned; every way keeps the numbers."""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, TINY_GATED, ByFirstWord, relative_error, run_python, write_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_lite import DINOv3ViT, DINOv3ViTBackbone, attention_ways, choices, optimize_for_inference, stopwatch
from dinov3_lite.attention_ways import ATTENTIONS, ways_of_attention
from dinov3_lite.choices import Answer, Choices
from dinov3_lite.prepacked import available, ways_of_products
from dinov3_lite.stand_ins import FastNorm, pair_by_pair, way_of_attention

DTYPES = [d for d in (torch.float32, torch.bfloat16, torch.float16) if available(torch.empty(0, dtype=d))]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, of a process that knows nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "_KNOWN", {})
    return tmp_path / "cache" / "dinov3_lite"


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The ways that were timed, all of which take the same time but for `onednn`, `mkl` and `products`."""
    asked: list[str] = []

    def least_seconds(ways):
        asked.append(", ".join(ways))
        times = {"onednn": 2.0, "mkl": 1.0, "products": 1.5}
        return {way: [times.get(way, 3.0)] * len(calls) for way, calls in ways.items()}

    monkeypatch.setattr(choices, "least_seconds", least_seconds)
    return asked


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and asks glibc for what is free")
def test_what_was_measured_with_goes_back_to_the_system(tmp_path):
    """Numbers that lie in the C library's heap, below others that stay: 96 MiB in pieces."""
    code = """
import torch
from dinov3_lite.choices import Choices

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

stays = []
def prepare(way):
    pieces = [torch.ones(15000) for _ in range(800)]
    stays.append(torch.ones(15000))
    return [lambda: pieces[0].sum()]

before = resident()
Choices().way("a question", ["one", "another"], prepare)
print(resident() - before)
"""
    grown = int(run_python(code, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}).stdout)
    assert grown < 24 * 2**20


@pytest.fixture(params=[TINY, TINY_GATED], ids=["mlp", "gated"])
def model(request, tmp_path) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, request.param))


@pytest.mark.parametrize("scores", [attention_ways.SCORES, 700])
@pytest.mark.parametrize(
    ("dtype", "way"),
    [(d, way) for d in (torch.float32, torch.bfloat16, torch.float16) for way in ways_of_attention(d)],
    ids=str,
)
def test_every_way_of_attention_is_attention(way, dtype, scores, monkeypatch):
    """Views of a fused projection; with room for all scores, and for those of some images, heads or queries."""
    monkeypatch.setattr(attention_ways, "SCORES", scores)
    for B, N, heads, D in ((2, 29, 6, 16), (1, 130, 3, 80), (5, 9, 3, 16), (2, 13, 7, 8)):
        q, k, v = torch.randn(B, N, 3, heads, D).to(dtype).unbind(2)
        wide_q, wide_k, wide_v = (x.double().transpose(1, 2) for x in (q, k, v))
        truth = ((wide_q @ wide_k.transpose(2, 3)) * D**-0.5).softmax(-1) @ wide_v
        out = ATTENTIONS[way](q, k, v)
        assert out.shape == q.shape and out.dtype == dtype
        fused = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        # scores in half precision are rounded once, as queries and keys are
        bound = 1.5 if dtype == torch.float32 else 2.0
        assert relative_error(out.transpose(1, 2), truth) <= bound * relative_error(fused, truth), way


@pytest.mark.parametrize("way", ATTENTIONS)
def test_what_is_no_number_spreads_as_far_as_it_is_attended_to(way):
    """A key that is none, to all queries of its head; a value, to that dimension. And no further."""
    for dtype in (d for d in (torch.float32, torch.bfloat16) if way in ways_of_attention(d)):
        q, k, v = torch.randn(2, 21, 3, 4, 16).to(dtype).unbind(2)
        k[0, 5, 1], v[1, 20, 3, 7] = torch.nan, torch.nan
        expected = torch.zeros(q.shape, dtype=torch.bool)
        expected[0, :, 1], expected[1, :, 3, 7] = True, True
        assert torch.equal(ATTENTIONS[way](q, k, v).isnan(), expected), dtype


def test_what_computes_the_same_twice_is_timed_once(monkeypatch):
    """And what errs more than PyTorch's own is not timed: oneDNN's sums with AVX2 alone."""
    by_onednn = ["products by oneDNN", "convolutions by oneDNN"] if available(torch.empty(0)) else []
    monkeypatch.setattr(attention_ways, "error_of_sums", lambda terms: 1.7)
    assert ways_of_attention(torch.float32) == ["sdpa", "products", *by_onednn]
    monkeypatch.setattr(attention_ways, "error_of_sums", lambda terms: 1.9)
    assert ways_of_attention(torch.float32) == ["sdpa", "products"]
    halves = ["sdpa", "sdpa of sixteens", "sdpa in float32"]  # scores of products may be beyond float16
    assert ways_of_attention(torch.bfloat16) == [*halves, "products"] and ways_of_attention(torch.float16) == halves


@pytest.mark.skipif("products by oneDNN" not in ways_of_attention(torch.float32), reason="oneDNN errs too much here")
@pytest.mark.parametrize("tokens", [1024, 1029, 2309])
@pytest.mark.parametrize("way", ["products by oneDNN", "convolutions by oneDNN"])
def test_long_sums_by_onednn_err_little_more(way, tokens):
    q, k, v = torch.randn(1, tokens, 3, 2, 64).unbind(2)
    truth = attention_ways.products(q.double(), k.double(), v.double())
    fused, ours = (relative_error(ATTENTIONS[name](q, k, v), truth) for name in ("sdpa", way))
    assert ours <= attention_ways.EXACT_ENOUGH * fused


@pytest.mark.parametrize("sharp", [1, 4, 16])
@pytest.mark.parametrize("way", [way for way in ways_of_attention(torch.bfloat16) if way != "sdpa"])
def test_sharp_attention_errs_little_more_in_bfloat16(way, sharp):
    """Scores of some tens, rounded to bfloat16 before the softmax, would err ten times as much."""
    q, k, v = (
        (torch.randn(2, 205, 3, 2, 64) * torch.tensor([sharp**0.5, sharp**0.5, 1.0]).view(3, 1, 1)).bfloat16().unbind(2)
    )
    below = torch.nn.functional.one_hot(torch.tensor(0), 64) * 40.0 * sharp**0.5  # a query all of whose scores are
    for x, y in ((q, k), (q - below.bfloat16(), k + below.bfloat16())):
        truth = attention_ways.products(x.double(), y.double(), v.double())
        fused, ours = (relative_error(ATTENTIONS[name](x, y, v), truth) for name in ("sdpa", way))
        assert ours <= 1.8 * fused


@pytest.mark.parametrize("scores", [700, 5 * 130, 4 * 130 * 130, 2 * 5 * 130 * 130])
def test_no_more_scores_are_held_than_fit_a_cache(scores, monkeypatch):
    """And as many as fit: at least one query's, or one head's, of what is held at a time."""
    monkeypatch.setattr(attention_ways, "SCORES", scores)
    q, k, v = torch.randn(3, 130, 3, 5, 16).unbind(2)
    largest = most_scores("products", q, k, v)
    assert scores - 130 < largest <= scores  # less than a query's more


@pytest.mark.parametrize("queries", [1, 10, 130])
def test_convolutions_hold_no_more_than_fit_either(queries, monkeypatch):
    """Scores of all heads of one image, each with the keys that fill up, for as many queries at a time."""
    monkeypatch.setattr(attention_ways, "SCORES", queries * 5 * 144)
    q, k, v = torch.randn(3, 130, 3, 5, 16).unbind(2)
    assert most_scores("convolutions by oneDNN", q, k, v) == queries * 5 * 144


def most_scores(way: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    """The most scores that one operator of this way of attention returns."""
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.baddbmm, torch.ops.aten._softmax):
                largest[0] = max(largest[0], out.numel())
            return out

    with Watch():
        ATTENTIONS[way](q, k, v)
    return largest[0]


def test_the_first_way_is_taken_unless_another_is_faster(cache, measured):
    answers = Choices()
    assert answers.way("product a", ["onednn", "mkl", "plain"], lambda way: [id]) == "mkl"
    assert answers.way("product b", ["onednn", "plain"], lambda way: [id, id]) == "onednn"
    assert answers.way("product c", ["plain"], lambda way: [id]) == "plain"  # nothing to measure
    assert len(measured) == 2
    answer = answers.answers["product a"]
    assert answer == Answer("mkl", {"onednn": 2000.0, "mkl": 1000.0, "plain": 3000.0})
    assert str(answer) == "mkl 1e+03 ms; onednn 2e+03 ms (2.00 times), plain 3e+03 ms (3.00 times)"


@pytest.mark.parametrize(("second", "way"), [(0.99, "first"), (0.9, "second")])
def test_what_is_level_with_the_first_way_is_not_taken(second, way, cache, monkeypatch):
    """Sizes count alike: the second way wins by 10 % or by 1 % at both, and not by its seconds at the longer one."""
    monkeypatch.setattr(
        choices, "least_seconds", lambda ways: {"first": [1.0, 100.0], "second": [second, second * 100]}
    )
    assert Choices().way("product", ["first", "second"], lambda _: [id, id]) == way
    monkeypatch.setattr(choices, "least_seconds", lambda ways: {"first": [1.0, 100.0], "second": [1.5, 90.0]})
    assert Choices().way("product, other", ["first", "second"], lambda _: [id, id]) == "first"


def test_time_is_the_least_of_interleaved_rounds(monkeypatch):
    """By a clock of ours: what a busy machine adds once doesn't count, and what is hopeless is not run for long."""
    now, calls = [0.0], {"quick": 0, "slow": 0, "unlucky": 0}
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def take(way, seconds):
        def call():
            calls[way] += 1
            now[0] += seconds + (1.0 if way == "unlucky" and calls[way] in (1, 2) else 0.0)

        return [call]

    ways = {"quick": take("quick", 0.001), "slow": take("slow", 0.0025), "unlucky": take("unlucky", 0.0005)}
    least = stopwatch.least_seconds(ways)
    assert {way: pytest.approx(seconds) for way, seconds in least.items()} == {
        "quick": [0.001],
        "slow": [0.0025],
        "unlucky": [0.0005],
    }
    assert calls["slow"] == 3


def test_answers_are_measured_once_and_kept(cache, measured, model):
    images = torch.randn(1, 3, 16, 24)
    first = optimize_for_inference(model, dynamic=False)
    assert first.choices == {} and first.explain() == ""
    first(images)
    assert len(measured) == len(first.choices) == 6  # five products and an attention: none of oneDNN's
    again = optimize_for_inference(model, dynamic=False)
    again(images)
    assert len(measured) == 6 and again.choices == first.choices
    choices._KNOWN.clear()  # as in another process
    later = optimize_for_inference(DINOv3ViTBackbone(model).eval(), dynamic=False)
    later(images)
    assert len(measured) == 6 and later.choices == first.choices
    assert later.explain() == first.explain() and "float32: products 1.5e+03 ms; " in first.explain()
    (file,) = cache.iterdir()  # and nothing beside it
    assert set(json.loads(file.read_text())) == set(first.choices)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"product": 3}', b"\xff", None], ids=str)
def test_a_damaged_cache_is_measured_anew(damage, cache, measured, model):
    optimize_for_inference(model)(torch.randn(1, 3, 16, 24))
    (file,) = cache.iterdir()
    whole = file.read_text()
    if damage is None:
        answers = {question: ["nothing that we have", {"nothing that we have": 1.0}] for question in json.loads(whole)}
        damage = json.dumps(answers).encode()
    file.write_bytes(damage)
    choices._KNOWN.clear()
    optimize_for_inference(model)(torch.randn(1, 3, 16, 24))
    assert len(measured) == 12 and json.loads(file.read_text()) == json.loads(whole)


def test_a_cache_that_can_not_be_written_is_no_failure(cache, measured, model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        fast = optimize_for_inference(model)
        fast(torch.randn(1, 3, 16, 24))
    assert len(measured) == 6 and len(fast.choices) == 8  # and the numbers of rows, of patches and of tokens


def test_a_user_without_a_home_has_answers_in_memory(cache, measured, monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    for _ in range(2):
        assert Choices().way("product", ["onednn", "plain"], lambda way: [id]) == "onednn"
    assert len(measured) == 1


class Growing(dict):
    """Answers to which another thread adds one whenever somebody goes through them."""

    def items(self):
        for number, item in enumerate(super().items()):
            self[f"product {len(self)} {number}"] = Answer("plain", {})
            yield item


def test_answers_are_told_and_copied_while_another_thread_runs(model):
    fast = optimize_for_inference(model)
    fast._choices.answers = Growing({"product": Answer("plain", {})})
    assert fast.choices == {"product": "plain"} and fast.explain().startswith("product: plain")
    assert copy.deepcopy(fast).choices == pickle.loads(pickle.dumps(fast)).choices == fast.choices


def test_another_machine_measures_for_itself(cache, measured, monkeypatch):
    def ask():
        Choices().way("product", ["onednn", "plain"], lambda way: [id])

    ask()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        ask()
    finally:
        torch.set_num_threads(threads)
    ask()
    assert len(measured) == 2
    monkeypatch.setattr(choices, "_processor", lambda: "another")
    ask()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "another")
    ask()
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    ask()
    monkeypatch.setattr(torch, "__version__", "99.0")
    ask()
    assert len(measured) == 6 and len(list(cache.iterdir())) == 6


def test_an_answer_does_not_change_within_a_process(cache, measured):
    def ask() -> str:
        return Choices().way("product", ["onednn", "plain"], lambda way: [id])

    assert ask() == "onednn"
    (file,) = cache.iterdir()
    file.write_text(json.dumps({"product": ["plain", {"plain": 1.0, "onednn": 2.0}]}))
    assert ask() == "onednn"
    Choices().way("product, other", ["onednn", "plain"], lambda way: [id])
    assert json.loads(file.read_text())["product"][0] == "onednn"


def test_an_answer_that_knows_nothing_of_a_way_is_measured_anew(cache, measured):
    """As after an update: what was fastest among fewer may not be any more."""
    Choices().way("product", ["onednn", "plain"], lambda way: [id])
    choices._KNOWN.clear()
    assert Choices().way("product", ["onednn", "mkl", "plain"], lambda way: [id]) == "mkl"
    assert len(measured) == 2


def test_answers_of_other_processes_stay_beside_ones_own(cache, measured):
    def ask(question):
        return Choices().way(question, ["onednn", "plain"], lambda way: [id])

    ask("product a")
    (file,) = cache.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "product of another": ["plain", {"plain": 1.0}]}))
    ask("product b")
    assert set(json.loads(file.read_text())) == {"product a", "product of another", "product b"}


def test_where_sizes_are_free_attention_is_asked_about_few(cache, measured, monkeypatch):
    """Whatever the batch and the size: six questions at most. Else about the very size, timed at a bearable one."""
    timed = []
    real = choices.least_seconds

    def least_seconds(ways):
        timed.append({call.args[0].shape for calls in ways.values() for call in calls})
        return real(ways)

    monkeypatch.setattr(choices, "least_seconds", least_seconds)
    answers = Choices()
    for batch in (1, 2, 3, 7):
        for tokens in (5, 200, 700, 2000, 9000):
            way_of_attention(answers, torch.Size((batch, tokens, 2, 16)), torch.float32, dynamic=True)
    assert set(answers.answers) == {
        f"attention about {batch} x {tokens} tokens, 2 heads of 16, float32"
        for batch in (1, 2)
        for tokens in (201, 1029, 2030)
    }
    assert timed == [{(batch, tokens, 2, 16)} for batch in (1, 2) for tokens in (201, 1029, 2030)]
    way_of_attention(answers, torch.Size((3, 9000, 2, 16)), torch.float32, dynamic=False)
    assert "attention 3 x 9000 tokens, 2 heads of 16, float32" in answers.answers and timed[-1] == {(3, 2030, 2, 16)}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_pinned_choices_give_the_same_bits(dtype, dynamic, cache, model):
    """Whatever else ran before, and whatever this machine would measure; each way computes the model."""
    model = model.to(dtype)
    images, others = torch.randn(2, 3, 16, 24), torch.randn(1, 3, 32, 24)
    fast = optimize_for_inference(model, dynamic=dynamic)
    truth = model.double()(images).last_hidden_state
    model.to(dtype)
    fast(images)
    bound = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for product in ways_of_products(dtype, dynamic, terms=64):
        for attention in ways_of_attention(dtype):
            first = optimize_for_inference(
                model, dynamic=dynamic, choices=ByFirstWord(product=product, attention=attention)
            )
            out = first(images).last_hidden_state
            second = optimize_for_inference(model, dynamic=dynamic, choices=first.choices)
            second(others)
            assert torch.equal(second(images).last_hidden_state, out)
            assert first.choices.items() <= second.choices.items()
            assert {attention, product} <= set(first.choices.values())
            assert relative_error(out, truth) < bound
            assert "not measured" in first.explain()


def test_a_choice_that_there_is_not_is_refused(cache, model):
    fast = optimize_for_inference(model)
    fast(torch.randn(1, 3, 16, 24))
    question = next(question for question in fast.choices if question.startswith("product"))
    wrong = optimize_for_inference(model, choices={question: "mkl"})  # which holds for one number of rows
    with pytest.raises(
        ValueError, match=r"choices\['product \d+ to \d+, any rows, float32'\] is 'mkl': expected one of"
    ):
        wrong(torch.randn(1, 3, 16, 24))


@pytest.mark.parametrize("pinned", [{1: "x"}, {"rows a": "x"}, {"rows": "x", "rows ": "x"}, {"product": 1}, "plain", 3])
def test_choices_that_no_model_has_are_refused_at_once(pinned):
    with pytest.raises(
        ValueError, match=r"choices (is|has) .*: expected .*texts.*`choices` of a prepared model"
    ) as error:
        optimize_for_inference(DINOv3ViT(TINY).eval(), choices=pinned)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_rows_are_rounded_up_once_many_were_seen(cache, model):
    """Which are not is a choice like others: with the same ones, other rows are rounded whatever ran before."""
    fast = optimize_for_inference(model, choices=ByFirstWord(product="onednn"))
    sizes = [torch.randn(1, 3, 8, 8 * n) for n in range(1, 36)]
    outputs = [fast(images).last_hidden_state for images in sizes]
    seen = [question for question in fast.choices if question.startswith("rows")]
    prefix = model.num_prefix_tokens
    met = dict.fromkeys(rows for n in range(1, 36) for rows in (n, prefix + n))
    assert seen == [f"rows {rows}" for rows in met][:32]
    assert fast._choices.planned_rows(107) == 112 and fast._choices.planned_rows(1001) == 1024
    for images, output in zip(sizes, outputs, strict=True):
        assert relative_error(output, model(images).last_hidden_state) < 2e-6
    again = optimize_for_inference(model, choices=fast.choices)
    for images, output in list(zip(sizes, outputs, strict=True))[::-1]:
        assert torch.equal(again(images).last_hidden_state, output)
    assert again.choices == fast.choices


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="nothing is packed in bfloat16 here")
@pytest.mark.parametrize("size", [(16, 24), (32, 8 * 7)])
@torch.no_grad()
def test_rows_of_padding_change_no_value(size, cache, model):
    """Of projections that end in a whole number of sixteens; of sequences with a rotation of their own, too."""
    model = model.to(torch.bfloat16)
    images = torch.randn(2, 3, *size)
    ways = [
        optimize_for_inference(model, dynamic=False, choices=ByFirstWord(product="plain", attention=attention))
        for attention in ("sdpa", "sdpa of sixteens")
    ]
    keep = torch.stack([torch.randperm(size[0] * size[1] // 64)[:5] for _ in images])
    for kept in (None, keep):
        states, padded = (way(images, keep_indices=kept, output_hidden_states=True).hidden_states for way in ways)
        wide = copy.deepcopy(model).double()
        truth = wide(images.double(), keep_indices=kept, output_hidden_states=True).hidden_states
        for state, same, true in zip(states, padded, truth, strict=True):
            assert state.shape == same.shape
            assert relative_error(same, true) <= 1.1 * relative_error(state, true) + 1e-9
    rows = {question for question in ways[1].choices if question.startswith("product 32 to 96")}
    tokens = model.num_prefix_tokens + size[0] * size[1] // 64
    assert f"product 32 to 96, {2 * -(-tokens // 16) * 16} rows, bfloat16" in rows


@torch.no_grad()
def test_rows_of_padding_are_zeros_whatever_lay_there(model):
    norm = FastNorm(model.norm.to(torch.bfloat16))
    x = torch.randn(2, 11, 32)
    torch.use_deterministic_algorithms(True)  # new memory is NaN then
    try:
        padded = norm(x, 16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(padded, torch.cat((norm(x), torch.zeros(2, 5, 32)), dim=1)) and padded.dtype == torch.bfloat16


def test_measuring_draws_no_random_numbers(cache, model):
    state = torch.get_rng_state()
    optimize_for_inference(model)(torch.ones(1, 3, 16, 24))
    assert torch.equal(torch.get_rng_state(), state)


def test_pair_by_pair():
    """Of two heads of four numbers: what RoPE rotates together, 0 with 2 and 1 with 3, are neighbours."""
    assert pair_by_pair(2, 8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, *range(16, 24)]
