"""A prepared model holds its weights once, packed; whoever asks gets them plain, and what is written is followed."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import platform
import sys
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from convnexts import made as made_convnext
from helpers import TINY, TINY_GATED, relative_error, run_python, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convert import convert
from dinov3_lite import DINOv3ViT, lent, optimize_for_inference
from dinov3_lite.lent import Lent
from dinov3_lite.pages import give_back, mapped, view
from dinov3_lite.prepacked import Product, ways_of_products
from dinov3_lite.projection import Projection

IMAGES = torch.randn(2, 3, 16, 24)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux which pages are a file's")


def away(model: nn.Module) -> int:
    """How many weights are packed alone."""
    return sum(dict.get(vars(m)["_parameters"], "weight", 0) is None for m in model.modules())


class Packed(dict):
    """Choices by which every product is oneDNN's."""

    def get(self, question, default=None):
        return "onednn" if question.startswith("product") else default


def made(config=TINY) -> DINOv3ViT:
    model = DINOv3ViT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def alone(config=TINY, dtype=torch.float32, **options):
    """A prepared model that ran, the only one to hold its weights, and copies of those."""
    model = made(config).to(dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = optimize_for_inference(model, **options)
    del model
    gc.collect()
    fast(IMAGES)
    assert away(fast) == 4 * config.num_hidden_layers
    return fast, state


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["mlp", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_come_back_exactly_from_every_layout_and_go_again(config, dtype):
    for way in ways_of_products(dtype, for_any_rows=False, terms=64):
        fast, state = alone(config, dtype, dynamic=False)
        pinned = {question: way if "product" in question else answer for question, answer in fast.choices.items()}
        fast, state = alone(config, dtype, dynamic=False, choices=pinned)
        out = fast(IMAGES).last_hidden_state
        for _ in range(2):
            now = fast.state_dict()
            assert now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state), way
            assert not away(fast) and len(list(fast.parameters())) == len(list(DINOv3ViT(config).parameters()))
            assert torch.equal(fast(IMAGES).last_hidden_state, out) and away(fast) == 4 * config.num_hidden_layers
        other = torch.randn(1, 3, 32, 32)  # other rows: packed anew
        assert fast(other).grid == (4, 4)
        assert all(torch.equal(tensor, state[name]) for name, tensor in fast.state_dict().items())


def test_what_holds_a_weight_keeps_it():
    fast, state = alone()
    weight = fast.blocks[1].mlp.fc2.weight
    assert type(weight) is nn.Parameter and not weight.requires_grad
    before = fast(IMAGES).last_hidden_state
    assert fast.blocks[1].mlp.fc2.weight.data_ptr() == weight.data_ptr()
    with torch.no_grad():
        weight.mul_(2.0)  # written to by who held it, after the model let go of it
    expected = DINOv3ViT(TINY)
    expected.load_state_dict({**state, "blocks.1.mlp.fc2.weight": state["blocks.1.mlp.fc2.weight"] * 2})
    truth = expected.eval()(IMAGES).last_hidden_state
    assert relative_error(fast(IMAGES).last_hidden_state, truth) < 2e-6 < relative_error(before, truth)


@torch.no_grad()
def test_what_is_written_while_nobody_runs_is_followed():
    fast, _ = alone()
    truth, other = made(), made().state_dict()
    for change in (
        lambda m: m.blocks[0].attn.qkv.weight.mul_(1.5),
        lambda m: m.load_state_dict(other),
        lambda m: setattr(m.blocks[0].mlp.fc1, "weight", nn.Parameter(torch.ones(64, 32))),
        lambda m: setattr(m.blocks[2].mlp.fc1.weight, "data", torch.ones(64, 32)),
        lambda m: m.get_parameter("blocks.1.attn.proj.weight").copy_(torch.eye(32)),
    ):
        truth.load_state_dict(fast.state_dict())
        change(truth)
        change(fast)
        assert relative_error(fast(IMAGES).last_hidden_state, truth(IMAGES).last_hidden_state) < 2e-6
        assert away(fast) == 4 * TINY.num_hidden_layers


@torch.no_grad()
def test_weights_that_changed_and_are_gone_are_an_error():
    model = made()
    fast = optimize_for_inference(model, choices=Packed())  # a product by the plain weight would hold it
    fast(IMAGES)
    model.blocks[0].mlp.fc1.weight.mul_(2.0)
    expected = model(IMAGES).last_hidden_state
    assert relative_error(fast(IMAGES).last_hidden_state, expected) < 2e-6
    model.blocks[0].mlp.fc1.weight.mul_(2.0)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="weights were changed in the model that this one was prepared from"):
        fast(IMAGES)


