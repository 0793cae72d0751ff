"""Whatever the caller has set for the process or the moment, values are the same: default dtypes and devices, tracers,
function transforms, modes that watch; and models without numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from convnexts import made
from helpers import TINY, relative_error, write_checkpoint
from torch import nn

from dinov3_lite import DINOv3ViT, ImageProcessor, optimize_for_inference, prepacked, sliding_window_features
from dinov3_lite.tasks.loop import Normalise

PROCESSOR = ImageProcessor(size=None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: torch.device("meta"),  # where a tensor that lands there has no values
    "inference mode": torch.inference_mode,
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


@pytest.fixture(params=["vit", "convnext"])
def model(request, tmp_path) -> nn.Module:
    return made() if request.param == "convnext" else DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)


@torch.no_grad()
def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).last_hidden_state


def test_what_the_caller_set_changes_no_picture(setting):
    picture = (np.arange(50 * 40 * 3) % 251).astype(np.uint8).reshape(50, 40, 3)
    processor = ImageProcessor(size=(32, 48))
    expected = processor(picture)["pixel_values"]
    scaled = Normalise(processor.mean, processor.std)(torch.from_numpy(picture).permute(2, 0, 1))
    with setting():
        found = processor(picture)["pixel_values"]
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    if setting != SETTINGS["another device"]:  # of which a module that is made there is
        with setting():
            assert torch.equal(
                Normalise(processor.mean, processor.std)(torch.from_numpy(picture).permute(2, 0, 1)), scaled
            )


def test_what_the_caller_set_changes_no_features(setting, model, images, pixels, monkeypatch):
    """Also where a way of computing is tried and chosen for the first time in a process."""
    expected = features(model, images)
    windows = sliding_window_features(model, images, 64, 32)
    from_pixels = features(model, (pixels / 255 - column(PROCESSOR.mean)) / column(PROCESSOR.std))
    prepacked.works.cache_clear()
    prepacked.parts_of_sums.cache_clear()
    prepacked.error_of_sums.cache_clear()
    with setting():
        fast, of_pixels = optimize_for_inference(model), optimize_for_inference(model, PROCESSOR)
        found = [features(fast, images), features(fast, images), features(of_pixels, pixels)]
        assert relative_error(sliding_window_features(model, images, 64, 32), windows) < 2e-6
        assert prepacked.available(torch.empty(0, dtype=torch.float32, device="cpu")) == (fast._graphs is None)
    for ours, truth in zip(found, (expected, expected, from_pixels), strict=True):
        assert ours.dtype == torch.float32 and relative_error(ours, truth) < 1e-5


def column(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and used all the same
@pytest.mark.parametrize("original", ["there", "gone"])
def test_a_prepared_model_that_ran_is_traced_within_a_function(original, model, images):
    """Whose weights come back while the program is recorded: they are constants in it, and their way back no steps."""
    expected, smaller = features(model, images), features(model, images[..., :64])
    fast = optimize_for_inference(model)
    features(fast, images)
    if original == "gone":
        del model
    traced = torch.jit.trace(lambda x: fast(x).last_hidden_state, (images,))
    assert relative_error(traced(images), expected) < 2e-6
    assert relative_error(traced(images[..., :64]), smaller) < 2e-6
    assert relative_error(features(fast, images), expected) < 2e-6


def test_a_prepared_model_of_pixels_is_traced_exported_and_compiled(model, pixels):
    fast = optimize_for_inference(model, PROCESSOR)
    expected = features(fast, pixels)
    exported = torch.export.export(fast, (pixels,)).module()
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    for program in (exported, compiled):
        assert relative_error(features(program, pixels), expected) < 1e-5


def test_function_transforms_of_a_prepared_model(model, images):
    """Before and after it ran."""
    expected, fast = features(model, images), optimize_for_inference(model)
    if isinstance(model, DINOv3ViT):
        fast.attention = "eager"  # PyTorch's fused attention is not mapped, and has no forward derivative
    for _ in range(2):
        mapped = torch.vmap(lambda x: fast(x[None]).last_hidden_state[0])(images)
        assert relative_error(mapped, expected) < 2e-6
        assert relative_error(features(fast, images), expected) < 2e-6
    if isinstance(model, DINOv3ViT):
        model.attention = "eager"
    direction = (images,), (torch.ones_like(images),)
    found, along = torch.func.jvp(lambda x: fast(x).last_hidden_state, *direction)
    truth, truth_along = torch.func.jvp(lambda x: model(x).last_hidden_state, *direction)
    assert relative_error(found, truth) < 2e-6 and relative_error(along, truth_along) < 1e-5


def test_modes_that_record_or_fake(model, images):
    """They see what the model computes, and nothing of how its weights come back."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    expected, fast = features(model, images), optimize_for_inference(model)
    features(fast, images)
    with torch.no_grad():
        recorded = make_fx(lambda x: fast(x).last_hidden_state)(images)
    assert relative_error(recorded(images), expected) < 2e-6
    operators = {str(node.target) for node in recorded.graph.nodes}
    assert not {name for name in operators if name.startswith(("mkl", "aten.set_", "aten.to_dense", "aten.index_copy"))}
    features(fast, images)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = features(fast, mode.from_tensor(images))
    assert fake.shape == expected.shape and relative_error(features(fast, images), expected) < 2e-6


def test_a_prepared_model_without_numbers_has_shapes(model, images, pixels):
    fast = optimize_for_inference(model)
    expected = features(fast, images)
    for empty, given in (
        (fast.to("meta"), images),
        (optimize_for_inference(model.to("meta")), images),
        (optimize_for_inference(model, PROCESSOR), pixels),
    ):
        found = features(empty, given.to("meta"))
        assert found.is_meta and found.shape == expected.shape


def test_symbolic_tracing_stops_in_a_sentence_or_at_the_model(images, tmp_path):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, DINOv3ViT) or super().is_leaf_module(module, name)

    class Detector(nn.Module):
        def __init__(self, model: DINOv3ViT) -> None:
            super().__init__()
            self.model, self.head = model, nn.Linear(32, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.model(images).patch_tokens)

    detector = Detector(DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY))).eval()
    with pytest.raises(ValueError, match="with its class among the tracer's leaf modules, or use torch.export"):
        torch.fx.symbolic_trace(detector)
    with torch.no_grad():
        expected = detector(images)
        for root in (detector, optimize_for_inference(detector)):
            traced = torch.fx.GraphModule(root, Tracer().trace(root))
            assert relative_error(traced(images), expected) < 2e-6
