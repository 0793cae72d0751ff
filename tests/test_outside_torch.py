"""PyTorch's own tools that change, wrap, average, transform, trace or count modules: on ours they do what they do on any."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from convnexts import made
from helpers import TINY, TINY_GATED, relative_error, write_checkpoint
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dinov3_lite import DINOv3ViT, DINOv3ViTBackbone, optimize_for_inference, parameter_groups
from dinov3_lite.layers import Block


@pytest.fixture
def model(tmp_path) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 24, 40)


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


def saved_and_loaded(model: DINOv3ViT) -> DINOv3ViT:
    """What a state dict says: without anything where the config has no bias."""
    result = DINOv3ViT(model.config).eval()
    result.load_state_dict(model.state_dict())
    return result


def test_pruned_weights_and_biases(model, images):
    before = features(model, images)
    for block in model.blocks:
        for layer, name in ((block.attn.qkv, "weight"), (block.attn.qkv, "bias"), (block.mlp.fc1, "weight")):
            prune.l1_unstructured(layer, name, 0.3)
    expected = features(model, images)
    assert relative_error(expected, before) > 1e-3
    assert relative_error(features(optimize_for_inference(model), images), expected) < 2e-6
    for block in model.blocks:
        for layer, name in ((block.attn.qkv, "weight"), (block.attn.qkv, "bias"), (block.mlp.fc1, "weight")):
            prune.remove(layer, name)
    assert not any(block.attn.qkv.bias[32:64].any() for block in model.blocks)
    for pruned in (model, optimize_for_inference(model), saved_and_loaded(model)):
        assert relative_error(features(pruned, images), expected) < 2e-6


class Negated(nn.Module):
    """A parametrisation."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


def test_parametrised_weights_and_biases(model, images):
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.blocks[1].attn.qkv.bias.neg_()
    parametrize.register_parametrization(model.blocks[1].attn.qkv, "bias", Negated())
    for changed in (model, expected):
        parametrizations.weight_norm(changed.blocks[0].mlp.fc1)
        parametrizations.orthogonal(changed.blocks[2].attn.proj)
    for parametrised in (model, optimize_for_inference(model)):
        assert relative_error(features(parametrised, images), features(expected, images)) < 2e-6


def test_parameters_as_one_vector(model, images):
    """It gives each parameter other memory, which no version tells of: a key bias is not born of noise in it."""
    vector = parameters_to_vector(model.parameters()).detach()
    features(model, images)
    vector_to_parameters(vector + 0.1 * torch.randn_like(vector), model.parameters())
    expected = features(saved_and_loaded(model), images)
    assert relative_error(features(model, images), expected) < 2e-6
    assert relative_error(features(optimize_for_inference(model), images), expected) < 2e-6


