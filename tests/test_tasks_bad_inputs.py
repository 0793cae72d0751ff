"""What people have instead of what is expected: data sets, masks, videos, files; a right value or a clear sentence each."""

from __future__ import annotations

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, disk_of, write_checkpoint
from safetensors.torch import load_file

from dinov3_lite import DINOv3ViT
from dinov3_lite.__main__ import main
from dinov3_lite.tasks import Recipe, fit, predict
from dinov3_lite.tasks.data import Pair, check_output, check_pairs, find_pairs, read_mask, read_picture
from dinov3_lite.tasks.measures import as_markdown, as_text
from dinov3_lite.tasks.predicting import pictures_of, slide
from dinov3_lite.tasks.tracking import j_and_f, read_frames

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("py_sod_metrics")

CONFIG = replace(TINY, patch_size=16, num_hidden_layers=4)
QUICK = Recipe(size=(32, 32), epochs=2, batch_size=4)
quiet = lambda line: None  # noqa: E731


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG)


def save(file: Path, pixels: np.ndarray, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return file


def half(low: int = 0, high: int = 255, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    mask = np.full(size, low, np.uint8)
    mask[:, size[1] // 2 :] = high
    return mask


def data_set(folder: Path, count: int = 6, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(count):
        save(folder / "Image" / f"{i}.png", rng.integers(0, 256, (20, 30, 3), np.uint8))
        save(folder / "GT" / f"{i}.png", half())
    return folder


# ---- masks


def test_a_palette_of_greys_is_read_as_greys_for_a_foreground(tmp_path):
    """Many programs number a palette's colours by how often they occur: 0 may be white."""
    image = Image.fromarray(half(1, 0), "P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "GT.png")
    pair = Pair(save(tmp_path / "picture.png", np.zeros((20, 30, 3), np.uint8)), tmp_path / "GT.png")
    reading, _ = check_pairs([pair], 1)
    assert np.array_equal(reading.of(pair.mask), half(0, 1))
    reading, _ = check_pairs([pair], 2)
    assert np.array_equal(reading.of(pair.mask), half(1, 0))  # of classes, the numbers


def test_a_mask_with_exif_is_turned_as_its_picture_is(tmp_path):
    """Also by half a turn, where sizes would not tell."""
    exif = Image.Exif()
    for orientation, expected in (
        (1, half()),
        (3, half()[::-1, ::-1]),
        (6, np.rot90(half(), -1)),
        (2, half()[:, ::-1]),
    ):
        exif[0x0112] = orientation
        picture = save(tmp_path / "p.jpg", half(), exif=exif, quality=100)
        mask = save(tmp_path / "m.png", half(), exif=exif)
        assert np.array_equal(read_mask(mask), expected)
        assert abs(read_picture(picture)[..., 0].astype(int) - expected).mean() < 3
        check_pairs([Pair(picture, mask)], 1)


def test_masks_that_hide_in_other_places_are_refused(tmp_path):
    transparent = np.dstack([np.zeros((20, 30, 3), np.uint8), half()])
    frames = [Image.fromarray(half()), Image.fromarray(half(255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for file, message in (
        (save(tmp_path / "alpha.png", transparent), "alpha.png: is a mask in the alpha channel"),
        (tmp_path / "a.gif", "a.gif: holds 2 pictures, as an animation does: expected one"),
    ):
        with pytest.raises(ValueError, match=message):
            read_mask(file)
    with pytest.raises(ValueError, match="a.gif: holds 2 pictures"):
        read_picture(tmp_path / "a.gif")
    frames[0].save(tmp_path / "one.gif")
    assert np.array_equal(read_mask(tmp_path / "one.gif", levels=True), half())
    pair = Pair(save(tmp_path / "p.png", np.zeros((20, 30, 3), np.uint8)), save(tmp_path / "m.jpg", half(0, 2)))
    with pytest.raises(ValueError, match=r"m.jpg: is a JPEG, which changes classes' numbers .*: save masks as PNGs"):
        check_pairs([pair], 3)


def test_a_jpeg_is_a_mask_of_a_foreground(tmp_path):
    pair = Pair(save(tmp_path / "p.png", np.zeros((20, 30, 3), np.uint8)), save(tmp_path / "m.jpg", half()))
    reading, _ = check_pairs([pair], 1)
    assert np.array_equal(reading.of(pair.mask), half(0, 1))


# ---- data sets


def test_an_accent_is_one_letter_however_it_is_written(tmp_path):
    name = "Café\n<b>"
    save(tmp_path / "Image" / f"{unicodedata.normalize('NFD', name)}.png", half())
    save(tmp_path / "GT" / f"{unicodedata.normalize('NFC', name)}.png", half())
    (pair,) = find_pairs(tmp_path)
    assert pair.picture.name != pair.mask.name


def test_a_data_set_is_not_given_twice(checkpoint, tmp_path):
    folder = data_set(tmp_path / "d")
    with pytest.raises(ValueError, match="0.png: is given twice"):
        fit([folder, folder], DINOv3ViT.from_pretrained(checkpoint), tmp_path / "h", recipe=QUICK, report=quiet)


def test_where_nothing_can_be_written_is_said_before_the_work(checkpoint, tmp_path):
    folder = data_set(tmp_path / "d")
    model = DINOv3ViT.from_pretrained(checkpoint)
    if os.path.isdir("/proc/self"):
        with pytest.raises(OSError, match="/proc/self/h: can't be written"):
            fit(folder, model, "/proc/self/h", recipe=QUICK)
    with pytest.raises(IsADirectoryError, match="d: is a folder: name a file in it"):
        fit(folder, model, folder, recipe=QUICK)
    with pytest.raises(ValueError, match="is one of the inputs"):
        check_output(folder / "Image" / "0.png", [folder / "GT" / ".." / "Image" / "0.png"])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_happens_to_a_picture_meanwhile_is_one_sentence(workers, checkpoint, tmp_path):
    """After all were looked at and before they are read: in this process, or in one that reads for it."""
    folder = data_set(tmp_path / "d", 4)
    model = DINOv3ViT.from_pretrained(checkpoint)
    for file in (folder / "Image" / "1.png", folder / "GT" / "1.png"):
        content = file.read_bytes()
        for damage, kind, said in (
            (Path.unlink, FileNotFoundError, "[Errno 2] No such file or directory: '{}'"),
            (lambda f: f.write_bytes(content[:-30]), ValueError, "{}: "),  # noqa: B023
        ):

            def report(line: str, file: Path = file, damage=damage) -> None:
                damage(file)

            with pytest.raises(kind) as raised:
                fit(folder, model, tmp_path / "h", recipe=QUICK, report=report, workers=workers)
            assert str(raised.value).startswith(said.format(file)) and "\n" not in str(raised.value)
            file.write_bytes(content)
    assert not (tmp_path / "h").exists()


# ---- kills


class Killed(Exception):
    pass


def test_an_unfinished_run_says_what_is_other(checkpoint, tmp_path):
    folder = data_set(tmp_path / "d")
    output = tmp_path / "h"

    def run(report=quiet, **changes):
        recipe = replace(QUICK, **{k: v for k, v in changes.items() if k in ("epochs", "lr", "seed")})
        options = {k: v for k, v in changes.items() if k in ("unfreeze", "held_out", "classes")}
        fit(folder, DINOv3ViT.from_pretrained(checkpoint), output, recipe=recipe, report=report, **options)

    def dies(line: str) -> None:
        if line.startswith("epoch 1/"):
            raise Killed

    with pytest.raises(Killed):
        run(dies)
    for changes, said in (
        ({"epochs": 9}, "with epochs 2, not 9: run"),
        ({"lr": 0.1, "seed": 7}, r"with lr 0.002, not 0.1; seed 0, not 7; pictures to train on 5 \(\w+\), not 5"),
        ({"unfreeze": 1}, r"with parameters that train \d+ \(\w+\), not \d+ \(\w+\); frozen weights"),
        ({"held_out": 0.5}, r"with pictures to train on 5 \(\w+\), not 3 \(\w+\); pictures held out 1 "),
    ):
        with pytest.raises(ValueError, match=f"h.resume: is of an unfinished run {said}"):
            run(**changes)
    run()
    assert output.exists() and not (tmp_path / "h.resume").exists()


@pytest.mark.parametrize("dies_in", ["_write_state", "save_head"])
def test_a_run_that_is_killed_while_it_writes_goes_on(dies_in, checkpoint, tmp_path, monkeypatch):
    """Between the state and the head in either order: the head is there at the end, and is the best epoch's."""
    import dinov3_lite.tasks.fitting as fitting
    import dinov3_lite.tasks.loop as loop

    folder = data_set(tmp_path / "d")

    def run(name: str):
        return fit(folder, DINOv3ViT.from_pretrained(checkpoint), tmp_path / name, recipe=QUICK, report=quiet)

    monkeypatch.setattr(
        loop, "_choice", lambda measures: "loss" in measures
    )  # as the history's: the first stays the best
    whole = run("whole")
    assert whole.best == 0
    module = loop if dies_in == "_write_state" else fitting
    with monkeypatch.context() as dying:

        def die(*_: object) -> None:
            raise Killed

        dying.setattr(module, dies_in, die)
        with pytest.raises(Killed):
            run("part")
    assert run("part") == whole
    ours, theirs = (load_file(tmp_path / name) for name in ("part", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- predict and evaluate


@pytest.fixture(scope="module")
def head(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    recipe = replace(QUICK, epochs=1)
    fit(data_set(folder / "d"), DINOv3ViT.from_pretrained(checkpoint), folder / "h", recipe=recipe, report=quiet)
    return folder / "h"


def test_a_folder_of_data_sets_is_predicted_and_evaluated_as_it_is(checkpoint, head, tmp_path, capsys):
    for name, seed in (("伪装", 1), ("NC|4K <b>", 2)):
        data_set(tmp_path / "TestDataset" / name, 2, seed)
    out = tmp_path / "out"
    predicting = ["predict", str(tmp_path / "TestDataset"), "--model", str(checkpoint), "--head", str(head)]
    assert main([*predicting, "--output", str(out), "--overlay"]) == 0
    assert sorted(str(f.relative_to(out)) for f in out.rglob("*.png") if "NC" in str(f)) == sorted(
        f"NC|4K <b>/{name}.png" for name in ("0", "1", "overlay/0", "overlay/1")
    )
    assert main(["evaluate", str(out), str(tmp_path / "TestDataset"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out.split("\n", 2)[2])) == {"伪装", "NC|4K <b>"}
    one = pictures_of([tmp_path / "TestDataset" / "伪装"])
    assert list(one) == ["0", "1"] and all(file.parent.name == "Image" for file in one.values())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no pictures, and no data sets"):
        pictures_of([tmp_path / "empty"])


def test_one_damaged_picture_does_not_keep_the_others_from_being_predicted(checkpoint, head, tmp_path, capsys):
    for name in ("a", "c"):
        save(tmp_path / "in" / f"{name}.png", half())
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:60])
    arguments = ["predict", str(tmp_path / "in"), "--model", str(checkpoint), "--head", str(head)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.count("b.png") == 1 and "2 predictions" in said.out
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_pictures_of_extreme_shapes(checkpoint, head):
    from dinov3_lite.tasks import load_head

    network, settings = load_head(head, DINOv3ViT.from_pretrained(checkpoint))
    for size in ((1, 1), (1, 400), (400, 1)):
        for sliding in (False, True):
            pixels = np.full((*size, 3), 90, np.uint8)
            assert predict(network, pixels, settings, sliding=sliding).shape == size
    with pytest.raises(ValueError, match="1 x 200000 pixels would be enlarged to 32 x 6400000, so that a window of 32"):
        slide(lambda x: x, torch.zeros(1, 3, 1, 200_000), (32, 32))


def test_predictions_of_0_and_1_are_told(tmp_path, capsys):
    save(tmp_path / "gt" / "a.png", half())
    save(tmp_path / "pred" / "a.png", half(0, 1))
    assert main(["evaluate", str(tmp_path / "pred"), str(tmp_path / "gt"), "--json"]) == 0
    assert "predictions hold 0 and 1 and were read as 0 and 1 of 255" in capsys.readouterr().err


def test_tables_with_names_of_any_kind():
    table = {"a\n|<b>": {"S": 0.5}, "伪装": {"S": 0.25}}
    assert as_text(table).splitlines() == [
        "data set       S",
        "a\\n|<b>   0.5000",
        "伪装      0.2500",
    ]
    assert as_markdown(table).splitlines()[2:] == ["| a\\n\\|&lt;b&gt; | 0.5000 |", "| 伪装 | 0.2500 |"]


# ---- track


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for i in (1, 2, 10, 9):
        save(tmp_path / f"frame{i}.png", np.full((4, 4, 3), i, np.uint8))
    assert [(name, frame[0, 0, 0]) for name, frame in read_frames(tmp_path)] == [
        ("frame1", 1),
        ("frame2", 2),
        ("frame9", 9),
        ("frame10", 10),
    ]
    save(tmp_path / "frame1.jpg", half())
    with pytest.raises(ValueError, match="frame1.jpg and frame1.png have one stem"):
        list(read_frames(tmp_path))


def test_truth_that_does_not_fit_is_said_before_anything_is_followed(checkpoint, tmp_path, capsys):
    for i in range(3):
        save(tmp_path / "frames" / f"{i}.png", np.random.default_rng(i).integers(0, 256, (32, 48, 3), np.uint8))
        save(tmp_path / "truth" / f"{i}.png", half(0, 1, (32, 48)))
    mask = save(tmp_path / "first.png", half(0, 2, (32, 48)))
    command = ["track", str(tmp_path / "frames"), "--model", str(checkpoint), "--size", "32", "--mask", str(mask)]
    command += ["--output", str(tmp_path / "out"), "--truth", str(tmp_path / "truth")]
    assert main(command) == 1 and "0.png: has other values than" in capsys.readouterr().err
    (tmp_path / "truth" / "0.png").unlink()
    assert main(command) == 1 and "holds no mask for the frame 0" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    save(tmp_path / "truth" / "0.png", half(0, 2, (32, 48)))
    assert main([*command, "--overlay"]) == 0 and "J&F" in capsys.readouterr().out
    drawn = np.array(Image.open(tmp_path / "out" / "overlay" / "0.png")).astype(int)
    frame = np.array(Image.open(tmp_path / "frames" / "0.png")).astype(int)
    assert np.array_equal(drawn[:, :24], frame[:, :24]) and abs(drawn - frame)[:, 24:].mean() > 20
    with pytest.raises(ValueError, match="expected one size"):
        j_and_f([half()] * 3, [half()] + [half(size=(20, 32))] * 2)
    with pytest.raises(ValueError, match="expected at least 3 frames"):
        j_and_f([half()] * 2, [half()] * 2)


@pytest.mark.parametrize("way", ["mask", "truth", "link", "overlay"])
def test_masks_never_lie_over_what_is_read(way, checkpoint, tmp_path, capsys):
    for i in range(3):
        save(tmp_path / "frames" / f"{i}.png", np.random.default_rng(i).integers(0, 256, (32, 48, 3), np.uint8))
        save(tmp_path / "true" / "overlay" / f"{i}.png", half(0, 2, (32, 48)))
    truth = tmp_path / "true" / "overlay"
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in truth.iterdir():
        (linked / file.name).symlink_to(file)
    mask, output, more = {
        "mask": (truth / "0.png", truth, []),
        "truth": (tmp_path / "true.png", truth, ["--truth", str(truth)]),
        "link": (tmp_path / "true.png", truth, ["--truth", str(linked)]),
        "overlay": (truth / "0.png", tmp_path / "true", ["--overlay"]),
    }[way]
    save(tmp_path / "true.png", half(0, 2, (32, 48)))
    before = {file: file.read_bytes() for file in truth.iterdir()}
    command = ["track", str(tmp_path / "frames"), "--mask", str(mask), "--model", str(checkpoint), "--size", "32"]
    assert main([*command, "--output", str(output), *more]) == 1
    said = "the folder of frames or true masks" if way == "truth" else "0.png: is one of the inputs"
    assert said in capsys.readouterr().err
    assert {file: file.read_bytes() for file in truth.iterdir()} == before


def test_a_video_has_numbers_that_may_lie_over_what_is_read(checkpoint, tmp_path, capsys):
    mask = save(tmp_path / "masks" / "00000.png", half(0, 2, (32, 48)))
    (tmp_path / "v.mp4").write_bytes(b"")
    command = ["track", str(tmp_path / "v.mp4"), "--mask", str(mask), "--model", str(checkpoint)]
    assert main([*command, "--output", str(tmp_path / "masks")]) == 1
    assert "00000.png: is one of the inputs" in capsys.readouterr().err
    pytest.importorskip("cv2")
    first = mask.rename(tmp_path / "masks" / "first.png")  # no frame's name: the folder will do
    command[3] = str(first)
    assert main([*command, "--output", str(tmp_path / "masks")]) == 1
    assert "v.mp4: can't be read as a video" in capsys.readouterr().err


# ---- disks that are full


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_is_one_line_and_leaves_nothing_broken(checkpoint, head, tmp_path, capsys):
    """Each output is larger than the limit, and would be cut off there: a head, a run's state, masks, drawings, a page."""
    folder = data_set(tmp_path / "d", 2)
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    picture = str(save(tmp_path / "noise.png", noise))
    first = str(save(tmp_path / "first.png", half(size=(120, 160))))
    out, model = tmp_path / "out", ["--model", str(checkpoint)]
    out.mkdir()
    small = ["--size", "32"]
    fitted = ["fit", str(folder), *small, "--epochs", "2", "--output", str(out / "head.safetensors")]
    for size, command, named in (
        (1_000_000, fitted, "head.safetensors.resume"),
        (40, ["predict", picture, "--head", str(head), "--output", str(out)], "noise.png"),
        (3_000, ["predict", picture, "--head", str(head), "--output", str(out), "--overlay"], "overlay/noise.png"),
        (
            40,
            ["track", *map(str, (folder / "Image", "--mask", folder / "GT" / "0.png")), *small, "--output", str(out)],
            "0.png",
        ),
        (100, ["match", picture, first, *small, "--output", str(out / "m.json")], "m.json"),
        (
            3_000,
            ["match", picture, first, *small, "--output", str(out / "m.json"), "--picture", str(out / "m.jpg")],
            "m.jpg",
        ),
        (9_000, ["explore", picture, *small, "--output", str(out / "page.html")], "page.html"),
        (3_000, ["features", picture, *small, "--output", str(out / "f"), "--picture", str(out / "f.jpg")], "f.jpg"),
    ):
        with disk_of(size):
            assert main([*command, *model]) == 1, command
        said = capsys.readouterr().err
        assert said == f"dinov3_lite: {out / named}: File too large\n", said
        assert not (out / named).exists()
        assert not list(out.rglob(".*"))


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_head_that_does_not_go_onto_the_disk_is_written_by_the_next_run(checkpoint, tmp_path, monkeypatch):
    """The state of the run was written before it, on a disk that became full between the two."""
    import dinov3_lite.tasks.fitting as fitting

    folder, file = data_set(tmp_path / "d", 4), tmp_path / "h"
    real = fitting.save_head

    def save_head(*arguments):
        with disk_of(100_000):
            real(*arguments)

    def run() -> None:
        fit(folder, DINOv3ViT.from_pretrained(checkpoint), file, recipe=QUICK, report=quiet)

    with monkeypatch.context() as full:
        full.setattr(fitting, "save_head", save_head)
        with pytest.raises(OSError, match=f"File too large: '{file}'"):
            run()
    assert not file.exists() and file.with_name("h.resume").exists()
    run()
    assert sum(t.numel() for t in load_file(file).values()) > 100_000 / 4 and not file.with_name("h.resume").exists()
