"""The model is a module like any other: hooks see what eager shows on every path, and surgery works or says why not."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from helpers import TINY, TINY_GATED, relative_error, write_checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_lite import DINOv3ViT, DINOv3ViTBackbone, build_dinov3_encoder, optimize_for_inference
from dinov3_lite.layers import DropPath, untouched
from dinov3_lite.prepacked import available

CONFIGS = {"mlp": TINY, "gated": TINY_GATED}
PATHS = ["eager", "inductor"] + ["prepacked"] * available(torch.empty(0)) + ["triton"] * bool(find_spec("triton"))
UNCOMPILED = [path for path in PATHS if path in ("eager", "prepacked")]


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, CONFIGS[request.param]))


@pytest.fixture(params=CONFIGS)
def shallow(request, tmp_path) -> DINOv3ViT:
    """Of two blocks, and so of the fewest programs for triton's interpreter: what is watched lies in the second."""
    config = replace(CONFIGS[request.param], num_hidden_layers=2)
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, config))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(1, 3, 16, 24)


@pytest.fixture
def strip() -> torch.Tensor:
    """The fewest patches that attend to each other."""
    return torch.randn(1, 3, 8, 16)


def on_path(model: DINOv3ViT, path: str) -> DINOv3ViT:
    """The model that runs by this path."""
    if path in ("prepacked", "inductor"):
        return optimize_for_inference(model, backend=path)
    model = copy.deepcopy(model)
    model.attention = "triton" if path == "triton" else "sdpa"
    return model


def inside_blocks(model: DINOv3ViT, path: str) -> list[str]:
    """The modules of a block; under our kernels, whose interpreter is slow, those that they go past and w12."""
    names = [f"blocks.1.{name}".rstrip(".") for name, _ in model.blocks[1].named_modules()]
    return [name for name in names if path != "triton" or name.endswith(("1", "ls1", "norm2", "mlp", "w12"))]


@pytest.mark.parametrize("path", PATHS)
def test_hooks_see_what_plain_execution_shows(shallow, strip, path):
    """Each module's, put on before or after preparation; what they kept is not overwritten later."""
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(module: nn.Module, name: str):
        return module.register_forward_hook(lambda _, args, out: seen.setdefault(name, []).append(out))

    names = inside_blocks(shallow, path)
    for name in names:
        handle = watch(shallow.get_submodule(name), name)
        shallow(strip)  # with gradients: nothing is in place
        before = on_path(shallow, path)
        handle.remove()
        after = on_path(shallow, path)
        handle = watch(after.get_submodule(name), name)
        with torch.no_grad():
            before(strip)
            after(strip)
        calls = len(seen[name]) // 3  # drop_path has two in a forward
        assert len(seen[name]) == 3 * calls > 0, name
        for i, output in enumerate(seen[name]):
            assert relative_error(output, seen[name][i % calls]) < 2e-6, name


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_hooks_that_change_something_change_it(shallow, strip, path):
    for name in inside_blocks(shallow, path):
        changed = copy.deepcopy(shallow)
        changed.get_submodule(name).register_forward_hook(lambda _, args, out: 0.5 * out)
        expected = changed(strip).last_hidden_state
        assert relative_error(on_path(changed, path)(strip).last_hidden_state, expected) < 2e-6, name
        after = on_path(shallow, path)
        after.get_submodule(name).register_forward_pre_hook(lambda _, args: (0.5 * args[0], *args[1:]))
        changed = copy.deepcopy(shallow)
        changed.get_submodule(name).register_forward_pre_hook(lambda _, args: (0.5 * args[0], *args[1:]))
        assert relative_error(after(strip).last_hidden_state, changed(strip).last_hidden_state) < 2e-6, name


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_observers_of_everything_see_everything(shallow, strip, path):
    prepared = on_path(shallow, path)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        prepared(strip)
    finally:
        handle.remove()
    for kind in {type(module) for module in shallow.blocks.modules()} - {nn.ModuleList}:
        expected = sum(type(module) is kind for module in shallow.modules())
        assert seen.count(kind) == (2 * expected if kind is DropPath else expected), kind

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        prepared(strip)
    products = ("aten.addmm.default", "aten.mm.default")
    assert sum(name in products for name in watch.names) == 4 * shallow.depth
    assert not any(name.startswith("mkl") or name.endswith(("gelu_.default", "silu_.default")) for name in watch.names)


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_another_forward_of_a_class_is_run(shallow, strip, path, monkeypatch):
    """As libraries and notebooks patch them, here after the model has run."""
    fast = on_path(shallow, path)
    fast(strip)
    for cls in {type(shallow.get_submodule(name)) for name in inside_blocks(shallow, path)}:
        forward = cls.forward
        with monkeypatch.context() as patched:
            patched.setattr(cls, "forward", lambda self, *args, forward=forward: 1.5 * forward(self, *args))
            expected = shallow(strip).last_hidden_state
            assert relative_error(fast(strip).last_hidden_state, expected) < 1e-5, cls


