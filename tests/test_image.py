from __future__ import annotations

import json
import struct
import warnings
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PREPROCESSING, TINY, run_python, run_reference, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import ImageProcessor
from dinov3_lite.image import SATELLITE_MEAN, SATELLITE_STD

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": {"height": 112, "width": 320}, "image_mean": SATELLITE_MEAN, "image_std": SATELLITE_STD},
        {"do_resize": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "size": 96},
    ],
    ids=["as released", "wide, satellite", "no resize", "no normalisation", "other factor, a square"],
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


def test_do_rescale_false_leaves_values_of_0_to_255():
    """It is told by statistics, since transformers refuses to normalise uint8: those of 0 to 255 give what the usual ones give."""
    rescaled = ImageProcessor.from_dict(PREPROCESSING)(picture(40, 50))["pixel_values"]
    of_255 = {name: [255 * v for v in PREPROCESSING[name]] for name in ("image_mean", "image_std")}
    processor = ImageProcessor.from_dict({**PREPROCESSING, "do_rescale": False, **of_255})
    torch.testing.assert_close(processor(picture(40, 50))["pixel_values"], rescaled, rtol=0, atol=2e-6)


def test_every_kind_of_picture_gives_the_same():
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


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "YCbCr", "HSV", "RGBX"])
def test_pillow_modes_become_rgb(mode):
    image = Image.fromarray(picture(20, 20)).convert(mode)
    processor = ImageProcessor(size=(16, 16))
    assert torch.equal(processor(image)["pixel_values"], processor(image.convert("RGB"))["pixel_values"])


def values(image, channels: int = 3, **options) -> torch.Tensor:
    """What the model would get if nothing were scaled or normalised: (C, H, W) of 0 to 255."""
    return ImageProcessor(None, [0.0] * channels, [1.0] * channels, 1, **options)(image)["pixel_values"][0]


def transparent(mode: str):
    """Two pixels whose colour is black: one opaque, one that lets everything through. Their grey is 0 and 255."""
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.info["transparency"] = 1
        return image
    if mode == "P, alpha a colour":
        image = transparent("P")
        image.info["transparency"] = bytes([255, 0])
        return image
    if mode == "PA":
        image = Image.frombytes("PA", (2, 1), bytes([0, 255, 0, 0]))
        image.putpalette([0, 0, 0, 0, 0, 0])
        return image
    if mode == "RGB":
        image = Image.fromarray(np.array([[[0, 0, 0], [0, 0, 1]]], np.uint8))
        image.info["transparency"] = (0, 0, 1)
        return image
    return Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8), "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La", "P", "P, alpha a colour", "RGB"])
def test_what_is_transparent_lies_on_white(mode):
    image = transparent(mode) if mode != "La" else transparent("LA").convert("La")
    assert values(image).tolist() == [[[0.0, 255.0]]] * 3
    assert values(image, channels=1).tolist() == [[[0.0, 255.0]]]


def test_half_transparent_is_half_of_it():
    image = Image.fromarray(np.array([[[200, 100, 0, 51]]], np.uint8), "RGBA")
    assert values(image).flatten().tolist() == [0.2 * 200 + 0.8 * 255, 0.2 * 100 + 0.8 * 255, 0.8 * 255]


def sixteen_bits(kind: str, grey: np.ndarray, folder):
    if kind == "big-endian array":
        return np.repeat(grey[..., None], 3, axis=2).astype(">u2")
    if kind == "array":
        return np.repeat(grey[..., None], 3, axis=2)
    if kind == "tensor":
        return torch.from_numpy(np.repeat(grey[None], 3, axis=0))
    image = Image.fromarray(grey)
    if kind == "PGM":  # which Pillow opens in mode I
        (folder / "grey.pgm").write_bytes(b"P5 %d %d 65535\n" % image.size + grey.astype(">u2").tobytes())
        return folder / "grey.pgm"
    if kind == "big-endian":
        return Image.frombytes("I;16B", image.size, grey.astype(">u2").tobytes())
    image.save(folder / f"grey.{kind.lower()}")
    return folder / f"grey.{kind.lower()}"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM", "big-endian", "array", "big-endian array", "tensor"])
