"""`python -m dinov3_lite`: the sample, features, pictures."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from importlib import import_module

import numpy as np
import pytest
import torch
from helpers import TINY, relative_error, run_python, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT, ImageProcessor, picture
from dinov3_lite.__main__ import COMMANDS, main
from dinov3_lite.checkpoint import DTYPES
from dinov3_lite.commands import arguments as shared
from dinov3_lite.commands import export as export_command
from dinov3_lite.export import FORMATS
from dinov3_lite.sample import made_weights

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "checkpoint"
    assert main(["sample", str(folder)]) == 0
    return folder


@pytest.fixture
def photo(tmp_path):
    """Left half red, right half blue, 200 x 100 pixels."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :100, 0] = pixels[:, 100:, 2] = 200
    file = tmp_path / "photo.png"
    Image.fromarray(pixels).save(file)
    return file


def test_the_sample_is_a_vits_in_transformers_layout(sample):
    assert {p.name for p in sample.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    model = DINOv3ViT.from_pretrained(sample)
    assert model.config == DINOv3Config.from_name("vits16")
    assert ImageProcessor.from_pretrained(sample) == ImageProcessor()
    assert "(made, not trained)" in repr(model)
    for name, tensor in made_weights(model.config).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_transformers_reads_the_sample(sample):
    pytest.importorskip("transformers")
    import reference

    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = reference.states(reference.load(sample), images)
        ours = reference.states(DINOv3ViT.from_pretrained(sample), images)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 5e-6


def test_the_sample_does_not_overwrite(sample, capsys):
    assert main(["sample", str(sample)]) == 1
    assert "holds a config.json already" in capsys.readouterr().err


def test_features_of_a_photo(sample, photo, tmp_path, capsys):
    output, drawing = tmp_path / "f.safetensors", tmp_path / "pca.png"
    converted = convert(sample, tmp_path / "converted.safetensors")
    arguments = ["features", str(photo), "--model", str(converted), "--output", str(output), "--picture", str(drawing)]
    assert main([*arguments, "--query", "150,50", "--size", "64x128"]) == 0
    out, err = capsys.readouterr()
    assert "1 photo at 64 x 128 px: 1 CLS + 4 registers + 4 x 8 patches = 37 tokens of 384" in out
    assert "made, not trained" in out and err == ""

    model = DINOv3ViT.from_pretrained(sample)
    processor = ImageProcessor(size=(64, 128))
    with torch.no_grad():
        expected = model(**processor(Image.open(photo)))
    saved = load_file(output)
    assert torch.equal(saved["cls_token"], expected.cls_token)
    assert torch.equal(saved["register_tokens"], expected.register_tokens)
    assert torch.equal(saved["feature_map"], expected.feature_map)
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["files"]) == [str(photo)]

    # three panels: the photo, two flat colours that differ, heat on the blue half only
    sheet = np.asarray(Image.open(drawing)).astype(int)
    width = 2 * picture.PANEL_HEIGHT
    assert sheet.shape[1] == 3 * width + 4 * picture.MARGIN
    row = picture.MARGIN + picture.PANEL_HEIGHT // 2
    red, blue = sheet[row, 100], sheet[row, width - 100]
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0]
    start = 2 * picture.MARGIN + width
    assert abs(sheet[row, start + 100] - sheet[row, start + width - 100]).max() > 100
    start = 3 * picture.MARGIN + 2 * width
    assert sheet[row, start + width - 100].sum() > sheet[row, start + 100].sum() + 200


def test_photos_are_turned_as_the_camera_was_held(sample, photo, tmp_path):
    turned = Image.open(photo).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees to show
    turned.save(tmp_path / "turned.png", exif=exif)
    maps = []
    for file in (photo, tmp_path / "turned.png"):
        output = tmp_path / "f.safetensors"
        assert main(["features", str(file), "--model", str(sample), "--output", str(output), "--size", "32x64"]) == 0
        maps.append(load_file(output)["feature_map"])
    assert torch.equal(*maps)