def test_what_is_ours_plain_and_unobserved(monkeypatch):
    block = DINOv3ViT(TINY).blocks[0]
    assert untouched(*block.modules())
    with torch.device("cpu"):  # a mode that watches nothing
        assert untouched(*block.modules())
    for change in (
        lambda b: b.mlp.fc1.register_forward_hook(print),
        lambda b: b.mlp.fc1.register_forward_pre_hook(print),
        lambda b: b.mlp.fc1.register_full_backward_hook(print),
        lambda b: b.mlp.fc1.register_full_backward_pre_hook(print),
        lambda b: setattr(b.mlp, "fc2", nn.Sequential(b.mlp.fc2)),
        lambda b: setattr(b.mlp.fc2, "forward", print),
        lambda b: nn.utils.parametrizations.weight_norm(b.attn.proj),
        lambda b: setattr(b, "norm2", nn.LayerNorm(32)),
        lambda b: setattr(b, "ls1", nn.Identity()),
        lambda b: setattr(b.attn.proj, "weight", nn.Parameter(Subclass(b.attn.proj.weight.detach()))),
    ):
        touched = copy.deepcopy(block)
        change(touched)
        assert not untouched(*touched.modules())
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: print(self) or self._call_impl(*args))  # a tracer's
    assert not untouched(*block.modules())


def test_who_watches_all_modules_or_functions_watches_these():
    block = DINOv3ViT(TINY).blocks[0]
    for register in (
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ):
        handle = register(lambda *_: None)
        try:
            assert not untouched(*block.modules(), past_modes=False)
        finally:
            handle.remove()
        assert untouched(*block.modules())
    for watch in (TorchFunctionMode(), TorchDispatchMode()):
        with watch:
            assert not untouched(*block.modules()) and untouched(*block.modules(), past_modes=False)


class Subclass(torch.Tensor):
    pass


class Halved(nn.Module):
    """A replaced LayerScale."""

    def __init__(self, scale: nn.Module) -> None:
        super().__init__()
        self.gamma = scale.gamma

    def forward(self, x, branch):
        return x + 0.5 * branch