def test_sixteen_bits_are_scaled(kind, tmp_path):
    grey = np.array([[0, 257, 30000], [65535, 1, 512]], np.uint16)
    expected = torch.from_numpy(grey.astype(np.float32)) / 257
    assert torch.equal(values(sixteen_bits(kind, grey, tmp_path)), expected.expand(3, 2, 3))
    if kind not in ("array", "big-endian array", "tensor"):
        assert torch.equal(values(sixteen_bits(kind, grey, tmp_path), channels=1), expected.expand(1, 2, 3))


def test_a_transparent_grey_of_sixteen_bits_lies_on_white(tmp_path):
    grey = np.array([[0, 30000, 30001], [30000, 65535, 257]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png", transparency=30000)
    expected = torch.from_numpy(np.where(grey == 30000, np.float32(65535), grey.astype(np.float32))) / 257
    assert torch.equal(values(tmp_path / "grey.png"), expected.expand(3, 2, 3))


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="^image: it is a picture of 0 x 5 pixels: expected at least one"):
        ImageProcessor()(Image.new("RGB", (0, 5)))


def test_a_masked_array_says_no_values():
    masked = np.ma.masked_array(np.zeros((4, 4, 3), np.uint8), mask=True)
    with pytest.raises(ValueError, match=r"image is a masked array: give what .* as in image.filled\(0\)"):
        ImageProcessor()(masked)
    assert torch.equal(values(masked.filled(7)), torch.full((3, 4, 4), 7.0))


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.int32), np.zeros((4, 4), np.float32)], ids=["I", "F"])
def test_values_without_a_range_are_refused(array, tmp_path):
    message = f"is a picture in mode {Image.fromarray(array).mode}, whose values have no range: scale them to 8 or 16"
    with pytest.raises(ValueError, match=f"^image: it {message}"):
        ImageProcessor()(Image.fromarray(array))
    Image.fromarray(array).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.tiff: it {message}"):
        ImageProcessor()(tmp_path / "x.tiff")


def test_true_is_white():
    mask = np.array([[True, False]])
    for image in (np.repeat(mask[..., None], 3, axis=2), torch.from_numpy(np.repeat(mask[None], 3, axis=0))):
        assert values(image).tolist() == [[[255.0, 0.0]]] * 3
    assert values(Image.fromarray(mask)).tolist() == [[[255.0, 0.0]]] * 3


# ---- paths and orientation


def test_paths_of_files(tmp_path):
    array = picture(40, 50)
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = ImageProcessor()([array, array])["pixel_values"]
    actual = ImageProcessor()([tmp_path / "a.png", str(tmp_path / "a.png")], return_tensors="pt")["pixel_values"]
    assert torch.equal(actual, expected)
    for return_tensors in ("np", "tf"):
        with pytest.raises(ValueError, match=f"return_tensors is '{return_tensors}': only 'pt'"):
            ImageProcessor()(array, return_tensors=return_tensors)


