"""Folding and packing keep the numbers; two graphs of inductor's serve every size, in later processes from disk."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED, relative_error, run_python, write_checkpoint
from torch._dynamo.utils import counters

from dinov3_lite import DINOv3ViT, DINOv3ViTBackbone, ImageProcessor, optimize_for_inference
from dinov3_lite.attention import ATTENTION
from dinov3_lite.choices import Choices
from dinov3_lite.convnext import Downsample
from dinov3_lite.folding import fold, for_pixels
from dinov3_lite.image import SATELLITE_MEAN, SATELLITE_STD
from dinov3_lite.layers import PatchEmbed, QKVProjection
from dinov3_lite.prepacked import PackedByMKL, PackedByOneDNN, Plain, available
from dinov3_lite.projection import Projection
from dinov3_lite.stand_ins import stand_in

PROCESSOR = ImageProcessor(size=None, mean=SATELLITE_MEAN, std=SATELLITE_STD)
NO_BIAS = replace(TINY, proj_bias=False, mlp_bias=False)


def load(folder, config, dtype=torch.float32) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(folder, config), dtype=dtype)


def pixels(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


def normalised(images: torch.Tensor, processor: ImageProcessor = PROCESSOR) -> torch.Tensor:
    """As the processor does it, in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (processor.mean, processor.std))
    return (images.double() * processor.rescale_factor - mean) / std


def folded(model: DINOv3ViT, processor: ImageProcessor | None = None) -> DINOv3ViT:
    """Folded, and neither packed nor compiled: a processor's images are then pixels as floating-point numbers."""
    result = copy.deepcopy(model)
    result.blocks = torch.nn.ModuleList(map(fold, model.blocks))
    if processor is not None:
        result.patch_embed = for_pixels(model.patch_embed, processor)
    return result


@pytest.mark.parametrize("config", [TINY, TINY_GATED, NO_BIAS], ids=["mlp", "gated", "no biases"])
@torch.no_grad()
def test_folding_is_exact_in_real_arithmetic(config, tmp_path):
    model = load(tmp_path, config, torch.float64)
    p = config.patch_size
    images = pixels(2, 3 * p, 5 * p)
    expected = model(normalised(images), output_hidden_states=True)
    plain = folded(model)(normalised(images), output_hidden_states=True)
    from_pixels = folded(model, PROCESSOR)(images.double(), output_hidden_states=True)
    for actual in (plain, from_pixels):
        for state, truth in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert relative_error(state, truth) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_folding_rounds_no_weight_once_more(dtype, tmp_path):
    model = load(tmp_path, TINY, dtype)
    images = normalised(pixels(2, 24, 40))
    assert torch.equal(folded(model)(images).last_hidden_state, model(images).last_hidden_state)