class Wrapped(nn.Module):
    """Any wrapper, as LoRA's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args):
        return -self.base(*args)


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_replaced_parts_of_a_block_are_run(shallow, strip, path):
    """Before or after preparation."""
    for name in inside_blocks(shallow, path)[1:]:
        parent, _, child = name.rpartition(".")

        def change(model, parent=parent, child=child):
            module = model.get_submodule(parent)
            replacement = Halved if child in ("ls1", "ls2") else Wrapped
            setattr(module, child, replacement(getattr(module, child)))

        expected = copy.deepcopy(shallow)
        change(expected)
        truth = expected(strip).last_hidden_state
        assert relative_error(truth, shallow(strip).last_hidden_state) > 1e-3, name
        after = on_path(shallow, path)
        change(after)
        for changed in (on_path(expected, path), after):
            assert relative_error(changed(strip).last_hidden_state, truth) < 2e-6, name


@pytest.mark.parametrize("path", UNCOMPILED)
@torch.no_grad()
def test_blocks_may_be_dropped_appended_replaced_and_shared(model, images, path):
    hidden = model(images, output_hidden_states=True).hidden_states

    def changed(change) -> DINOv3ViT:
        result = on_path(model, path)
        change(result)
        return result

    shorter = changed(lambda m: setattr(m, "blocks", m.blocks[:2]))
    assert shorter.depth == shorter.n_blocks == 2 and len(shorter.feature_info) == 2
    torch.testing.assert_close(shorter(images).last_hidden_state, model.norm(hidden[2]), rtol=1e-4, atol=1e-5)
    (last,) = shorter.get_intermediate_layers(images, norm=False)
    torch.testing.assert_close(last, hidden[2][:, model.num_prefix_tokens :], rtol=1e-4, atol=1e-5)

    longer = changed(lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])))
    tokens, _ = model.embed(images)
    expected = model.blocks[0](hidden[3], tokens.cos, tokens.sin, lambda *qkv: torch_attention(*qkv))
    assert longer.depth == 4 and len(longer(images, output_hidden_states=True).hidden_states) == 5
    torch.testing.assert_close(longer(images).last_hidden_state, model.norm(expected), rtol=1e-4, atol=1e-5)

    skipped = changed(lambda m: m.blocks.__setitem__(2, nn.Identity()))
    torch.testing.assert_close(skipped(images).last_hidden_state, model.norm(hidden[2]), rtol=1e-4, atol=1e-5)

    shared = changed(lambda m: m.blocks.__setitem__(2, m.blocks[1]))
    expected = model.blocks[1](hidden[2], tokens.cos, tokens.sin, lambda *qkv: torch_attention(*qkv))
    torch.testing.assert_close(shared(images).last_hidden_state, model.norm(expected), rtol=1e-4, atol=1e-5)

    with pytest.raises(ValueError, match="the model has no blocks left: expected at least one in model.blocks"):
        changed(lambda m: setattr(m, "blocks", m.blocks[:0]))(images)


def torch_attention(q, k, v, cos, sin):
    from dinov3_lite.attention import sdpa_attention

    return sdpa_attention(q, k, v, cos, sin)


@pytest.mark.parametrize("path", UNCOMPILED)
@torch.no_grad()
def test_other_norms_projections_and_registers(model, path):
    prepared = on_path(model, path)
    prepared.norm = nn.Identity()
    images = torch.randn(1, 3, 16, 32)
    out = prepared(images, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1]) and prepared.dtype == torch.float32

    prepared.patch_embed.proj = nn.Conv2d(5, 32, 4, 4)
    assert (prepared.num_channels, prepared.patch_size) == (5, 4)
    assert prepared(torch.randn(1, 5, 16, 32)).grid == (4, 8)
    with pytest.raises(ValueError, match=r"expected \(batch, 5, height, width\)"):
        prepared(images)
    prepared.patch_embed.proj = nn.Conv2d(3, 32, 8, 4)
    with pytest.raises(ValueError, match=r"patch_embed gives patches of shape \(1, 21, 32\): expected \(batch, 8, C\)"):
        prepared(images)
    prepared.patch_embed.proj = nn.Conv2d(3, 32, 8, 8, bias=False)

    for registers in (0, 8):
        prepared.register_tokens = nn.Parameter(torch.randn(1, registers, 32))
        out = prepared(images)
        assert out.register_tokens.shape == (1, registers, 32) and out.feature_map.shape == (1, 32, 2, 4)
        assert prepared.forward_features(images)["x_storage_tokens"].shape == (1, registers, 32)


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_norms_without_a_bias(shallow, strip, path):
    """As nn.LayerNorm has them with bias=False; one of another dtype than its input, too."""
    for block in shallow.blocks:
        block.norm2.bias.zero_()
    expected = shallow(strip).last_hidden_state
    half = copy.deepcopy(shallow).bfloat16()(strip).last_hidden_state
    for block in shallow.blocks:
        block.norm2.bias = None
    assert relative_error(on_path(shallow, path)(strip).last_hidden_state, expected) < 2e-6
    assert torch.equal(shallow.bfloat16()(strip).last_hidden_state, half)


@pytest.mark.parametrize("path", UNCOMPILED)
@torch.no_grad()
def test_parts_of_another_dtype(model, images, path):
    expected = copy.deepcopy(model).double()(images).last_hidden_state
    model.blocks[1].double()
    assert relative_error(on_path(model, path)(images).last_hidden_state, expected) < 2e-6
    with pytest.raises(ValueError, match="block 2 is of the class Identity, which has no attention: name another"):
        model.blocks[2] = nn.Identity()
        on_path(model, path).attention_maps(images, 2)


def test_settings_made_anew_are_followed(model, images, monkeypatch):
    """By a model that ran, also where it was compiled (here by what compiles nothing)."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for backend in ["inductor"] + ["prepacked"] * ("prepacked" in PATHS):
        fast, changed = optimize_for_inference(model, backend=backend), copy.deepcopy(model)
        for name, setting, value in (
            ("blocks.1.norm1", "eps", 0.3),
            ("blocks.0.mlp", "act", "silu" if model.config == TINY else "gelu"),
            ("norm", "eps", 0.1),
        ):
            before = fast(images).last_hidden_state
            for each in (fast, changed):
                setattr(each.get_submodule(name), setting, value)
            with torch.no_grad():
                expected = changed(images).last_hidden_state
            assert relative_error(before, expected) > 1e-3, name
            assert relative_error(fast(images).last_hidden_state, expected) < 2e-6, name