def damaged(kind: str, folder):
    """A file that Pillow can't read: each raises an error of another kind."""
    file = folder / f"{kind.split()[0]}.png"
    if kind == "bomb":
        size = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
        content = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))
        return file
    Image.fromarray(picture(60, 70)).save(file, "JPEG" if kind == "truncated JPEG" else "PNG")
    content = bytearray(file.read_bytes())
    if kind.startswith("truncated"):
        del content[len(content) // 2 :]
    elif kind == "corrupt":
        content[60:90] = bytes(30)
    elif kind == "empty":
        content.clear()
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("kind", ["bomb", "truncated JPEG", "truncated PNG", "corrupt", "empty"])
def test_a_damaged_file_is_named(kind, tmp_path):
    file = damaged(kind, tmp_path)
    with pytest.raises(ValueError, match=f"^{file}: "):
        ImageProcessor()([picture(20, 20), file])


def test_an_open_picture_that_turns_out_damaged_is_named_too(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/truncated.png: image file is truncated"):
        ImageProcessor()(Image.open(damaged("truncated JPEG", tmp_path)))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        ImageProcessor()(tmp_path / "nowhere.jpg")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        ImageProcessor()(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])
def test_photographs_are_turned_as_their_exif_says(orientation, kind, tmp_path, monkeypatch):
    file = tmp_path / f"photo.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(40, 70)).save(file, exif=exif, **({"quality": 100} if kind == "jpeg" else {}))
    monkeypatch.setattr("dinov3_lite.image.BAND", 70 * 9)  # bands of 9 rows, or 15 of what was turned
    turned = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert turned.shape == ((40, 70, 3) if orientation < 5 else (70, 40, 3))
    for image in (file, Image.open(file)):
        assert torch.equal(values(image), torch.from_numpy(turned.copy()).permute(2, 0, 1).float())
    stored = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
    assert torch.equal(values(file, exif=False), stored)


def test_a_damaged_exif_block_turns_nothing():
    image = Image.fromarray(picture(20, 30))
    image.info["exif"] = b"Exif\0\0nonsense"
    assert torch.equal(values(image), torch.from_numpy(picture(20, 30)).permute(2, 0, 1).float())


# ---- in bands


@pytest.mark.parametrize("size", [(224, 224), (50, 700), (700, 50), (331, 224), (224, 518), None], ids=str)
def test_resizing_in_bands_gives_the_same_bits(size, monkeypatch):
    image = picture(331, 518)
    whole = ImageProcessor(size)(image)["pixel_values"]
    monkeypatch.setattr("dinov3_lite.image.BAND", 518 * 7)
    assert torch.equal(ImageProcessor(size)(image)["pixel_values"], whole)
    monkeypatch.setattr("dinov3_lite.image.BAND", 1)
    assert torch.equal(ImageProcessor(size)(image)["pixel_values"], whole)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory in Linux's way")
def test_a_large_picture_never_is_float_as_a_whole(tmp_path):
    """16 megapixels are 48 MB, and 64 in Pillow's memory; in float32 they would be 192."""
    file = tmp_path / "large.png"
    Image.linear_gradient("L").resize((4000, 4000)).convert("RGB").save(file, compress_level=1)
    Image.fromarray(np.zeros((1200, 1200, 3), np.uint8)).save(tmp_path / "small.png")
    code = f"""
import re
from pathlib import Path
from dinov3_lite import ImageProcessor
def peak():  # of this program: getrusage counts what the process was before it, too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
processor = ImageProcessor()
processor({str(tmp_path / "small.png")!r})
before = peak()
processor({str(file)!r})
print(peak() - before)
"""
    done = run_python(code)
    assert 40 < float(done.stdout) < 2 * 48, done.stderr


# ---- what it is made of


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    "kind",
    [
        *(list, np.array, partial(np.array, dtype=np.float32), partial(np.array, dtype=np.float16)),
        *(torch.tensor, partial(torch.tensor, dtype=torch.float64), partial(torch.tensor, dtype=torch.float16)),
    ],
    ids=["list", "array", "float32 array", "float16 array", "tensor", "float64 tensor", "float16 tensor"],
)
def test_statistics_of_any_kind_make_equal_processors(kind):
    processor = ImageProcessor(mean=kind(MEAN), std=kind(STD))
    assert processor == ImageProcessor() and hash(processor) == hash(ImageProcessor())
    assert processor.mean == MEAN and all(type(v) is float for v in processor.mean + processor.std)