def test_copies_moves_and_files_are_whole(tmp_path):
    fast, state = alone()
    out = fast(IMAGES).last_hidden_state
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert torch.equal(twin(IMAGES).last_hidden_state, out) and torch.equal(fast(IMAGES).last_hidden_state, out)
    reloaded = DINOv3ViT.from_pretrained(fast.save_pretrained(tmp_path / "saved"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in reloaded.state_dict().items())
    fast(IMAGES)
    half = fast.to(torch.bfloat16)
    truth = DINOv3ViT(TINY).eval()
    truth.load_state_dict(state)
    with torch.no_grad():
        expected = truth.to(torch.bfloat16)(IMAGES).last_hidden_state
    assert half.dtype == torch.bfloat16 and relative_error(half(IMAGES).last_hidden_state, expected) < 1e-2
    assert all(torch.equal(t, state[name].to(t.dtype)) for name, t in half.state_dict().items())


READERS = {
    "state_dict": lambda model: model.state_dict(),
    "parameters": lambda model: [*model.parameters(), *model.named_parameters()],
    "attention maps": lambda model: model.attention_maps(IMAGES) if isinstance(model, DINOv3ViT) else None,
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16)(model)(torch.randn(1, 3, 32, 40)),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "to": lambda model: model.to(torch.float32),
    "half": lambda model: model.half().float(),
}


@pytest.mark.parametrize("kind", [made, made_convnext], ids=["vit", "convnext"])
@pytest.mark.parametrize("reader", READERS)
def test_weights_outlast_who_reads_them_in_inference_mode(kind, reader):
    fast, images = optimize_for_inference(kind(), choices=Packed()), torch.randn(1, 3, 32, 40)
    if reader == "half":
        fast.half().float()  # the same numbers afterwards
    state = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    with torch.inference_mode():
        out = fast(images).last_hidden_state
        for _ in range(2):
            READERS[reader](fast)
            assert torch.equal(fast(images).last_hidden_state, out)
    assert away(fast) or reader == "half"  # what inference mode made stays
    for read in (READERS[reader], *READERS.values()):
        assert all(torch.equal(tensor, state[name]) for name, tensor in fast.state_dict().items())
        read(fast)
        if read is not READERS["half"]:
            assert torch.equal(fast(images).last_hidden_state, out)