def test_weights_written_to_are_followed(model, images):
    """A prepared model shares them, with an optimizer's steps, a state dict loaded, and replaced parameters."""
    fast = optimize_for_inference(model)
    fast(images)
    other = DINOv3ViT(model.config).state_dict()
    with torch.no_grad():
        for change in (
            lambda: model.blocks[1].mlp.get_submodule("fc2" if model.config == TINY else "w3").weight.mul_(1.5),
            lambda: model.blocks[0].ls1.gamma.add_(0.25),
            lambda: model.blocks[2].attn.qkv.bias.add_(0.25),
            lambda: model.rope_embed.periods.mul_(1.5),
            lambda: model.load_state_dict(other),
        ):
            before = fast(images).last_hidden_state
            change()
            assert relative_error(before, model(images).last_hidden_state) > 1e-4
            assert relative_error(fast(images).last_hidden_state, model(images).last_hidden_state) < 2e-6


def test_a_prepared_model_moves_copies_and_pickles(model, images):
    fast = optimize_for_inference(model)
    expected = fast(images).last_hidden_state
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert isinstance(twin, DINOv3ViT) and type(twin) is type(fast)
        assert torch.equal(twin(images).last_hidden_state, expected)
    wrapped = optimize_for_inference(nn.Sequential(DINOv3ViTBackbone(model)).eval())
    maps = pickle.loads(pickle.dumps(copy.deepcopy(wrapped)))(images).feature_maps
    assert torch.equal(maps[0], wrapped(images).feature_maps[0])
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(fast))
    assert torch.equal(averaged(images).last_hidden_state, expected)
    double = copy.deepcopy(fast).double()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(images).last_hidden_state
    assert double._graphs is not None  # oneDNN has no float64: compiled, at the first call
    double._graphs.made = dict.fromkeys([])
    assert relative_error(double.float()(images).last_hidden_state, truth) < 2e-6
    assert model.dtype == torch.float32


def test_a_prepared_model_stays_in_evaluation_mode_and_does_not_train(model, images):
    fast = optimize_for_inference(model)
    net = nn.Sequential(fast, nn.Dropout()).train()
    assert net.training and net[1].training and not any(m.training for m in fast.modules())
    assert torch.equal(fast(images).last_hidden_state, fast(images).last_hidden_state)
    for output in (fast.attention_maps(images), *fast.get_intermediate_layers(images), fast(images).cls_token):
        assert not output.requires_grad
    with pytest.raises(ValueError, match="a prepared model does not train: train the model it was made of"):
        fast.requires_grad_(True)
    fast.requires_grad_(False)
    with pytest.raises(ValueError, match="batch is 0: expected a whole number from 1 up"):
        fast.warm_up(0, 16, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_prepared_model_under_autocast_is_the_model_under_autocast(model, images, dtype):
    """Bit for bit where nothing is compiled; a graph rounds elsewhere, and errs no more."""
    fast, truth = optimize_for_inference(model), copy.deepcopy(model).double()(images).last_hidden_state
    with torch.autocast("cpu", dtype):
        ours, expected = fast(images).last_hidden_state, model(images).last_hidden_state
        maps = fast.attention_maps(images)
    if available(torch.empty(0)):
        assert torch.equal(ours, expected)
    assert relative_error(ours, truth) <= 1.1 * relative_error(expected, truth)
    assert maps.dtype == torch.float32 and relative_error(maps, model.attention_maps(images)) < 0.1


@torch.no_grad()
def test_who_takes_a_model_takes_a_prepared_one(tmp_path, images):
    folder = write_checkpoint(tmp_path, replace(TINY, num_hidden_layers=4))
    encoder = build_dinov3_encoder(pretrained_path=folder)
    expected = encoder(images)
    fast = optimize_for_inference(encoder)
    inside = type(encoder)(optimize_for_inference(encoder.backbone))
    for maps in (fast(images), inside(images)):
        for actual, truth in zip(maps, expected, strict=True):
            assert relative_error(actual, truth) < 2e-6
    assert fast.strides == encoder.strides and not fast.train().training