@pytest.mark.parametrize(
    "size", [64, np.int64(64), torch.tensor(64), (64, 64), [64, 64], np.array([64, 64]), torch.Size((64, 64))], ids=repr
)
def test_sizes_of_any_kind_make_equal_processors(size):
    processor = ImageProcessor(size)
    assert processor == ImageProcessor((64, 64)) and hash(processor) == hash(ImageProcessor((64, 64)))
    assert processor.size == (64, 64) and all(type(n) is int for n in processor.size)
    assert processor != ImageProcessor((64, 80)) and processor != ImageProcessor(64, exif=False)


def test_one_number_counts_for_all_channels():
    assert ImageProcessor(mean=0.5, std=0.25) == ImageProcessor(mean=(0.5,) * 3, std=(0.25,) * 3)
    assert ImageProcessor(mean=[0.1, 0.2], std=1) == ImageProcessor(mean=(0.1, 0.2), std=(1.0, 1.0))
    assert ImageProcessor(mean=[0.5], std=[0.5]).num_channels == 1
    with pytest.raises(ValueError, match=r"mean is \(0.5,\): expected three numbers, one a channel as in the other"):
        ImageProcessor(mean=[0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size is 0: expected \(height, width\), two whole numbers"),
        ({"size": (16, 16.5)}, r"size is \(16, 16.5\): expected"),
        ({"size": (16, 16, 3)}, r"size is \(16, 16, 3\): expected"),
        ({"size": True}, "size is True: expected"),
        ({"size": "224"}, "size is 224: expected"),
        ({"mean": "abc"}, "mean is abc: expected three numbers, or as many as there are channels"),
        ({"mean": []}, r"mean is \[\]: expected three numbers"),
        ({"mean": (0.5, float("nan"), 0.5)}, r"mean is \(0.5, nan, 0.5\): expected three numbers"),
        ({"mean": [True, False, True]}, "mean is .*: expected three numbers"),
        ({"mean": np.zeros((1, 2))}, "mean is .*: expected three numbers"),
        ({"std": (0.2, 0.2, -0.2)}, "std is .*: expected three numbers, none of them zero or less"),
        ({"std": (0.2,) * 4}, r"std is \(0.2, 0.2, 0.2, 0.2\): expected three numbers, one a channel as in the other"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf: expected a number"),
    ],
)
def test_arguments_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**options)


def test_as_many_channels_as_statistics():
    mean, std = [0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 1.0, 2.0]
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - torch.tensor(mean).view(4, 1, 1)) / torch.tensor(
        std
    ).view(4, 1, 1)
    processor = ImageProcessor(None, mean, std)
    for one in (image, torch.from_numpy(image).permute(2, 0, 1), Image.fromarray(image, "RGBA")):
        torch.testing.assert_close(processor(one)["pixel_values"][0], expected, rtol=0, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"image is uint8 of shape \(20, 30, 3\): expected uint8 of shape .*width, 4\)"
    ):
        processor(image[..., :3])
    with pytest.raises(ValueError, match=r"image: it is a picture in mode RGB: expected 4 channels, as an array"):
        processor(Image.fromarray(image[..., :3]))
    with pytest.raises(ValueError, match=r"image: it is a picture in mode RGBa: expected 4 channels"):
        processor(Image.fromarray(image, "RGBA").convert("RGBa"))  # whose colours are multiplied by what lets through
    grey = picture(20, 30)[..., :1]
    assert torch.equal(
        values(Image.fromarray(grey[..., 0]), channels=1), torch.from_numpy(grey).permute(2, 0, 1).float()
    )


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


def test_where_a_processor_lies_is_passed_on(tmp_path, monkeypatch):
    said = {**PREPROCESSING, "size": {"height": 96, "width": 160}}
    folder = write_checkpoint(tmp_path / "repository" / "backbone", TINY, preprocessing=said)
    expected = ImageProcessor(size=(96, 160))
    assert ImageProcessor.from_pretrained(tmp_path / "repository", subfolder="backbone") == expected
    asked = []
    monkeypatch.setattr(
        "dinov3_lite.checkpoint.hub.download", lambda repo_id, **options: asked.append((repo_id, options)) or folder
    )
    where = {"subfolder": "inner", "revision": "v2", "cache_dir": tmp_path / "cache", "local_files_only": True}
    assert ImageProcessor.from_pretrained("owner/name", **where) == expected
    assert asked == [("owner/name", where)]


