from __future__ import annotations

import pytest
import torch
from helpers import TINY, relative_error, write_checkpoint

from dinov3_lite import DINOv3ViT, sliding_window_features


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("model"), TINY))


@pytest.mark.parametrize("window", [64, 512, (40, 24)])
def test_one_window_is_the_plain_forward(model, window):
    images = torch.randn(2, 3, 40, 24)
    plain = model(images).feature_map
    assert relative_error(sliding_window_features(model, images, window), plain) < 1e-6


def test_the_blend_by_hand(model):
    """Two windows of 4 patches over 6: each patch is the mean of its windows, weighted by the distance to their borders."""
    images = torch.randn(1, 3, 8, 48)
    left, right = (model(images[..., x : x + 32]).feature_map for x in (0, 16))
    expected = torch.zeros(1, 32, 1, 6)
    expected[..., :2], expected[..., 4:] = left[..., :2], right[..., 2:]
    # tents of four patches weigh 1 2 2 1: patch 2 counts 2 in the left window and 1 in the right, patch 3 the reverse
    expected[..., 2] = (2 * left[..., 2] + 1 * right[..., 0]) / 3
    expected[..., 3] = (1 * left[..., 3] + 2 * right[..., 1]) / 3
    actual = sliding_window_features(model, images, (8, 32), (8, 16))
    assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((80, 56), 32, 16), ((80, 56), 32, 24), ((72, 40), (16, 32), (8, 32)), ((40, 200), 24, None), ((24, 24), 8, 8)],
)
def test_weights_add_up_to_one_everywhere(model, size, window, stride, monkeypatch):
    """Constant features stay constant, whatever the windows and however the last ones are moved inwards."""
    monkeypatch.setattr(
        model, "get_intermediate_layers", lambda x, **_: (torch.ones(len(x), 32, x.shape[2] // 8, x.shape[3] // 8),)
    )
    features = sliding_window_features(model, torch.zeros(2, 3, *size), window, stride)
    torch.testing.assert_close(features, torch.ones(2, 32, size[0] // 8, size[1] // 8))


def test_batches_of_windows_and_the_options(model):
    images = torch.randn(2, 3, 64, 48)
    one = sliding_window_features(model, images, 32)
    many = sliding_window_features(model, images, 32, 16, batch_size=4)
    assert one.shape == (2, 32, 8, 6) and not one.requires_grad
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
    raw = sliding_window_features(model, images, (64, 48), block=0, norm=False)
    (expected,) = model.get_intermediate_layers(images, n=[0], reshape=True, norm=False)
    torch.testing.assert_close(raw, expected)
    half = DINOv3ViT(TINY).bfloat16()
    assert sliding_window_features(half, images, 32).dtype == torch.float32


def test_progress(model, capsys):
    sliding_window_features(model, torch.randn(1, 3, 64, 32), 32, progress=True)
    assert "3/3" in capsys.readouterr().err
    sliding_window_features(model, torch.randn(1, 3, 64, 32), 32)
    assert capsys.readouterr().err == ""


def test_no_window_sees_more_than_itself(model):
    """The memory of a forward is that of its window: nothing larger runs."""
    seen = []
    hook = model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    sliding_window_features(model, torch.zeros(1, 3, 80, 80), 32, 24, batch_size=2)
    hook.remove()
    assert set(seen) == {(2, 3, 32, 32), (1, 3, 32, 32)} and sum(shape[0] for shape in seen) == 9


@pytest.mark.parametrize(
    ("size", "window", "stride", "message"),
    [
        ((41, 24), 32, None, "image height is 41: expected a multiple of 8, the pixels of a patch"),
        ((40, 24), 30, None, "window height is 30: expected a multiple of 8, the pixels of a patch"),
        ((40, 24), 32, (8, 4), "stride width is 4: expected a multiple of 8, the pixels of a patch"),
        ((40, 24), 16, 24, "stride height is 24 and the window's 16: patches between windows would be left out"),
        ((40, 24), 0, 8, "window is 0: expected "),
        ((40, 24), 64.0, None, "window is 64.0: expected .height, width., two whole numbers of pixels"),
        ((40, 24), 32, (8, 8, 8), "stride is .8, 8, 8.: expected .height, width."),
    ],
)
def test_sizes_that_do_not_fit(model, size, window, stride, message):
    with pytest.raises(ValueError, match=message):
        sliding_window_features(model, torch.zeros(1, 3, *size), window, stride)


@pytest.mark.parametrize(
    ("images", "block", "message"),
    [
        (torch.zeros(3, 40, 24), -1, r"pixel_values has shape \(3, 40, 24\): expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 4, 40, 24), -1, r"pixel_values has shape \(1, 4, 40, 24\): expected \(batch, 3"),
        ([[0.0]], -1, "pixel_values is a list: expected a tensor"),
        (torch.zeros(1, 3, 40, 24), 3, "block is 3: expected the index of a block, from -3 to 2"),
        (torch.zeros(1, 3, 40, 24), 1.5, "block is 1.5: expected the index of a block"),
    ],
)
def test_images_and_blocks_that_do_not_fit(model, images, block, message):
    with pytest.raises(ValueError, match=message):
        sliding_window_features(model, images, 16, block=block)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, None])
def test_batch_sizes_that_are_none(model, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}: expected a whole number from 1 up"):
        sliding_window_features(model, torch.randn(1, 3, 16, 16), 16, batch_size=batch_size)


def test_a_float64_model_gives_float64_features():
    double = DINOv3ViT(TINY).double().eval()
    images = torch.randn(1, 3, 8, 48)
    maps = sliding_window_features(double, images, (8, 32), (8, 16))
    left, right = (double(images[..., x : x + 32]).feature_map for x in (0, 16))
    middle = (2 * left[..., 2] + right[..., 0]) / 3
    assert maps.dtype == torch.float64 and relative_error(maps[..., 2], middle) < 1e-14