def test_many_photos_in_one_file(sample, photo, tmp_path, capsys):
    output, drawing = tmp_path / "f.safetensors", tmp_path / "pca.png"
    files = [str(photo)] * 3
    arguments = ["features", *files, "--model", str(sample), "--output", str(output), "--picture", str(drawing)]
    assert main([*arguments, "--size", "32", "--dtype", "bfloat16"]) == 0
    assert "3 photos at 32 x 32 px" in capsys.readouterr().out
    saved = load_file(output)
    assert saved["feature_map"].shape == (3, 384, 2, 2) and saved["feature_map"].dtype == torch.bfloat16
    assert (
        Image.open(drawing).height
        == 3 * (picture.PANEL_HEIGHT + picture.CAPTION_HEIGHT + picture.MARGIN) + picture.MARGIN
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg"),
        ([__file__], "cannot identify image file"),
        (["PHOTO", "--query", "200,50"], "--query 200,50 is outside .*photo.png, which is 200 x 100 pixels"),
        (["PHOTO", "--size", "50"], "image height 50 and width 50 must be multiples of the patch size 16"),
        (["PHOTO", "--model", "/nowhere"], "/nowhere: no such file or folder"),
        (["PHOTO", "--output", "/nowhere/f.safetensors"], "/nowhere/f.safetensors: there is no folder /nowhere"),
        (["PHOTO", "--output", "PHOTO"], "photo.png: is one of the photos"),
        (["PHOTO", "--picture", "pca.nonsense"], "pca.nonsense: unknown type of picture"),
        (["PHOTO", "--device", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line(sample, photo, tmp_path, capsys, arguments, message):
    arguments = [str(photo) if a == "PHOTO" else a for a in arguments]
    model = [] if "--model" in arguments else ["--model", str(sample)]
    outputs = ["--output", str(tmp_path / "f.safetensors"), "--picture", str(tmp_path / "p.png")]
    assert main(["features", *outputs, *arguments, *model]) == 1
    err = capsys.readouterr().err
    assert re.search(message, err) and err.startswith("dinov3_lite: ") and err.count("\n") == 1
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["features"],
        ["features", "x", "--model", "m", "--query", "5"],
        ["features", "x", "--model", "m", "--query", "5,5"],
        ["draw"],
    ],
)
def test_bad_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m dinov3_lite" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_of_itself_with_an_example_of_its_own_usage(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    example = re.search(rf"example:\n  python -m dinov3_lite {name} (.+)\n", out)
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(COMMANDS[name][0], "dinov3_lite").add_arguments(parser)
    parser.parse_args(shlex.split(example[1]))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["features", "--help"], ["features"]])
def test_help_and_bad_usage_do_not_wait_for_torch(arguments):
    code = f"""
import sys
from dinov3_lite.__main__ import main
try:
    main({arguments})
except SystemExit as end:
    print(end.code, "torch" in sys.modules, "numpy" in sys.modules)
"""
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == f"{0 if '--help' in arguments else 2} False False", done.stderr
    assert "features of pictures, saved and drawn" in done.stdout + done.stderr or "features" in arguments


def test_usage_shows_how_it_was_called(monkeypatch, capsys):
    for path, name in (("/usr/bin/dinov3-lite", "dinov3-lite"), ("dinov3_lite/__main__.py", "python -m dinov3_lite")):
        monkeypatch.setattr("sys.argv", [path, "features", "--help"])
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().out.startswith(f"usage: {name} features ")


def test_the_names_that_arguments_may_have_are_the_library_s():
    assert set(shared.DTYPES) == set(DTYPES) and set(export_command.FORMATS) == set(FORMATS)


def test_principal_components_find_what_varies():
    """Three directions of falling variance come out as red, green and blue, up to sign."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 8, 8, generator=generator) * torch.tensor([9.0, 3.0, 1.0]).view(3, 1, 1)
    directions = torch.linalg.qr(torch.randn(10, 10, generator=generator)).Q[:, :3]
    maps = torch.einsum("cd,bdhw->bchw", directions, values) + 5
    colours = picture.pca_colours(maps)
    assert colours.shape == (2, 8, 8, 3) and colours.min() == 0 and colours.max() == 1
    for channel in range(3):
        correlation = torch.corrcoef(torch.stack([colours[..., channel].flatten(), values[:, channel].flatten()]))[0, 1]
        assert correlation.abs() > 0.95


def test_similarity_is_cosine():
    feature_map = torch.tensor([[[1.0, 2.0, 0.0, -1.0]], [[0.0, 0.0, 3.0, 0.0]]])
    torch.testing.assert_close(picture.similarity(feature_map, 0, 1), torch.tensor([[1.0, 1.0, 0.0, -1.0]]))


def test_a_checkpoint_without_preprocessing(photo, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "c", TINY, preprocessing=None)
    assert main(["features", str(photo), "--model", str(folder), "--output", str(tmp_path / "f.safetensors")]) == 1
    assert "no preprocessor_config.json" in capsys.readouterr().err