def test_the_model_stays_as_it_is_and_shares_its_weights(tmp_path):
    model = load(tmp_path, TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = optimize_for_inference(model, PROCESSOR)
    fast(pixels(1, 16, 16))
    assert type(model) is DINOv3ViT and all(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert fast.state_dict()[name].data_ptr() == tensor.data_ptr(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_pixels_lose_nothing_against_normalised_images(dtype, tmp_path):
    """Folded into half-precision weights, the offset of 0 .. 255 would be rounded away."""
    model = load(tmp_path, replace(TINY, patch_size=16, hidden_size=128), dtype)
    images = pixels(2, 64, 96)
    truth = model.double()(normalised(images), output_hidden_states=True).hidden_states
    model.to(dtype)
    ours = folded(model, PROCESSOR)(images.float(), output_hidden_states=True).hidden_states
    plain = model(normalised(images).float(), output_hidden_states=True).hidden_states
    bound = 1.5 if dtype == torch.float32 else 1.1
    for actual, unfolded, state in zip(ours, plain, truth, strict=True):
        assert relative_error(actual, state) <= bound * relative_error(unfolded, state)


HALVES = [d for d in (torch.bfloat16, torch.float16) if available(torch.empty(0, dtype=d))]
onednn = pytest.mark.skipif(not available(torch.empty(0)), reason="oneDNN is not here")


LAYOUTS = [(PackedByOneDNN, d) for d in (torch.float32, *HALVES) if available(torch.empty(0, dtype=d))]
LAYOUTS += [(Plain, dtype) for dtype in (torch.float32, *HALVES)]
if torch.backends.mkl.is_available():
    LAYOUTS.append((PackedByMKL, torch.float32))


def packed_layers(model) -> list[str]:
    """What of a prepared model's blocks runs prepacked."""
    stand_ins = [model._stand_in(block) for block in model.blocks]
    return [
        f"{i}.{name}"
        for i, block in enumerate(stand_ins)
        for name, module in block.named_modules()
        if isinstance(module, Projection)
    ]


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS, ids=str)
@pytest.mark.parametrize("layer", ["linear", "linear, no bias", "qkv", "qkv, no biases"])
@torch.no_grad()
def test_packed_products_are_those_of_the_layer(layer, layout, dtype):
    config = TINY if layer == "qkv" else replace(TINY, query_bias=False, key_bias=False, value_bias=False)
    linear = QKVProjection(config) if "qkv" in layer else torch.nn.Linear(32, 48, bias=layer == "linear")
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter)
    linear.to(dtype)
    bias = None if linear.bias is None else linear.bias.detach()
    width = linear.in_features
    wide = torch.randn(3, 300, 2 * width, dtype=dtype)
    for x in (wide[0, :, :width], wide[..., width:], wide[:1, :1, :width], wide[0, :, width:]):
        for act in ("", "gelu", "silu"):
            packed = layout(linear.weight.detach(), bias, act, rows=x.shape[:-1].numel())
            plain, expected = linear(x), linear.double()(x.double())
            linear.to(dtype)
            if act:
                plain, expected = (getattr(torch.nn.functional, act)(y) for y in (plain, expected))
            assert packed(x).dtype == dtype and packed(x).shape == expected.shape
            assert relative_error(packed(x), expected) <= 1.1 * relative_error(plain, expected) + 2e-7
            assert torch.equal(packed.unpack(), linear.weight)


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS, ids=str)
@torch.no_grad()
def test_what_is_no_number_comes_back_as_it_was(layout, dtype):
    """And spoils none of the numbers beside it; of numbers whose sum is too large each comes back."""
    weight = torch.randn(48, 32).to(dtype)
    weight[3, 4], weight[5, 6], weight[7, 8:10], weight[9] = torch.inf, torch.nan, -torch.inf, torch.finfo(dtype).max
    for rows in (7, 100):
        torch.testing.assert_close(layout(weight, None, rows=rows).unpack(), weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dynamic", [True, False])
@torch.no_grad()
def test_no_rows_give_no_rows(dynamic):
    """MKL's packing of a layer of this size, for no rows, ends the process."""
    packed = Projection(torch.nn.Linear(768, 2304), Choices(), dynamic)
    for rows in (0, 3, 0):
        assert packed(torch.randn(rows, 768)).shape == (rows, 2304)


@onednn
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("config", [TINY, TINY_GATED, NO_BIAS], ids=["mlp", "gated", "no biases"])
def test_packed_weights_serve_every_batch_and_size(config, dynamic, tmp_path):
    model = load(tmp_path, config)
    counters.clear()
    fast = optimize_for_inference(model, PROCESSOR, backend="prepacked", dynamic=dynamic)
    assert len(packed_layers(fast)) == 4 * config.num_hidden_layers
    for batch, h, w in [(1, 4, 4), (1, 1, 9), (4, 4, 2), (16, 7, 8)]:
        images = pixels(batch, h * model.patch_size, w * model.patch_size)
        output = fast(images)
        with torch.no_grad():
            truth = model(normalised(images).float())
        assert not output.last_hidden_state.requires_grad and output.grid == (h, w)
        assert relative_error(output.last_hidden_state, truth.last_hidden_state) < 2e-6
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("config", [TINY, TINY_GATED, NO_BIAS], ids=["mlp", "gated", "no biases"])
@torch.no_grad()
def test_the_prefix_alone_is_that_of_all_tokens(config, dynamic, tmp_path):
    model = load(tmp_path, config)
    images = torch.randn(3, 3, 4 * model.patch_size, 9 * model.patch_size)
    tokens, truth = model.embed(images)[0], copy.deepcopy(model).double()
    exact = truth.run_blocks(truth.embed(images)[0], range(model.depth))
    fast = optimize_for_inference(model, dynamic=dynamic)
    last = model.depth - 1
    for taps in ([last], [0], [0, last], [last - 1, last]):
        for tap, prefix, of_all in zip(
            taps, fast.run_prefix(tokens, taps), model.run_blocks(tokens, taps), strict=True
        ):
            expected = exact[tap][:, : model.num_prefix_tokens]
            assert relative_error(prefix, expected) <= 1.5 * relative_error(of_all, exact[tap]), (taps, tap)
    full = fast.run_blocks(tokens, [last])[0]  # after which weights are packed for all rows again
    assert relative_error(full, exact[last]) < 2e-6
    seen = []
    fast.blocks[last].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    fast.run_prefix(tokens, [last])
    assert seen == [tokens.x.shape[1]]  # an observed block runs whole


@torch.no_grad()
def test_images_of_as_many_patches_stay_sequences_of_their_own(tmp_path):
    """Sides that differ, and numbers of tokens that do not: a pack of equal sequences is no batch of longer ones."""
    model = load(tmp_path, TINY)
    images = [torch.randn(3, *sides) for sides in ((16, 32), (32, 16), (8, 64))]
    for out, image in zip(optimize_for_inference(model).forward_packed(images), images, strict=True):
        assert relative_error(out.last_hidden_state, model(image[None]).last_hidden_state) < 2e-6


@onednn
@torch.no_grad()
def test_the_prefix_alone_is_attended_by_the_function_that_was_chosen(tmp_path, monkeypatch):
    model = load(tmp_path, TINY)
    tokens, _ = model.embed(torch.randn(1, 3, 16, 24))
    fast, calls, eager = optimize_for_inference(model), [], ATTENTION["eager"]
    monkeypatch.setitem(ATTENTION, "eager", lambda *qkv: calls.append("eager") or eager(*qkv))
    fast.attention = "eager"
    (prefix,) = fast.run_prefix(tokens, [model.depth - 1])
    assert len(calls) == model.depth
    assert relative_error(prefix, model.run_prefix(tokens, [model.depth - 1])[0]) < 2e-6
    fast.attention = "flash"
    with pytest.raises(ValueError, match="attention is 'flash': expected one of auto, sdpa, eager, triton"):
        fast.run_prefix(tokens, [model.depth - 1])


@pytest.mark.parametrize("dynamic", [True, False])
@torch.no_grad()
def test_no_images_give_no_features(dynamic, tmp_path):
    """Nothing is packed for them, nor kept from being packed."""
    model = load(tmp_path, TINY)
    fast = optimize_for_inference(model, dynamic=dynamic)
    for images in (torch.randn(0, 3, 16, 24), torch.randn(2, 3, 16, 24), torch.randn(0, 3, 16, 24)):
        out, expected = fast(images), model(images)
        assert out.last_hidden_state.shape == expected.last_hidden_state.shape and out.grid == (2, 3)
        assert not len(images) or relative_error(out.last_hidden_state, expected.last_hidden_state) < 2e-6


@pytest.mark.parametrize(
    "backend, dtype", [("auto", torch.float32), ("inductor", torch.float32), ("inductor", torch.bfloat16)]
)
@torch.no_grad()
def test_the_residual_stream_keeps_the_dtype_that_the_model_was_told(tmp_path, backend, dtype):
    model, images = load(tmp_path, TINY).to(dtype), torch.randn(2, 3, 16, 24).to(dtype)
    truth = copy.deepcopy(model).double()(images, output_hidden_states=True).hidden_states
    model.residual_dtype = torch.bfloat16
    taps = range(model.depth)
    fast = optimize_for_inference(model, backend=backend)
    plain, fast = (m.run_blocks(m.embed(images)[0], taps) for m in (model, fast))
    for ours, eager, state in zip(fast, plain, truth[1:], strict=True):
        assert ours.dtype == eager.dtype == torch.bfloat16
        assert relative_error(ours, state) <= 1.1 * relative_error(eager, state)


@torch.no_grad()
def test_pixels_are_normalised_for_whoever_looks_at_the_first_layer(tmp_path):
    """A hook on it sees images, as in the model; the features stay what they are."""
    model, images, seen = load(tmp_path, TINY), pixels(2, 16, 24), []
    fast = optimize_for_inference(model, PROCESSOR)
    expected = fast(images).last_hidden_state
    fast.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert relative_error(fast(images).last_hidden_state, expected) < 2e-6
    assert relative_error(seen[0], normalised(images)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 3}, {"padding": 1}, {"dilation": 2}], ids=str)