def test_no_preprocessing_anywhere(tmp_path):
    folder = write_checkpoint(tmp_path, TINY, preprocessing=None)
    for source in (folder, convert(folder, tmp_path / "alone")):
        with pytest.raises(FileNotFoundError, match=r"no preprocessor_config.json with it: make an ImageProcessor"):
            ImageProcessor.from_pretrained(source)


NAME = "dinov3-vitl16-pretrain-sat493m"


@pytest.mark.parametrize("place", [NAME, f"models--facebook--{NAME}/snapshots/0a1b2c"], ids=["folder", "hub"])
def test_a_satellite_model_with_imagenet_statistics_deserves_a_warning(place, tmp_path):
    folder = write_checkpoint(tmp_path / place, TINY)
    for source in (folder, convert(folder)):
        with pytest.warns(
            UserWarning, match=r"satellite model \(sat493m\) with ImageNet's image statistics: .*0.43, 0.411, 0.296"
        ):
            ImageProcessor.from_pretrained(source)
    right = {**PREPROCESSING, "image_mean": SATELLITE_MEAN, "image_std": SATELLITE_STD}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageProcessor.from_pretrained(write_checkpoint(tmp_path / "right" / place, TINY, preprocessing=right))
        ImageProcessor.from_pretrained(write_checkpoint(tmp_path / "web", TINY))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is an empty list"),
        (3.5, "image is a float: expected a path, a PIL image, a uint8 array or a uint8 tensor"),
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
        (np.zeros((4, 4, 3), np.int64), r"image is int64 of shape \(4, 4, 3\): expected uint8"),
        ([np.zeros((4, 4, 3), np.uint8), None], r"images\[1\] is a NoneType: expected a path"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)], r"images\[1\] is uint8 of shape \(4, 4\)"),
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
        ({"do_pad": True}, "do_pad is true: only rescale, resize and normalise"),
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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, ImageProcessor()),
        ({"size": {"height": 96, "width": 160}}, ImageProcessor(size=(96, 160))),
        ({"do_resize": False, "size": {"height": 96, "width": 160}}, ImageProcessor(size=None)),
        ({"do_rescale": False, "rescale_factor": 1 / 127.5}, ImageProcessor(rescale_factor=1.0)),
        ({"do_rescale": True, "rescale_factor": 1 / 127.5}, ImageProcessor(rescale_factor=1 / 127.5)),
        ({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}, ImageProcessor(mean=0.0, std=1.0)),
        (
            {"do_normalize": False, "image_mean": [0.1] * 4, "image_std": [0.2] * 4},
            ImageProcessor(mean=(0.0,) * 4, std=(1.0,) * 4),
        ),
        (
            {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
            ImageProcessor(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        ),
        ({"do_center_crop": False, "do_pad": None, "resample": 2}, ImageProcessor()),
    ],
    ids=str,
)
def test_switches_decide_and_what_is_not_said_is_as_released(content, expected, tmp_path):
    assert ImageProcessor.from_dict(content) == expected
    folder = write_checkpoint(tmp_path, TINY, preprocessing=content)
    assert ImageProcessor.from_pretrained(folder) == ImageProcessor.from_pretrained(convert(folder)) == expected


def test_the_processor_goes_through_timms_folder(tmp_path):
    said = {"size": {"height": 96, "width": 160}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]}
    source = write_checkpoint(
        tmp_path / "source",
        replace(TINY, hidden_size=64, num_attention_heads=1),
        preprocessing={**PREPROCESSING, **said},
    )
    folder = convert(source, tmp_path / "timm", to="timm", allow_loss=True)
    expected = ImageProcessor(size=(96, 160), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    assert ImageProcessor.from_pretrained(folder) == ImageProcessor.from_pretrained(source) == expected
