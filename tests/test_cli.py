"""`python -m dinov3_lite`: the sample, features, pictures."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PREPROCESSING, TINY, heeds_signals, relative_error, run_python, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT, ImageProcessor, console, visualize
from dinov3_lite.__main__ import COMMANDS, main
from dinov3_lite.checkpoint import DTYPES
from dinov3_lite.commands import arguments as shared
from dinov3_lite.commands import export as export_command
from dinov3_lite.export import FORMATS
from dinov3_lite.image import SATELLITE_MEAN, SATELLITE_STD
from dinov3_lite.sample import made_weights
from dinov3_lite.tasks.drawing import save_picture

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
    (by_hand := sample / "by_hand").touch()
    assert {p.stat().st_mode for p in sample.iterdir()} == {
        by_hand.stat().st_mode
    }  # whoever may read others reads these
    by_hand.unlink()
    model = DINOv3ViT.from_pretrained(sample)
    assert model.config == DINOv3Config.from_name("vits16")
    assert ImageProcessor.from_pretrained(sample) == ImageProcessor()
    assert "(made, not trained)" in repr(model)
    for name, tensor in made_weights(model.config).items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["vits16plus", "vitb16", "vitl16", "vith16plus"])
def test_weights_of_any_width_can_be_made(name):
    """A wide model has more channels than a patch has cosines in three colours, 768: the others see nothing."""
    config = dataclasses.replace(DINOv3Config.from_name(name), num_hidden_layers=1)
    weights = made_weights(config)
    DINOv3ViT(config).load_state_dict(weights)
    sees = weights["patch_embed.proj.weight"].flatten(1).norm(dim=1) > 0
    assert sees.nonzero().flatten().tolist() == list(range(min(config.hidden_size, 768)))


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

    # four panels: the photo, two flat colours that differ, those of the foreground, heat on the blue half only
    sheet = np.asarray(Image.open(drawing)).astype(int)
    width = 2 * visualize.PANEL_HEIGHT
    assert sheet.shape[1] == 4 * width + 5 * visualize.MARGIN
    row = visualize.MARGIN + visualize.PANEL_HEIGHT // 2
    red, blue = sheet[row, 100], sheet[row, width - 100]
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0]
    start = 2 * visualize.MARGIN + width
    assert abs(sheet[row, start + 100] - sheet[row, start + width - 100]).max() > 100
    start = 4 * visualize.MARGIN + 3 * width
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
        == 3 * (visualize.PANEL_HEIGHT + visualize.CAPTION_HEIGHT + visualize.MARGIN) + visualize.MARGIN
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
        (["PHOTO", "--output", "PHOTO"], "photo.png: is one of the inputs and would be overwritten"),
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
    colours = visualize.pca_colours(maps)
    assert colours.shape == (2, 8, 8, 3) and colours.min() == 0 and colours.max() == 1
    for channel in range(3):
        correlation = torch.corrcoef(torch.stack([colours[..., channel].flatten(), values[:, channel].flatten()]))[0, 1]
        assert correlation.abs() > 0.95


def test_similarity_is_cosine():
    feature_map = torch.tensor([[[1.0, 2.0, 0.0, -1.0]], [[0.0, 0.0, 3.0, 0.0]]])
    torch.testing.assert_close(visualize.similarity(feature_map, 0, 1), torch.tensor([[1.0, 1.0, 0.0, -1.0]]))


@pytest.mark.parametrize("maps", [torch.randn(1, 8, 1, 1), torch.randn(1, 8, 1, 2), torch.ones(2, 8, 3, 3)])
def test_too_few_patches_or_equal_ones_are_black(maps):
    assert visualize.foreground_pca(maps).shape == (*maps.shape[:1], *maps.shape[2:], 3)
    assert not visualize.foreground_pca(maps).any()


def test_features_of_another_rank_are_named():
    message = r"shape \(8, 2, 2\): expected \(batch, channels, rows, columns\)"
    for function in (visualize.pca_colours, visualize.foreground_pca):
        with pytest.raises(ValueError, match=f"feature_maps has {message}"):
            function(torch.zeros(8, 2, 2))
    with pytest.raises(ValueError, match=r"feature_map has shape \(1, 8, 2, 2\): expected \(channels, rows, columns\)"):
        visualize.similarity(torch.zeros(1, 8, 2, 2), 0, 0)


def test_a_panorama_is_drawn_and_what_is_too_large_is_named(tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "wide.png")
    model = write_checkpoint(tmp_path / "model", TINY)
    drawing, output = tmp_path / "p.jpg", tmp_path / "f.safetensors"
    encode(tmp_path / "wide.png", "--model", model, "--size", "8", "--output", output, "--picture", drawing)
    assert Image.open(drawing).size == (3 * (visualize.PANEL_WIDTH + 8) + 8, 1 + 24 + 2 * 8)
    assert visualize.panel_size(300, 200) == (448, 299)
    assert visualize.panel_size(200, 3000) == (119, 1792)
    with pytest.raises(ValueError, match=r"p.jpg: 66000 x 1 pixels can't be written as JPEG \(.*\): name it .png"):
        save_picture(Image.new("L", (66000, 1)), drawing)


# ---- what people have: several photos, some of them bad; weights alone; disks that are full


def encode(*arguments, code: int = 0) -> None:
    assert main(["features", *map(str, arguments)]) == code


def metadata(file) -> dict:
    with safe_open(file, "pt") as opened:
        return {name: json.loads(v) if v[:1] in "[{" else v for name, v in opened.metadata().items()}


def bad_photos(folder) -> list:
    """Not a picture, one that is truncated, one that is missing, and a folder."""
    (folder / "text.jpg").write_text("not a picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:4000])
    (folder / "folder.png").mkdir()
    return [folder / name for name in ("text.jpg", "cut.jpg", "missing.jpg", "folder.png")]


def test_bad_photos_are_named_and_have_no_row(tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model", TINY)
    good = []
    for i in range(3):
        good.append(tmp_path / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(good[-1])
    bad = bad_photos(tmp_path)
    output = tmp_path / "f.safetensors"
    photos = [bad[0], good[0], bad[1], bad[2], good[1], good[2], bad[3]]
    encode(*photos, "--model", model, "--size", "24x16", "--output", output, "--picture", tmp_path / "p.png", code=1)
    out, err = capsys.readouterr()
    assert "3 of 7 photos at 24 x 16 px" in out
    assert [str(file) in line for file, line in zip(bad, err.splitlines(), strict=True)] == [True] * 4
    assert "cannot identify" in err and "truncated" in err and "No such file" in err and "Traceback" not in err
    about = metadata(output)
    assert about["files"] == [str(file) for file in good]
    assert list(about["failed"]) == [str(file) for file in bad]
    assert Image.open(tmp_path / "p.png").height == 3 * 480 + visualize.MARGIN
    saved = load_file(output)
    for i, file in enumerate(good):  # the same bits as alone
        encode(file, "--model", model, "--size", "24x16", "--output", tmp_path / "one.safetensors")
        for name, tensor in load_file(tmp_path / "one.safetensors").items():
            assert torch.equal(saved[name][i], tensor[0]), name


def test_photos_of_which_none_can_be_read(tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model", TINY)
    bad = bad_photos(tmp_path)
    encode(*bad, "--model", model, "--output", tmp_path / "f.safetensors", "--json", code=1)
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [] and told["output"] is None and list(told["failed"]) == [str(file) for file in bad]
    assert {p.name for p in tmp_path.iterdir()} == {"model", *(p.name for p in bad if p.exists())}


def test_json_tells_programs_what_was_saved(sample, photo, tmp_path, capsys):
    output = tmp_path / "f.safetensors"
    encode(photo, photo, "--model", sample, "--size", "32", "--output", output, "--json", "--no-exif")
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == "" and told["output"] == str(output) and told["files"] == [str(photo)] * 2 and told["failed"] == {}
    assert told["tensors"] == {name: list(tensor.shape) for name, tensor in load_file(output).items()}
    assert told["model"] == "vits16" and "made, not trained" in told["weights"]
    preprocessing = {name: tuple(v) if isinstance(v, list) else v for name, v in told["preprocessing"].items()}
    assert ImageProcessor(**preprocessing) == ImageProcessor(32, exif=False)
    saved = metadata(output)
    assert saved == {name: told[name] for name in ("model", "weights", "preprocessing", "files", "failed")}


@pytest.mark.parametrize("name", ["photo.png", "photo.tiff"])
def test_features_are_those_of_python(name, tmp_path):
    """A phone's photograph, and a picture of 16 bits."""
    model = write_checkpoint(tmp_path / "model", TINY)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 2**16, (30, 50), dtype=np.uint16)
    image = Image.fromarray(pixels) if name == "photo.tiff" else Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    image.save(tmp_path / name, exif=exif)
    for options, exif_is_read in (([], True), (["--no-exif"], False)):
        encode(tmp_path / name, "--model", model, "--output", tmp_path / "f.safetensors", "--size", "32x16", *options)
        processor = ImageProcessor(size=(32, 16), exif=exif_is_read)
        with torch.no_grad():
            expected = DINOv3ViT.from_pretrained(model)(**processor(Image.open(tmp_path / name)))
        assert torch.equal(load_file(tmp_path / "f.safetensors")["feature_map"], expected.feature_map)