@torch.no_grad()
def test_a_first_layer_that_pixels_do_not_fit_stays_as_it_is(options):
    """Folding holds for patches of pixels alone: not of padding, of some channels, or of pixels that lie apart."""
    embed = PatchEmbed(replace(TINY, hidden_size=48))
    embed.proj = torch.nn.Conv2d(3, 48, 8, stride=8, **options)
    embed, images = embed.double(), pixels(2, 33, 47)
    made = for_pixels(embed, PROCESSOR)
    assert (made is embed) == (not {"groups", "padding", "dilation"}.isdisjoint(options))
    given = normalised(images) if made is embed else images.double()
    assert relative_error(made(given), embed(normalised(images))) < 1e-13


CONVOLUTIONS = [{}, {"bias": False}, {"kernel_size": (2, 3), "stride": (2, 3)}]
"""Of patches of their own pixels: all others stay convolutions."""
OTHERS = [{"groups": 2}, {"padding": 1}, {"padding": "valid"}, {"dilation": 2}, {"stride": 1}, {"kernel_size": 3}]


@pytest.mark.parametrize("options", CONVOLUTIONS + OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_first_layer_is_a_product_only_where_it_is_one_of_patches(options, dtype):
    """Of images in any dtype, and unrounded; sides that are no multiple of a patch's lose the rest."""
    embed = PatchEmbed(replace(TINY, hidden_size=48))
    embed.proj = torch.nn.Conv2d(4, 48, **{"kernel_size": 2, "stride": 2, **options})
    made = stand_in(embed.to(dtype), Choices(), dynamic=True)
    assert (made is embed) == (options in OTHERS)
    truth = copy.deepcopy(embed).double()
    bound = 4e-3 if made is embed and dtype == torch.bfloat16 else 1e-6
    for sides in ((6, 12), (7, 13)):
        images = torch.randn(2, 4, *sides, dtype=dtype)
        for given in (images, images.float(), images.contiguous(memory_format=torch.channels_last)):
            out = made(given if made is not embed else given.to(dtype))
            assert out.dtype == (dtype if made is embed else torch.float32)
            assert relative_error(out, truth(images.double())) < bound


@pytest.mark.parametrize("processor", [None, PROCESSOR], ids=["images", "pixels"])
@torch.no_grad()
def test_a_first_layer_given_other_data_is_followed(processor):
    """As by `.to` of a part, or by torch's `vector_to_parameters`, which PyTorch counts as no write."""
    fast = optimize_for_inference(DINOv3ViT(TINY).eval(), processor)
    images = torch.randn(1, 3, 16, 24) if processor is None else pixels(1, 16, 24)
    for change in (
        lambda layer: setattr(layer.weight, "data", layer.weight * 2),
        lambda layer: setattr(layer.bias, "data", layer.bias + 1),
        lambda layer: layer.to(torch.bfloat16),
    ):
        fast(images)
        change(fast.patch_embed.proj)
        expected = copy.deepcopy(fast)  # prepared anew
        assert torch.equal(fast.embed_patches(images), expected.embed_patches(images))


def test_a_first_layer_takes_no_gradient_and_no_image_of_another_device():
    fast = optimize_for_inference(DINOv3ViT(TINY).eval())
    assert not fast.embed_patches(torch.randn(1, 3, 16, 24, requires_grad=True)).requires_grad
    with pytest.raises(RuntimeError, match="(?i)device"):
        fast(torch.zeros(1, 3, 16, 24, device="meta"))


@torch.no_grad()
def test_a_first_layer_of_pixels_writes_to_no_image():
    embed = for_pixels(PatchEmbed(replace(TINY, patch_size=2)), PROCESSOR)
    made = stand_in(embed, Choices(), dynamic=True)
    for images in (pixels(2, 6, 12), pixels(2, 6, 12).float(), pixels(2, 2, 2).float()):
        before = images.clone()
        assert made is not embed and relative_error(made(images), embed(images)) < 2e-6
        assert torch.equal(images, before)


@torch.no_grad()
def test_a_stride_of_one_number_and_another_layer_are_not_in_the_way():
    model = DINOv3ViT(TINY).eval()
    model.patch_embed.proj.stride = TINY.patch_size
    images = torch.randn(1, 3, 16, 24)
    assert relative_error(optimize_for_inference(model)(images)[0], model(images)[0]) < 2e-6
    model.patch_embed.proj = torch.nn.Linear(24, 32)
    for given, processor in ((images, None), (pixels(1, 16, 24), PROCESSOR)):
        with pytest.raises(ValueError, match="patch_embed gives patches of shape"):
            optimize_for_inference(model, processor)(given)


@pytest.mark.parametrize("options", CONVOLUTIONS + OTHERS, ids=str)
@torch.no_grad()
def test_a_step_down_is_a_product_only_where_it_is_one_of_patches(options):
    """Sides that are odd lose their last row and column, as in any convolution."""
    step = Downsample(8, 16, eps=0.1)
    step.conv = torch.nn.Conv2d(8, 16, **{"kernel_size": 2, "stride": 2, **options})
    for parameter in step.parameters():
        torch.nn.init.normal_(parameter)
    made = stand_in(step, Choices(), dynamic=True)
    assert (made is step) == (options in OTHERS)
    for sides in ((6, 12), (7, 13)):
        x = torch.randn(2, *sides, 8)
        assert relative_error(made(x), step(x)) < 2e-6


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@torch.no_grad()
def test_outputs_are_the_same_bits_whatever_came_before(dynamic, dtype, tmp_path):
    model = load(tmp_path, TINY, dtype)
    fast = optimize_for_inference(model, dynamic=dynamic)
    images, others = (torch.randn(1, 3, 8, side * model.patch_size, dtype=dtype) for side in (8, 9))
    first = fast(images).last_hidden_state
    fast(others)
    assert torch.equal(fast(images).last_hidden_state, first)


@onednn
def test_weights_are_packed_where_onednn_takes_the_model(tmp_path):
    model = load(tmp_path, TINY)
    assert packed_layers(optimize_for_inference(model))
    assert not packed_layers(optimize_for_inference(model, backend="inductor"))
    assert not packed_layers(optimize_for_inference(model.double()))
    with pytest.raises(
        ValueError, match=r"backend is 'prepacked' and the model is torch.float64 on cpu.*use 'inductor'"
    ):
        optimize_for_inference(model, backend="prepacked")
    with pytest.raises(ValueError, match=r"backend is 'mkl': expected one of auto, prepacked, inductor"):
        optimize_for_inference(model, backend="mkl")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    torch._dynamo.reset()
    counters.clear()
    model = load(tmp_path_factory.mktemp("gated"), TINY_GATED)
    return model, optimize_for_inference(model, PROCESSOR, backend="inductor")


def test_two_graphs_serve_every_batch_and_size(compiled):
    model, fast = compiled
    p = model.patch_size
    assert fast.warm_up(1, 4 * p, 4 * p) > 0
    for batch, h, w in [(1, 4, 4), (1, 3, 9), (2, 4, 4), (4, 4, 2), (3, 2, 2), (1, 17, 5), (16, 14, 16), (6, 6, 6)]:
        images = pixels(batch, h * p, w * p)
        output = fast(images)
        truth = model(normalised(images).float())
        assert output.grid == (h, w)
        assert relative_error(output.last_hidden_state, truth.last_hidden_state) < 2e-6
    assert counters["stats"]["unique_graphs"] == 2


def test_a_head_can_be_trained_on_the_outputs(compiled):
    model, fast = compiled
    head = torch.nn.Linear(model.embed_dim, 2)
    head(fast(pixels(1, 4 * model.patch_size, 4 * model.patch_size)).cls_token).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_images_must_be_pixels_where_a_processor_was_folded_in(compiled):
    _, fast = compiled
    with pytest.raises(ValueError, match=r"pixel_values is torch.float32: expected torch.uint8 pixels"):
        fast(torch.zeros(1, 3, 64, 64))


def test_images_are_checked_before_anything_is_compiled(compiled):
    model, fast = compiled
    with pytest.raises(ValueError) as ours:
        fast(pixels(1, 4 * model.patch_size, 4 * model.patch_size + 1))
    with pytest.raises(ValueError) as expected:
        model(torch.zeros(1, 3, 4 * model.patch_size, 4 * model.patch_size + 1))
    assert str(ours.value) == str(expected.value)


@pytest.mark.parametrize("backend", [pytest.param("prepacked", marks=onednn), "inductor"])
def test_a_module_around_the_model_is_taken_whole(backend, tmp_path):
    torch._dynamo.reset()
    model = load(tmp_path, TINY)
    backbone = torch.nn.Sequential(DINOv3ViTBackbone(model, out_indices=[0, 1])).eval()
    images = torch.randn(1, 3, 2 * model.patch_size, 3 * model.patch_size)
    actual = optimize_for_inference(backbone, backend=backend, dynamic=False)(images)
    with torch.no_grad():
        expected = backbone(images)
    for a, b in zip(actual.feature_maps, expected.feature_maps, strict=True):
        assert relative_error(a, b) < 2e-6


def test_what_can_not_be_compiled_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model is a Linear without a DINOv3ViT inside"):
        optimize_for_inference(torch.nn.Linear(2, 2))
    model = load(tmp_path, TINY)
    four = ImageProcessor(size=None, mean=[0.5] * 4, std=[0.5] * 4)
    with pytest.raises(ValueError, match="the processor has 4 means and 4 stds and the model takes 3 channels"):
        optimize_for_inference(model, four)
    around = torch.nn.Sequential(model).eval()
    model.train()
    for training in (model, around):  # the one around it is not
        with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\) first"):
            optimize_for_inference(training)


def test_a_second_process_takes_the_graph_from_disk(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", replace(TINY, num_hidden_layers=1))
    code = f"""
import dinov3_lite
from torch._dynamo.utils import counters
fast = dinov3_lite.optimize_for_inference(dinov3_lite.DINOv3ViT.from_pretrained({str(folder)!r}), backend="inductor", dynamic=False)
fast.warm_up(1, {4 * TINY.patch_size}, {5 * TINY.patch_size})
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    hits = []
    for _ in range(2):
        done = run_python(code, env=env)
        assert done.returncode == 0, done.stderr
        hits.append(int(done.stdout))
    assert hits[0] == 0 and hits[1] > 0