def beside(function) -> threading.Thread:
    """Run it in another thread, which may have to wait for this one."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(timeout=0.2)
    return thread


def lent_alone() -> tuple[nn.Linear, Lent, torch.Tensor]:
    """A layer that ran, the only one to hold its weight, and a copy of that."""
    linear = nn.Linear(3, 2)
    parameters, weight = Lent.of(linear), linear.weight.detach().clone()
    parameters.lend(lambda: weight.clone(), parameters.version())
    gc.collect()
    assert dict.get(parameters, "weight") is None
    return linear, parameters, weight


def test_a_weight_that_another_thread_lends_is_read_all_the_same(monkeypatch):
    """Just when it has come back, and when all of them are looked at one by one."""
    come_back = Lent._come_back

    def taken_at_once(self):
        value = come_back(self)
        beside(self.watched)
        return value

    monkeypatch.setattr(Lent, "_come_back", taken_at_once)
    for read in (
        lambda linear: linear.weight,
        lambda linear: linear._parameters["weight"],
        lambda linear: linear._parameters.get("weight"),
        lambda linear: linear._parameters.pop("weight"),
    ):
        linear, _, weight = lent_alone()
        assert torch.equal(read(linear), weight)
    linear, parameters, weight = lent_alone()
    for seen in (parameters.items(), linear.named_parameters()):
        parameters.watched()
        assert torch.equal(dict(seen)["weight"], weight)


def test_a_weight_that_comes_back_is_lost_to_no_other_thread(monkeypatch):
    """One that makes a stand-in, runs the model or takes its weights, between the unpacking and the return."""
    for other, find in (
        (Lent.of, lambda parameters: parameters.alias),
        (lambda linear: linear._parameters.watched(), lambda watched: watched[0]),
        (nn.Linear.state_dict, lambda state: state["weight"]),
        (lambda linear: Lent.undo(linear) or linear.weight, lambda weight: weight),
    ):
        linear, parameters, weight = lent_alone()
        threads, found = [], []

        def between(unpack, linear=linear, other=other, threads=threads, found=found):
            unpack()
            threads.append(beside(lambda: found.append(other(linear))))

        monkeypatch.setattr(lent, "unseen", between)
        assert torch.equal(linear.weight, weight)
        monkeypatch.undo()
        threads[0].join(timeout=10)
        assert not threads[0].is_alive() and isinstance(find(found[0]), torch.Tensor)
        assert torch.equal(linear.weight, weight) and torch.equal(parameters["weight"], weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.weight.mul_(2),
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight * 2)),
    ],
    ids=["written to", "replaced"],
)
@torch.no_grad()
def test_what_is_changed_while_it_is_packed_is_followed(change, monkeypatch):
    """By another thread, which the first run does not wait for."""
    fast = optimize_for_inference(made(), choices=Packed())
    layer, expected = fast.blocks[0].attn.qkv, 2 * fast.blocks[0].attn.qkv.weight
    changes = iter((lambda _: None, change))  # while the first layer is packed, and while this one is
    monkeypatch.setattr(Product, "to_huge_pages", lambda _: next(changes, lambda _: None)(layer))
    fast(IMAGES)
    monkeypatch.undo()
    assert torch.equal(layer.weight, expected)
    truth = DINOv3ViT(TINY).eval()
    truth.load_state_dict(fast.state_dict())
    assert relative_error(fast(IMAGES).last_hidden_state, truth(IMAGES).last_hidden_state) < 2e-6
    assert away(fast) == 4 * TINY.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_block_that_was_replaced_is_let_go_of(dtype):
    """Also one that runs itself, of a dtype that nothing is packed of."""
    fast, _ = alone()
    fast.blocks[1].to(dtype)
    fast(IMAGES)
    held = weakref.ref(fast.blocks[1]), weakref.ref(fast._stand_in(fast.blocks[1]))
    fast.blocks[1] = made().blocks[1]
    fast(IMAGES)
    gc.collect()
    assert [one() for one in held] == [None, None] and len(fast._twins) == 1 + TINY.num_hidden_layers


def test_an_observed_block_holds_nothing_packed():
    """Until nobody looks at it any more. A mode passes: what another thread runs stays as it is."""
    fast, _ = alone()
    out, product = fast(IMAGES).last_hidden_state, fast._stand_in(fast.blocks[1]).mlp.fc1.held[1]
    with FlopCounterMode(display=False):
        assert relative_error(fast(IMAGES).last_hidden_state, out) < 2e-6
    assert fast._stand_in(fast.blocks[1]).mlp.fc1.held[1] is product
    packed = weakref.ref(product)
    del product
    hook = fast.blocks[1].register_forward_hook(lambda *_: None)
    assert relative_error(fast(IMAGES).last_hidden_state, out) < 2e-6
    gc.collect()
    assert packed() is None and away(fast) == 4 * (TINY.num_hidden_layers - 1)
    hook.remove()
    assert torch.equal(fast(IMAGES).last_hidden_state, out) and away(fast) == 4 * TINY.num_hidden_layers


def test_a_prepared_model_compiles_after_it_ran():
    torch._dynamo.reset()
    fast, _ = alone()
    out = fast(IMAGES).last_hidden_state
    assert relative_error(torch.compile(fast, backend="eager", fullgraph=True)(IMAGES).last_hidden_state, out) < 2e-6
    assert torch.equal(fast(IMAGES).last_hidden_state, out)


def test_parameters_are_a_dict_like_any_other():
    linear = nn.Linear(3, 2)
    expected = dict(linear._parameters)
    lent = Lent.of(linear)
    weight = linear.weight.detach().clone()
    lent.lend(lambda: weight.clone(), lent.version())
    del expected["weight"]
    gc.collect()
    assert dict.get(lent, "weight") is None and list(lent) == ["weight", "bias"]
    for read in (
        lambda: lent["weight"],
        lambda: lent.get("weight"),
        lambda: dict(lent.items())["weight"],
        lambda: next(iter(lent.values())),
        lambda: lent.copy()["weight"],
        lambda: lent.setdefault("weight", 3),
        lambda: (lent | {})["weight"],
        lambda: ({} | lent)["weight"],
        lambda: copy.deepcopy(lent)["weight"],
        lambda: linear.weight,
        lambda: linear.state_dict()["weight"],
    ):
        assert torch.equal(read(), weight)
        lent.watched()
        assert dict.get(lent, "weight") is None
    assert lent.get("nothing", 3) == lent.pop("nothing", 3) == lent.setdefault("nothing", 3) == lent.pop("nothing") == 3
    Lent.undo(linear)
    assert type(linear._parameters) is dict and torch.equal(linear.weight, weight)
    linear._parameters = lent
    lent.watched()
    del linear.weight  # which asks for nothing before
    assert "weight" not in lent.copy() and lent.get("weight") is None and lent.watched() == [linear.bias]


@linux
def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    """As a 7B in float32 is for many: of a file of holes, the end is read and written to, and the file stays."""
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = tmp_path / "holes"
    with file.open("wb") as f:
        f.truncate(size)
        f.seek(size - 4)
        f.write(np.float32(3.0).tobytes())
    last = view(mapped(file), torch.float32, size - 8, 2)
    assert last.tolist() == [0.0, 3.0]
    last += 1
    assert last.tolist() == [1.0, 4.0] and view(mapped(file), torch.float32, size - 4, 1).tolist() == [3.0]


@linux
def test_pages_of_a_file_are_given_back_unless_written_to(tmp_path):
    numbers = torch.randn(64, 4096)
    save_file({"a": numbers, "b": numbers.clone()}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        a, b = file.get_tensor("a"), file.get_tensor("b")

    def resident() -> int:
        """Of the file's pages, KiB."""
        with open("/proc/self/smaps") as maps:
            lines = iter(maps)
            return sum(
                int(next(line for line in lines if line.startswith("Rss")).split()[1])
                for head in lines
                if "x.safetensors" in head
            )

    assert torch.equal(a, numbers) and torch.equal(b, numbers)
    assert resident() >= 2 * numbers.nbytes / 1024
    if not give_back(a):
        pytest.skip("this system does not tell which pages are a file's")
    assert resident() < 1.1 * numbers.nbytes / 1024
    assert torch.equal(a, numbers)
    b[3] = 1.0
    assert not give_back(b) and b[3].eq(1.0).all()
    assert not give_back(torch.randn(64, 4096)) and not give_back(torch.randn(3)) and not give_back(a.t())