def test_photos_of_several_sizes_where_nothing_resizes_them(tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model", TINY, preprocessing={**PREPROCESSING, "do_resize": False})
    for i, size in enumerate([(16, 24), (32, 24), (16, 24)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    photos = [tmp_path / f"{i}.png" for i in range(3)]
    encode(*photos, "--model", model, "--output", tmp_path / "f.safetensors", code=1)
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1 and "1.png: is (24, 32) pixels high and wide, those before (24, 16): give a --size" in err
    )
    assert metadata(tmp_path / "f.safetensors")["files"] == [str(photos[0]), str(photos[2])]
    encode(*photos, "--model", model, "--output", tmp_path / "f.safetensors", "--size", "24")


@pytest.mark.parametrize(
    ("name", "whose", "processor"),
    [
        ("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "ImageNet's", ImageProcessor()),
        (
            "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth",
            "the satellite pictures'",
            ImageProcessor(mean=SATELLITE_MEAN, std=SATELLITE_STD),
        ),
    ],
)
def test_weights_without_preprocessing(name, whose, processor, photo, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "c", replace(TINY, patch_size=16), preprocessing=None)
    convert(folder, tmp_path / name, to="meta")
    encode(photo, "--model", tmp_path / name, "--output", tmp_path / "f.safetensors")
    err = capsys.readouterr().err
    assert err == f"dinov3_lite: {tmp_path / name}: says nothing of preprocessing: {whose} mean and std are taken\n"
    with torch.no_grad():
        expected = DINOv3ViT.from_pretrained(tmp_path / name)(**processor(photo))
    assert torch.equal(load_file(tmp_path / "f.safetensors")["cls_token"], expected.cls_token)


def test_nothing_that_is_read_is_written_to(sample, photo, tmp_path, capsys):
    converted = convert(sample, tmp_path / "converted.safetensors")
    weights, link = sample / "model.safetensors", tmp_path / "link"
    link.symlink_to(sample)
    for model, output in (
        (converted, converted),
        (sample, weights),
        (sample, link / "config.json"),
        (weights, sample / "config.json"),
        (link / "model.safetensors", weights),
    ):
        before = output.read_bytes()
        encode(photo, "--model", model, "--output", output, code=1)
        assert f"{output}: is one of the model's files and would be overwritten" in capsys.readouterr().err
        assert output.read_bytes() == before
    for _ in range(2):  # beside a model's file an earlier output makes place
        encode(photo, "--model", converted, "--output", tmp_path / "f.safetensors")
    same = tmp_path / "same.png"
    encode(photo, "--model", converted, "--output", same, "--picture", same, code=1)
    assert "same.png: is the file for the features too" in capsys.readouterr().err and not same.exists()
    encode(photo, "--model", converted, "--output", tmp_path, code=1)
    assert f"{tmp_path}: is a folder: name a file in it" in capsys.readouterr().err


def test_a_drawing_has_a_bounded_number_of_photos(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["features", *["x.jpg"] * 51, "--model", "m", "--picture", "p.png"])
    assert caught.value.code == 2 and "--picture draws 50 photos at most, not 51" in capsys.readouterr().err


def run_command(command: str, **options) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $PYTHON is this interpreter."""
    env = {**os.environ, "PYTHON": sys.executable, **options.pop("env", {})}
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, **options)


@pytest.fixture
def tiny(tmp_path):
    write_checkpoint(tmp_path / "model", TINY)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "p.png")
    return tmp_path


def test_a_file_that_can_t_be_written(tiny):
    """A limit of 100 KB in place of a full disk."""
    command = "ulimit -f 100; $PYTHON -m dinov3_lite features p.png --model model --size 1024 --output f.safetensors"
    done = run_command(command, cwd=tiny)
    assert done.returncode == 1 and done.stderr == "dinov3_lite: f.safetensors: can't be written: File too large\n"
    done = run_command("ulimit -f 100; $PYTHON -m dinov3_lite sample made", cwd=tiny)
    assert done.returncode == 1 and re.fullmatch(
        "dinov3_lite: made: can't be written: .*File too large.*\n", done.stderr
    )
    assert {p.name for p in tiny.iterdir()} == {"model", "p.png"}


@pytest.mark.parametrize(
    ("redirection", "env"),
    [
        ("2>&- >/dev/null", {}),
        (">&- 2>&-", {}),
        (">/dev/full 2>/dev/full", {}),
        (">/dev/full", {"PYTHONUNBUFFERED": "1"}),
        ("| true; exit ${PIPESTATUS[0]}", {}),
        ("| true; exit ${PIPESTATUS[0]}", {"PYTHONUNBUFFERED": "1"}),
        ("", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_the_status_speaks_of_the_work_and_not_of_telling_it(redirection, env, tiny):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tiny / "mödel").symlink_to(tiny / "model")
    environment = {"PYTHONUNBUFFERED": "", **env}
    command = "$PYTHON -m dinov3_lite features p.png p.png --model mödel --output ü.safetensors --size 32"
    done = run_command(f"{command} {redirection}", cwd=tiny, env=environment)
    assert done.returncode == 0, done.stderr
    assert load_file(tiny / "ü.safetensors")["cls_token"].shape == (2, 32)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if env.get("PYTHONIOENCODING"):
        assert "\\xfc.safetensors: cls_token (2, 32)" in done.stdout


@pytest.mark.parametrize(
    ("number", "status", "told"), [(signal.SIGINT, 130, "dinov3_lite: stopped by Ctrl-C\n"), (signal.SIGTERM, 143, "")]
)
def test_signals_end_it_in_order(number, status, told, tiny):
    """The second photo is a pipe that nobody writes to."""
    os.mkfifo(tiny / "pipe.png")
    command = [sys.executable, "-m", "dinov3_lite", "features", "p.png", "pipe.png", "--model", "model"]
    process = subprocess.Popen(command, cwd=tiny, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_signals)
    while not list(tiny.glob(".features.safetensors.*.tmp/*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == told and process.returncode == status
    assert {p.name for p in tiny.iterdir()} == {"model", "p.png", "pipe.png"}


def test_errors_of_other_libraries_are_one_line_with_their_type(monkeypatch, tmp_path, capsys):
    class SafetensorError(Exception):
        pass

    def fail(folder, variant):
        raise SafetensorError("something\nhappened")

    monkeypatch.setattr("dinov3_lite.sample.write_sample", fail)
    assert main(["sample", str(tmp_path / "x")]) == 1
    assert re.fullmatch("dinov3_lite: .*SafetensorError: something happened\n", capsys.readouterr().err)


def test_features_are_on_the_disk_before_they_have_their_name(tiny, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("fsync"), fsync(number))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"rename to {Path(b).name}"), rename(a, b))[1])
    encode(tiny / "p.png", "--model", tiny / "model", "--output", tiny / "f.safetensors", "--size", "16")
    assert done == ["fsync", "rename to f.safetensors", "fsync"]  # the last one of the folder


def test_what_libraries_print_to_a_closed_stderr_does_not_reach_the_next_file(tiny):
    """A C library writes to number 2, which the next file opened would get."""
    code = """
import os, sys
from dinov3_lite import console
def work():
    file = open("f.bin", "wb")
    os.write(2, b"warning of a C library")
    file.close()
sys.exit(console.exit_status("x", work))
"""
    (tiny / "x.py").write_text(code)
    assert run_command("$PYTHON x.py 2>&-", cwd=tiny).returncode == 0
    assert (tiny / "f.bin").read_bytes() == b""


@pytest.mark.parametrize(
    ("count", "shown", "terminal", "drawn"),
    [(2, True, True, True), (1, True, True, False), (2, False, True, False), (2, True, False, False)],
)
def test_a_bar_is_drawn_on_a_terminal_for_more_than_one_item(count, shown, terminal, drawn, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    stream = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    assert list(console.progress(range(count), unit="photo", shown=shown)) == list(range(count))
    assert ("photo" in stream.getvalue()) == drawn
