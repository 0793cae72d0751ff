"""The pixels that `extract` computes with are those of the image processor, however they were decoded."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from helpers import relative_error
from pictures import picture

import dinov3_lite
from dinov3_lite import ImageProcessor
from dinov3_lite.extraction import decode

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
pytest_plugins = ["extracting"]


def test_rounded_and_scaled_pictures_are_near_and_say_so(checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(picture(i, size=(800, 600)))
    exact = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "exact", store="float32")
    for options in ({"resize": "uint8"}, {"scaled_decoding": True}):
        near = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / str(*options), store="float32", **options)
        error = relative_error(torch.from_numpy(near["cls_token"][:]), torch.from_numpy(exact["cls_token"][:]))
        assert 1e-6 < error < 0.05, options
        with pytest.raises(ValueError, match=f"preprocessing.{next(iter(options))}"):
            dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / str(*options), store="float32")


@pytest.mark.parametrize("shape", [(1500, 2100), (1031, 1033), (3000, 400)])
def test_a_large_picture_is_resized_as_the_image_processor_does(shape):
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8).permute(2, 0, 1)
    processor = ImageProcessor((48, 64))
    expected = processor(pixels)["pixel_values"][0]
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    picture = decode.decode(file.getvalue())
    assert torch.equal(decode.Preparation(processor, 8, rounded=False)(picture), expected)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_simplejpegs_pixels_are_pillows(subsampling, progressive):
    pytest.importorskip("simplejpeg")
    for size in ((33, 57), (16, 16), (1, 9), (640, 480)):
        data = picture(3, size=size, subsampling=subsampling, progressive=progressive)
        found = decode.decode(data)
        assert isinstance(found, torch.Tensor)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("rounded", [False, True])
def test_photographs_are_turned_as_their_exif_says(rounded):
    processor = ImageProcessor((32, 48), mean=0, std=1, rescale_factor=1)
    prepare = decode.Preparation(processor, 8, rounded)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = picture(0, size=(400, 240), exif=exif)
        expected = processor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))["pixel_values"][0]
        assert (prepare(decode.decode(data)).float() - expected).abs().max() < (1.01 if rounded else 1e-4)
        scaled = decode.decode(data, (40, 24) if orientation > 4 else (24, 40))
        assert scaled.size == (100, 60)
        assert (prepare(scaled).float() - expected).abs().max() < 20


@pytest.mark.parametrize("rounded", [False, True])
def test_sixteen_bits_palettes_and_transparency_are_those_of_the_image_processor(rounded):
    processor = ImageProcessor((16, 24), mean=0, std=1, rescale_factor=1)
    prepare = decode.Preparation(processor, 8, rounded)
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (40, 50, 4), np.uint8))
    grey = Image.fromarray(rng.integers(0, 65536, (40, 50)).astype(np.uint16))
    for image in (rgba, rgba.convert("RGB").quantize(16), rgba.convert("L"), rgba.convert("1"), grey):
        file = io.BytesIO()
        image.save(file, "PNG")
        expected = processor(Image.open(io.BytesIO(file.getvalue())))["pixel_values"][0]
        found = prepare(decode.decode(file.getvalue())).float()
        assert (found - expected).abs().max() < (1.01 if rounded else 1e-4), image.mode


def test_a_native_size_is_a_patch_at_least():
    """Of a picture that is thinner than half a patch, too."""
    prepare = decode.Preparation(ImageProcessor(None), 8, rounded=False)
    for (width, height), expected in {(50, 3): (8, 48), (2, 21): (24, 8), (1, 1): (8, 8), (44, 36): (32, 48)}.items():
        assert prepare(Image.new("RGB", (width, height))).shape == (3, *expected)