HEAP = """
import resource, torch
from dinov3_lite import DINOv3Config, DINOv3ViT
def faults():
    held = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(BLOCKS)]
    while held:
        held.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
model = DINOv3ViT(DINOv3Config(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1))
for _ in range(3):
    before = faults()
print(faults() - before)
"""


@linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_a_process_with_a_model_keeps_what_its_blocks_free(monkeypatch):
    """Else 30 and 45 MiB, in blocks of one, mostly come back page by page: 7,700 and 11,200 of them."""
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for blocks in (30, 45):
        assert int(run_python(f"BLOCKS = {blocks}{HEAP}").stdout) < 200


@linux
@pytest.mark.parametrize(("layout", "dtype"), [("transformers", "bfloat16"), ("lite", "float32")])
def test_weights_are_held_once_while_preparing_too(layout, dtype, tmp_path):
    """A process's peak, in units of the weights; the choices are known from a first process.

    Beside the weights there are one matrix in the file's float32, or one unpacked, and a few MiB that depend on the
    processor: of as many blocks as a ViT-B has they are less than a tenth.
    """
    config = replace(TINY, hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=12)
    folder = write_checkpoint(tmp_path / "model", config)
    source = folder if layout == "transformers" else convert(folder, tmp_path / "model.safetensors")
    code = f"""
import torch
from dinov3_lite import DINOv3Config, DINOv3ViT, optimize_for_inference
def mib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
small = {{**DINOv3Config.from_name("vits16").to_dict(), "num_hidden_layers": 1}}
small = DINOv3ViT(DINOv3Config.from_dict(small)).to(torch.{dtype}).eval()
images = torch.randn(1, 3, 16, 16)
with torch.inference_mode():  # libraries, and what they keep
    small(images), optimize_for_inference(small, dynamic=False)(images)
before = mib("VmRSS")
fast = optimize_for_inference(DINOv3ViT.from_pretrained({str(source)!r}, dtype=torch.{dtype}), dynamic=False)
with torch.inference_mode():
    fast(images)
    fast(images)
peak = mib("VmHWM") - before
print(peak / (sum(p.nbytes for p in DINOv3ViT(fast.config).to(torch.{dtype}).parameters()) / 2**20))
"""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(2):
        done = run_python(code, env=env)
        assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.1


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_is_packed_before_the_first_block_runs(dynamic, monkeypatch):
    """Weights that are packed between activations cut the heap into holes: a ViT-B of eight images took 276 MiB more."""
    model = optimize_for_inference(DINOv3ViT(TINY).eval(), dynamic=dynamic, choices=Packed())
    seen = []
    monkeypatch.setattr(
        "dinov3_lite.prepared.run_stack", lambda blocks, tokens, taps, attend: seen.extend(blocks) or []
    )
    rows = None if dynamic else len(IMAGES) * (1 + TINY.num_register_tokens + 6)
    for _ in range(2):
        seen.clear()
        model.run_blocks(model.embed(IMAGES)[0], (TINY.num_hidden_layers - 1,))
        products = [m.held for block in seen for m in block.modules() if isinstance(m, Projection)]
        assert len(products) == 4 * TINY.num_hidden_layers
        assert all(product is not None and held_for == rows for held_for, product in products)
        with torch.no_grad():
            model.blocks[1].norm1.weight.mul_(2)  # whose stand-in is made anew