@pytest.mark.parametrize("kind", ["vit", "gated", "convnext"])
@pytest.mark.parametrize("how", ["plain", "prepared", "averaged", "compiled", "sharded by one process"])
def test_a_state_dict_names_what_the_parameters_are(kind, how, tmp_path):
    """And PyTorch's own of it, which a wrapper's prefix is left out of."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = made() if kind == "convnext" else DINOv3ViT.from_pretrained(
        write_checkpoint(tmp_path, TINY if kind == "vit" else TINY_GATED)
    )  # fmt: skip
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert expected.keys() == (dict(model.named_parameters()) | dict(model.named_buffers())).keys()
    if how == "sharded by one process":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = {
            "plain": lambda: model,
            "prepared": lambda: optimize_for_inference(model),
            "averaged": lambda: AveragedModel(model, use_buffers=True),
            "compiled": lambda: torch.compile(model),
            "sharded by one process": lambda: fully_shard(model),
        }[how]()
        names = dict(wrapped.named_parameters()) | dict(wrapped.named_buffers())
        assert wrapped.state_dict().keys() == names.keys()
        given = get_model_state_dict(wrapped)
        assert len(given) == len(names) and {name.removeprefix("module.") for name in given} >= expected.keys()
        if how != "prepared":
            given = {name: torch.full_like(tensor, 0.0) for name, tensor in given.items()}
            set_model_state_dict(wrapped, given)
            assert not any(tensor.any() for tensor in model.state_dict().values()) or how == "averaged"
    finally:
        if how == "sharded by one process":
            dist.destroy_process_group()


def test_called_with_its_own_state_dict(model, images):
    state = model.state_dict()
    expected = features(model, images)
    assert torch.equal(
        functional_call(DINOv3ViT(TINY).eval(), state, (images,), strict=True).last_hidden_state, expected
    )
    with torch.no_grad():
        assert torch.equal(functional_call(model, state, (images,)).last_hidden_state, expected)
    state["blocks.1.attn.qkv.bias"] = state["blocks.1.attn.qkv.bias"] + 1.0  # of the caller: it is taken as it is
    shifted = functional_call(model, state, (images,)).last_hidden_state
    assert relative_error(shifted, expected) > 1e-3 and torch.equal(features(model, images), expected)


def test_gradients_of_its_own_state_dict(model, images):
    def loss(state: dict[str, Tensor]) -> Tensor:
        return functional_call(model, state, (images,)).cls_token.square().sum()

    gradients = grad(loss)(model.state_dict())
    model(images).cls_token.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name == "mask_token":
            assert parameter.grad is None and not gradients[name].any()
        else:
            assert relative_error(gradients[name], parameter.grad) < 1e-6, name
    assert gradients.keys() == model.state_dict().keys()
    assert not any(gradients[f"blocks.{i}.attn.qkv.bias"][32:64].any() for i in range(3))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's word of its own attention
def test_gradients_of_each_sample_by_torch_func(model, images):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).cls_token.square().sum()

    by_sample = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        model(image[None]).cls_token.square().sum().backward()
        for name in ("blocks.1.mlp.fc1.weight", "blocks.0.attn.qkv.bias", "patch_embed.proj.weight"):
            assert relative_error(by_sample[name][i], model.get_parameter(name).grad) < 1e-4, name
    assert not by_sample["blocks.0.attn.qkv.bias"][:, 32:64].any()


def test_derivatives_along_a_direction(model, images):
    """Also as the first call of a model: torch.func forbids to write to what it was not given."""
    model = model.double()
    model.attention = "eager"  # PyTorch's fused attention has no forward derivative
    x, direction, step = images.double(), torch.randn_like(images).double(), 1e-5
    _, found = jvp(lambda x: model(x).last_hidden_state, (x,), (direction,))
    sides = [features(model, x + sign * step * direction) for sign in (1, -1)]
    assert relative_error(found, (sides[0] - sides[1]) / (2 * step)) < 1e-6


def test_averages_written_into_a_state_dict(model, images):
    """As detectors keep theirs: in place, into what `state_dict` returns. A prepared model follows."""
    other = DINOv3ViT(TINY).state_dict()
    expected = copy.deepcopy(model)
    expected.load_state_dict({name: 0.25 * t + 0.75 * other[name] for name, t in model.state_dict().items()})
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.25), use_buffers=True)
    averaged.update_parameters(model)
    fast = optimize_for_inference(model)
    features(fast, images)
    for name, tensor in model.state_dict().items():
        tensor *= 0.25
        tensor += 0.75 * other[name]
    averaged.update_parameters(model)
    for found in (model, fast):
        assert relative_error(features(found, images), features(expected, images)) < 2e-6
    thirds = averaged.module.blocks[0].attn.qkv.bias.chunk(3)
    assert [bool(third.any()) for third in thirds] == [True, False, True]


def test_blocks_wrapped_for_activation_checkpointing(model, images):
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    expected, maps = features(model, images), model.attention_maps(images)
    wrapper.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    assert relative_error(features(model, images), expected) < 2e-6
    assert relative_error(model.attention_maps(images), maps) < 2e-6
    assert relative_error(features(optimize_for_inference(model), images), expected) < 2e-6
    assert model.num_heads == 2 and len({g["lr"] for g in parameter_groups(model, 1e-3, layer_decay=0.5)}) == 5
    model(images).cls_token.sum().backward()
    assert all(block.attn.qkv.weight.grad.any() for block in model.blocks)


@torch.no_grad()
def test_operations_are_counted_alike_whether_prepared_or_not(model, images):
    from torch.utils.flop_counter import FlopCounterMode

    model.attention = "eager"  # the fused attention of a CPU is not counted
    counts = []
    for counted in (model, optimize_for_inference(model)):
        with FlopCounterMode(display=False) as counter:
            counted(images)
        counts.append(counter.get_total_flops())
    tokens, C, F = 2 * (5 + 15), TINY.hidden_size, TINY.intermediate_size
    products = TINY.num_hidden_layers * tokens * (4 * C * C + 2 * C * F)
    attention = TINY.num_hidden_layers * tokens * 2 * 20 * C
    assert counts == [2 * (products + attention + 30 * 3 * 8 * 8 * C)] * 2


@pytest.mark.parametrize("projection", ["as it is", "made a plain nn.Linear"])
def test_dynamic_quantisation(projection, model, images):
    """It takes layers of the class nn.Linear itself: the other way is that of docs/tried.md."""
    expected = features(model, images)
    if projection != "as it is":
        for block in model.blocks:
            fused = block.attn.qkv
            block.attn.qkv = nn.Linear(fused.in_features, fused.out_features)
            block.attn.qkv.weight, block.attn.qkv.bias = fused.weight, fused.bias
        assert torch.equal(features(model, images), expected)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    left = [name for name, module in quantised.named_modules() if isinstance(module, nn.Linear)]
    assert left == ([f"blocks.{i}.attn.qkv" for i in range(3)] if projection == "as it is" else [])
    x, before = torch.randn(1, 20, 32), model.blocks[0].attn.qkv
    assert relative_error(quantised.blocks[0].attn.qkv(x), before(x)) < 0.02
    found = features(quantised, images)
    assert 0 < relative_error(found, expected) < (0.05 if left else 0.1)
    assert relative_error(features(optimize_for_inference(quantised), images), found) < 2e-6


class LastHiddenState(nn.Module):
    """A tensor alone, for tracing."""

    def __init__(self, model: DINOv3ViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).last_hidden_state


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and used all the same
def test_traced_and_saved(model, images):
    """With gradients recorded, as it is by default; PyTorch traces once more without them and compares the programs."""
    expected, smaller = features(model, images), images[..., :-8]
    for traceable in (model, optimize_for_inference(model)):
        traced = torch.jit.trace(LastHiddenState(traceable).eval(), (images,))
        torch.jit.save(traced, file := io.BytesIO())
        file.seek(0)
        loaded = torch.jit.load(file)
        assert relative_error(loaded(images).detach(), expected) < 2e-6
        assert relative_error(loaded(smaller).detach(), features(model, smaller)) < 2e-6


def test_pruned(model, images):
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, "weight", 0.5)
        prune.random_unstructured(block.mlp.fc1, "weight", 0.3)
    expected = model(images).last_hidden_state.detach()  # whose weights autograd computed: they are no leaves
    prepared = optimize_for_inference(model)
    assert relative_error(features(prepared, images), expected) < 2e-6
    for block in model.blocks:
        prune.remove(block.attn.qkv, "weight")
        prune.remove(block.mlp.fc1, "weight")
    assert torch.equal(features(model, images), expected)
    assert relative_error(features(optimize_for_inference(model), images), expected) < 2e-6


def test_sharded_by_the_older_fsdp(model, images):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    expected = features(model, images)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), use_orig_params=True
        )
        wrapped(images).last_hidden_state.sum().backward()
        assert relative_error(features(wrapped, images), expected) < 2e-6
    finally:
        dist.destroy_process_group()


class Detector(nn.Module):
    """A model deep inside another, as detectors hold one."""

    def __init__(self, model: DINOv3ViT) -> None:
        super().__init__()
        self.model = nn.Sequential(DINOv3ViTBackbone(model, out_indices=[1, 3]))
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.model(images).feature_maps[-1])


def test_inside_a_detector(model, images):
    detector = Detector(model).eval()
    with torch.no_grad():
        expected = detector(images)
        fast = optimize_for_inference(detector)
        loaded = Detector(DINOv3ViT(TINY))
        state = {name: t for name, t in detector.state_dict().items() if name in loaded.state_dict()}
        assert len(state) == len(detector.state_dict())
        loaded.load_state_dict(state, strict=False)
        for found in (fast, fast.train(), loaded.eval(), copy.deepcopy(detector).half().float()):
            assert relative_error(found(images), expected) < 2e-3
        assert relative_error(fast(images), expected) < 2e-6
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad = "blocks.0" not in name
    trained = {id(p) for group in parameter_groups(loaded, 1e-3) for p in group["params"]}
    assert trained == {id(p) for name, p in loaded.named_parameters() if "blocks.0" not in name}
