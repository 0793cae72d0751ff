from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from helpers import PREPROCESSING, TINY, run_reference, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import ImageProcessor
from dinov3_lite.image import SATELLITE_MEAN, SATELLITE_STD


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": {"height": 112, "width": 320}, "image_mean": SATELLITE_MEAN, "image_std": SATELLITE_STD},
        {"do_resize": False},
        {"do_normalize": False},
    ],
    ids=["as released", "wide, satellite", "no resize", "no normalisation"],
)
def test_equal_to_transformers(config, tmp_path):
    """Up, down and not at all, square and not. transformers resizes with torchvision, in a process of its own."""
    pytest.importorskip("transformers")
    sizes = [(224, 224), (600, 512), (97, 301), (224, 500), (1000, 40), (16, 16)]
    pictures = {f"{h}x{w}": torch.from_numpy(picture(h, w)).permute(2, 0, 1).contiguous() for h, w in sizes}
    save_file(pictures, tmp_path / "pictures.safetensors")
    files = tmp_path / "pictures.safetensors", tmp_path / "out.safetensors"
    run_reference("reference_images.py", *files, json.dumps(config), cwd=tmp_path)
    processor = ImageProcessor.from_dict({**PREPROCESSING, **config})
    for name, expected in load_file(tmp_path / "out.safetensors").items():
        ours = processor(pictures[name])["pixel_values"]
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 2e-6


def test_rescale_resize_normalise_in_this_order():
    """A picture of two halves, resized to one pixel, is their mean, rescaled and normalised."""
    image = np.zeros((2, 4, 3), dtype=np.uint8)
    image[:, 2:] = [255, 51, 0]
    pixel = ImageProcessor(size=(1, 1), mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.5))(image)["pixel_values"]
    torch.testing.assert_close(pixel.flatten(), torch.tensor([0.0, 0.1, -0.5]))


def test_every_kind_of_picture_gives_the_same():
    Image = pytest.importorskip("PIL.Image")
    array = picture(50, 70)
    processor = ImageProcessor(size=(32, 48))
    expected = processor(array)["pixel_values"]
    assert expected.shape == (1, 3, 32, 48) and expected.dtype == torch.float32
    read_only = array.copy()
    read_only.flags.writeable = False
    flipped = array[::-1].copy()[::-1]
    for image in (Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1), read_only, flipped):
        assert torch.equal(processor(image)["pixel_values"], expected)
    batch = processor([array, Image.fromarray(array[:20]), torch.from_numpy(array).permute(2, 0, 1)])["pixel_values"]
    assert batch.shape == (3, 3, 32, 48)
    assert torch.equal(batch[0], expected[0]) and torch.equal(batch[2], expected[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pillow_modes_become_rgb(mode):
    Image = pytest.importorskip("PIL.Image")
    image = Image.fromarray(picture(20, 20)).convert(mode)
    processor = ImageProcessor(size=(16, 16))
    assert torch.equal(processor(image)["pixel_values"], processor(image.convert("RGB"))["pixel_values"])


def test_a_view_is_not_written_to():
    array = picture(16, 16)
    before = array.copy()
    ImageProcessor(size=None)(array)
    assert (array == before).all()


def test_from_pretrained_of_a_folder_and_of_a_converted_file(tmp_path):
    preprocessing = {**PREPROCESSING, "size": {"height": 96, "width": 160}, "image_mean": [0.1, 0.2, 0.3]}
    folder = write_checkpoint(tmp_path / "source", TINY, preprocessing=preprocessing)
    converted = convert(folder, tmp_path / "alone")
    for source in (folder, converted, converted.parent):
        assert ImageProcessor.from_pretrained(source) == ImageProcessor(size=(96, 160), mean=(0.1, 0.2, 0.3))


def test_no_preprocessing_anywhere(tmp_path):
    folder = write_checkpoint(tmp_path, TINY, preprocessing=None)
    for source in (folder, convert(folder, tmp_path / "alone")):
        with pytest.raises(FileNotFoundError, match=r"no preprocessor_config.json with it: make an ImageProcessor"):
            ImageProcessor.from_pretrained(source)


def test_a_satellite_model_with_imagenet_statistics_deserves_a_warning(tmp_path):
    folder = write_checkpoint(tmp_path / "dinov3-vitl16-pretrain-sat493m", TINY)
    with pytest.warns(
        UserWarning, match=r"satellite model \(sat493m\) with ImageNet's image statistics: .*0.43, 0.411, 0.296"
    ):
        ImageProcessor.from_pretrained(folder)
    right = {**PREPROCESSING, "image_mean": SATELLITE_MEAN, "image_std": SATELLITE_STD}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageProcessor.from_pretrained(write_checkpoint(folder, TINY, preprocessing=right))
        ImageProcessor.from_pretrained(write_checkpoint(tmp_path / "web", TINY))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is an empty list"),
        ("photo.jpg", "image is a str: expected a PIL image, a uint8 array or a uint8 tensor"),
        (np.zeros((4, 4), np.uint8), r"image is uint8 of shape \(4, 4\): expected uint8 of shape \(height, width, 3\)"),
        (
            np.zeros((3, 4, 4), np.uint8),
            r"image is uint8 of shape \(3, 4, 4\): expected uint8 of shape \(height, width, 3\)",
        ),
        (np.array(["a"]), r"image is <U1 of shape \(1,\): expected uint8"),
        (np.zeros((4, 4, 3), np.float32), r"image is float32 of shape \(4, 4, 3\): expected uint8"),
        (
            torch.zeros(4, 4, 3, dtype=torch.uint8),
            r"torch.uint8 of shape \(4, 4, 3\): expected uint8 of shape \(3, height, width\)",
        ),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), r"of shape \(3, 0, 4\): expected"),
    ],
)
def test_pictures_that_do_not_fit(images, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor()(images)


def test_several_sizes_without_a_size_to_resize_to():
    with pytest.raises(ValueError, match=r"the pictures have several sizes \(16 x 32, 32 x 32\)"):
        ImageProcessor(size=None)([picture(32, 32), picture(16, 32)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 3}, r"resample is 3: only bilinear \(2\) is supported"),
        ({"do_center_crop": True}, "do_center_crop is true: only rescale, resize and normalise"),
        ({"size": {"shortest_edge": 224}}, "size is .*: expected a height and a width"),
        ({"size": {"height": "224", "width": 224}}, r"size is \('224', 224\): expected \(height, width\)"),
        ({"size": True}, "size is True: expected a height and a width"),
        ({"image_mean": None}, "mean is None: expected three numbers"),
        ({"image_mean": [0.5, 0.5]}, r"mean is \(0.5, 0.5\): expected three numbers"),
        ({"image_std": [0.2, 0.2, 0.0]}, "std is .*: expected three numbers, none of them zero"),
        ({"rescale_factor": None}, "rescale_factor is None: expected a number"),
    ],
)
def test_preprocessing_that_is_not_dinov3s(change, message, tmp_path):
    folder = write_checkpoint(tmp_path, TINY, preprocessing={**PREPROCESSING, **change})
    with pytest.raises(ValueError, match=f"{tmp_path}: preprocessor_config.json: {message}"):
        ImageProcessor.from_pretrained(folder)
