"""fit, predict and evaluate: data sets on disk, the loop, the head's file, the measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, trained_like, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dinov3_lite import DINOv3ViT, build_dinov3_encoder
from dinov3_lite.__main__ import main
from dinov3_lite.tasks import DenseHead, Recipe, Segmenter, evaluate, fit, load_head, predict, train
from dinov3_lite.tasks.data import Pair, Reading, check_pairs, find_pairs, hold_out, read_mask
from dinov3_lite.tasks.head import NormedQuarters, fingerprint
from dinov3_lite.tasks.loop import as_bytes, measure
from dinov3_lite.tasks.losses import class_loss, structure_loss
from dinov3_lite.tasks.measures import Measures
from dinov3_lite.tasks.predicting import slide

Image = pytest.importorskip("PIL.Image")
sod = pytest.importorskip("py_sod_metrics")
import camouflage  # noqa: E402 - needs Pillow

CONFIG = replace(TINY, patch_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
SIZE = (64, 80)
QUICK = Recipe(size=SIZE, epochs=2, batch_size=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return camouflage.write(tmp_path_factory.mktemp("data") / "made", 12, seed=0, size=(96, 120))


def save(folder: Path, name: str, pixels: np.ndarray, **kwargs) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name, **kwargs)
    return folder / name


def grey(height: int = 20, width: int = 30, value: int = 0) -> np.ndarray:
    return np.full((height, width), value, np.uint8)


def half(low: int = 0, high: int = 255, height: int = 20, width: int = 30) -> np.ndarray:
    mask = grey(height, width, low)
    mask[:, width // 2 :] = high
    return mask


# ---- data sets on disk


@pytest.mark.parametrize(
    "names", [("Image", "GT"), ("Imgs", "GT"), ("im", "gt"), ("images", "masks"), ("Image", "Mask")]
)
def test_pairs_are_found_under_the_names_of_the_field(names, tmp_path):
    for stem in ("b", "a"):
        save(tmp_path / names[0], f"{stem}.jpg", np.zeros((20, 30, 3), np.uint8))
        save(tmp_path / names[1], f"{stem}.png", half())
    (tmp_path / names[0] / "Thumbs.db").write_text("")
    (tmp_path / names[0] / "._a.jpg").write_text("")
    pairs = find_pairs(tmp_path)
    assert [(p.picture.name, p.mask.name) for p in pairs] == [("a.jpg", "a.png"), ("b.jpg", "b.png")]


def test_what_is_wrong_with_a_data_set_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="expected a folder of pictures .*image.* and a folder of masks"):
        find_pairs(tmp_path)
    save(tmp_path / "one" / "Image", "a.png", grey())
    save(tmp_path / "one" / "GT", "a.png", half())
    with pytest.raises(FileNotFoundError, match="its folders .*one are data sets"):
        find_pairs(tmp_path)
    save(tmp_path / "one" / "Image", "alone.png", grey())
    with pytest.raises(ValueError, match="alone.png: has no mask of its stem in .*GT"):
        find_pairs(tmp_path / "one")
    save(tmp_path / "one" / "GT", "alone.png", half())
    save(tmp_path / "one" / "GT", "c.png", half())
    with pytest.raises(ValueError, match="c.png: has no picture of its stem in .*Image"):
        find_pairs(tmp_path / "one")
    save(tmp_path / "one" / "GT", "c.bmp", half())
    with pytest.raises(ValueError, match="c.bmp and c.png have one stem"):
        find_pairs(tmp_path / "one")
    (tmp_path / "one" / "masks").mkdir()
    with pytest.raises(ValueError, match="holds the folders GT and masks: which"):
        find_pairs(tmp_path / "one")


@pytest.mark.parametrize(
    ("values", "foreground"),
    [
        ([half(0, 255)], 255),
        ([half(0, 1)], 1),
        ([half(0, 38)], 38),
        ([half(0, 128)], 128),
        ([half(128, 255)], 255),
        ([half(0, 255), half(0, 200), half(100, 254)], 129),  # grey levels: above 128
    ],
)
def test_masks_of_any_8_bit_kind(values, foreground, tmp_path):
    pairs = []
    for i, mask in enumerate(values):
        picture = save(tmp_path / "Image", f"{i}.png", np.zeros((20, 30, 3), np.uint8))
        pairs.append(Pair(picture, save(tmp_path / "GT", f"{i}.png", mask)))
    reading, empty = check_pairs(pairs, 1)
    assert not empty
    for pair, mask in zip(pairs, values, strict=True):
        assert np.array_equal(reading(read_mask(pair.mask)), mask >= foreground)


def test_masks_in_other_modes(tmp_path):
    mask = half(0, 255)
    stored = {
        "1": Image.fromarray(mask).convert("1"),
        "RGB": Image.fromarray(mask).convert("RGB"),
        "RGBA": Image.fromarray(mask).convert("RGBA"),
        "LA": Image.fromarray(mask).convert("LA"),
    }
    for mode, image in stored.items():
        image.save(tmp_path / f"{mode}.png")
        assert np.array_equal(read_mask(tmp_path / f"{mode}.png"), mask), mode
    palette = Image.fromarray(half(0, 3), "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "P.png")
    assert np.array_equal(read_mask(tmp_path / "P.png"), half(0, 3))  # the classes' numbers, not their colours


@pytest.mark.parametrize(
    ("masks", "classes", "message"),
    [
        ([half(0, 1).astype(np.uint16)], 1, r"0.png: is a mask of more than 8 bits \(I;16\)"),
        ([np.dstack([half(), grey(), grey()])], 1, "0.png: is a mask in colours"),
        ([grey(), grey()], 1, "GT: every pixel of every mask is 0: there is one class only"),
        ([grey(value=255)], 1, "every pixel of every mask is 255: there is one class only"),
        ([half(), half(0, 1)], 1, "1.png: holds 0 and 1 only, and .*0.png values up to 255: what is foreground"),
        ([half(0, 1), half(2, 5)], 1, "hold the values 0, 1, 2, 5: what is foreground.*number of classes, 6"),
        ([half(0, 1), half(2, 5)], 4, "1.png: holds the value 5, and 4 classes have the numbers 0 to 3"),
        ([half(1, 255)], 3, "the masks hold the values 1, 255: there is one class only"),
        ([half(height=21)], 1, "0.png: is 21 x 30 pixels and its picture .*20 x 30"),
        ([half(), half(height=30, width=20)], 1, "1.png: is 30 x 20 pixels and its picture .*20 x 30"),
    ],
)
def test_masks_that_leave_a_question_are_refused(masks, classes, message, tmp_path):
    pairs = []
    for i, mask in enumerate(masks):
        picture = save(tmp_path / "Image", f"{i}.png", np.zeros((20, 30, 3), np.uint8))
        pairs.append(Pair(picture, save(tmp_path / "GT", f"{i}.png", mask)))
    with pytest.raises(ValueError, match=message):
        check_pairs(pairs, classes)


def test_a_mask_fits_the_picture_as_its_exif_turns_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = save(tmp_path, "p.jpg", np.zeros((20, 30, 3), np.uint8), exif=exif)
    turned = Pair(picture, save(tmp_path, "turned.png", half(height=30, width=20)))
    check_pairs([turned], 1)
    with pytest.raises(ValueError, match="its picture .*30 x 20: a mask must"):
        check_pairs([Pair(picture, save(tmp_path, "stored.png", half()))], 1)


def test_a_part_is_held_out_by_chance(tmp_path):
    pairs = [Pair(Path(f"{i}.jpg"), Path(f"{i}.png")) for i in range(40)]
    training, held = hold_out(pairs, 0.1, seed=3)
    assert len(held) == 4 and sorted(training + held, key=pairs.index) == pairs
    assert hold_out(pairs, 0.1, seed=3) == (training, held) != hold_out(pairs, 0.1, seed=4)
    with pytest.raises(ValueError, match="held out is 1.0"):
        hold_out(pairs, 1.0, 0)
    with pytest.raises(ValueError, match="1 pair of picture and mask: expected at least 2"):
        hold_out(pairs[:1], 0.1, 0)


# ---- losses


def test_the_structure_loss_is_its_equation():
    logits, masks = torch.randn(2, 1, 24, 20, dtype=torch.float64), (torch.rand(2, 24, 20) > 0.6).long()
    expected = []
    for z, m in zip(logits[:, 0].tolist(), masks.tolist(), strict=True):
        z, m = np.array(z), np.array(m, float)
        padded = np.pad(m, 15)
        mean = np.array([[padded[i : i + 31, j : j + 31].sum() / 31**2 for j in range(20)] for i in range(24)])
        w, p = 1 + 5 * abs(mean - m), 1 / (1 + np.exp(-z))
        bce = -(m * np.log(p) + (1 - m) * np.log(1 - p))
        iou = (1 + (w * p * m).sum()) / (1 + (w * (p + m - p * m)).sum())
        expected.append((w * bce).sum() / w.sum() + 1 - iou)
    torch.testing.assert_close(structure_loss(logits, masks).item(), float(np.mean(expected)))


def test_pixels_that_are_not_looked_at_change_no_loss():
    logits, masks = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 4, 4))
    masks[0, 0] = 255
    whole = torch.nn.functional.cross_entropy(logits[:, :, 1:], masks[:, 1:])
    torch.testing.assert_close(class_loss(logits, masks), whole)
    assert class_loss(logits, torch.full_like(masks, 255)) == 0


# ---- fit


def test_a_head_learns_what_a_threshold_does_not_see(checkpoint, tmp_path):
    """On camouflage: the loss falls, the held-out measure rises well above a colour threshold's, the file is small."""
    folder = camouflage.write(tmp_path / "made", 40, seed=0, size=(96, 112))
    output = tmp_path / "head.safetensors"
    model = DINOv3ViT.from_pretrained(checkpoint)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fitted = fit(
        folder, model, output, recipe=Recipe(size=(96, 112), epochs=8, batch_size=4, lr=4e-3), report=lambda _: None
    )
    history = fitted.history
    assert len(history) == 8 and history[-1]["loss"] < 0.85 * history[0]["loss"]
    assert history[fitted.best]["S"] == max(entry["S"] for entry in history)
    rng = np.random.default_rng(1)
    threshold = np.mean([camouflage.colour_threshold(*camouflage.example(rng, (96, 112))) for _ in range(8)])
    assert threshold < 0.3
    assert history[fitted.best]["IoU"] > threshold + 0.1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert output.stat().st_size < 4 * (sum(t.numel() for t in load_file(output).values()) + 5000)
    assert all(name.startswith("head.") for name in load_file(output))


def test_a_head_begins_with_little_foreground():
    maps, x = [torch.randn(2, 64, 4, 5) for _ in range(4)], torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert DenseHead((64,) * 4, 1)(maps, x).sigmoid().mean() < 0.2
        assert 0.2 < DenseHead((64,) * 4, 3)(maps, x).softmax(1)[:, 0].mean() < 0.5  # classes begin alike


def test_the_maps_are_those_of_a_quarter_of_the_depth_each():
    assert NormedQuarters(DINOv3ViT(replace(CONFIG, num_hidden_layers=8))).blocks == [1, 3, 5, 7]


def test_weights_that_differ_anywhere_have_another_fingerprint():
    model = DINOv3ViT(CONFIG)
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[64:] += 1.0
    assert fingerprint(model) != before


def test_the_head_has_a_million_parameters_for_every_released_width():
    for width in (384, 768, 1024):
        count = sum(p.numel() for p in DenseHead((width,) * 4, 1).parameters())
        assert 0.8e6 < count < 1.5e6


class Killed(Exception):
    pass


@pytest.mark.parametrize("unfreeze", [0, 1])
def test_a_run_that_was_killed_goes_on_with_the_same_curve(checkpoint, data, tmp_path, unfreeze):
    def run(output: Path, dies_after: int = 99) -> list:
        def report(line: str) -> None:
            if line.startswith(f"epoch {dies_after}/"):
                raise Killed

        model = DINOv3ViT.from_pretrained(checkpoint)
        recipe = replace(QUICK, epochs=3)
        return fit(data, model, output, recipe=recipe, unfreeze=unfreeze, report=report).history

    whole = run(tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        run(tmp_path / "part.safetensors", dies_after=2)
    assert (tmp_path / "part.safetensors.resume").exists()
    assert run(tmp_path / "part.safetensors") == whole
    assert (tmp_path / "part.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["part.safetensors", "whole.safetensors"]


def test_a_run_does_not_go_on_from_another(checkpoint, data, tmp_path):
    output = tmp_path / "h.safetensors"

    def stop(line: str) -> None:
        if line.startswith("epoch 1/"):
            raise Killed

    with pytest.raises(Killed):
        fit(data, DINOv3ViT.from_pretrained(checkpoint), output, recipe=QUICK, report=stop)
    other = write_checkpoint(tmp_path / "other", CONFIG, trained_like(CONFIG, seed=5))
    for source, recipe in ((checkpoint, replace(QUICK, lr=1e-4)), (other, QUICK)):
        with pytest.raises(ValueError, match="h.safetensors.resume: is of an unfinished run with (lr|frozen weights) "):
            fit(data, DINOv3ViT.from_pretrained(source), output, recipe=recipe)
    (tmp_path / "h.safetensors.resume").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="is no state of an unfinished run"):
        fit(data, DINOv3ViT.from_pretrained(checkpoint), output, recipe=QUICK)


def test_what_thaws_is_what_trains(checkpoint, data, tmp_path):
    model = DINOv3ViT.from_pretrained(checkpoint)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(data, model, tmp_path / "h.safetensors", recipe=QUICK, unfreeze=2, report=lambda _: None)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"2", "3"}
    assert "norm.weight" in changed and "patch_embed.proj.weight" not in changed
    # beside the checkpoint that it was fitted to, the file gives the network back, its blocks included
    _, settings = load_head(tmp_path / "h.safetensors", fresh := DINOv3ViT.from_pretrained(checkpoint))
    assert settings.unfreeze == 2 and fresh.weights_id == "fitted"
    for name, p in model.named_parameters():
        assert torch.equal(dict(fresh.named_parameters())[name], p), name
    with pytest.raises(ValueError, match="was fitted to the backbone"):  # that is no longer the checkpoint's
        load_head(tmp_path / "h.safetensors", fresh)


def test_a_frozen_backbone_is_prepared_and_gives_the_same(checkpoint):
    model = DINOv3ViT.from_pretrained(checkpoint)
    x = torch.randn(2, 3, *SIZE)
    network = Segmenter(model, DenseHead((64,) * 4, 1)).train()
    assert not model.training
    maps = model.get_intermediate_layers(x, n="quarters", reshape=True)
    torch.testing.assert_close(network(x), network.head(list(maps), x), rtol=1e-3, atol=1e-4)
    saved: list = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        network._maps(x)
    assert not saved
    wide = network.double()(x.double())  # no longer what was prepared in float32
    maps = model.double().get_intermediate_layers(x.double(), n="quarters", reshape=True)
    torch.testing.assert_close(wide, network.head(list(maps), x.double()), rtol=1e-9, atol=1e-9)
    network(x.double())
    assert network._prepared
    model.blocks[3].requires_grad_(True)
    network(x.double())
    assert not network._prepared  # whose weights are packed a second time


def test_any_network_is_fitted_by_the_same_loop(checkpoint, data):
    """A decoder on the pyramid encoder, with a loss of its own on what it returns in training."""

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build_dinov3_encoder(pretrained_path=checkpoint)
            self.align = torch.nn.ModuleList(torch.nn.Conv2d(c, 8, 1) for c in self.encoder.channels)
            self.out = torch.nn.Conv2d(8, 1, 1)

        def forward(self, x):
            maps = [align(m) for align, m in zip(self.align, self.encoder(x), strict=True)]
            size = maps[0].shape[2:]
            fused = sum(torch.nn.functional.interpolate(m, size, mode="bilinear") for m in maps)
            return (self.out(fused), fused) if self.training else self.out(fused)

    def loss(outputs, masks):
        logits = torch.nn.functional.interpolate(outputs[0], masks.shape[1:], mode="bilinear")
        return structure_loss(logits, masks) + 1e-3 * outputs[1].square().mean()

    pairs = find_pairs(data)
    reading, _ = check_pairs(pairs, 1)
    best: list[dict] = []
    fitted = train(
        Decoder(), pairs[:10], pairs[10:], reading, QUICK, loss=loss, on_best=best.append, report=lambda _: None
    )
    assert fitted.history[1]["loss"] < fitted.history[0]["loss"] and best[-1]["S"] == fitted.history[fitted.best]["S"]


def test_empty_masks_are_learned_from_and_told(checkpoint, tmp_path):
    for i in range(6):
        save(tmp_path / "d" / "im", f"{i}.png", grey(value=40 * i))
        save(tmp_path / "d" / "gt", f"{i}.png", half() if i < 4 else grey())
    lines: list[str] = []
    model = DINOv3ViT.from_pretrained(checkpoint)
    fitted = fit(tmp_path / "d", model, tmp_path / "h", recipe=replace(QUICK, epochs=1), report=lines.append)
    assert lines[0].endswith("4.png: is empty, as 1 more are, of 6 masks: learned as pictures with nothing to find")
    assert np.isfinite(list(fitted.history[0].values())).all()


class Normed(torch.nn.Module):
    """A small network of one's own, with running statistics, which no optimiser touches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 4, 4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1)
        )

    def forward(self, x):
        return self.layers(x)


def test_running_statistics_are_those_of_the_best_epoch_and_outlive_a_kill(data, tmp_path, monkeypatch):
    first_stays_best = lambda measures: "loss" in measures  # noqa: E731 - what the history holds, and a new one does not
    monkeypatch.setattr("dinov3_lite.tasks.loop._choice", first_stays_best)
    pairs = find_pairs(data)
    reading, _ = check_pairs(pairs, 1)
    recipe = replace(QUICK, epochs=3, lr=0.05)

    def run(dies_after: int = 99):
        def report(line: str) -> None:
            if line.startswith(f"epoch {dies_after}/"):
                raise Killed

        network = Normed()
        return train(network, pairs[:8], pairs[8:], reading, recipe, resume=tmp_path / "r", report=report), network

    fitted, network = run()
    assert fitted.best == 0  # the last epoch's statistics would be others
    best = {name: value for name, value in fitted.history[0].items() if name != "loss"}
    assert measure(network, pairs[8:], reading, recipe) == best
    with pytest.raises(Killed):
        run(dies_after=2)
    assert run()[0] == fitted


def test_several_classes(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        mask = rng.integers(0, 3, (4, 5), np.uint8).repeat(16, 0).repeat(16, 1)
        colours = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)
        save(tmp_path / "d" / "images", f"{i}.png", colours[mask])
        mask[:8] = 255
        save(tmp_path / "d" / "masks", f"{i}.png", mask)
    output = tmp_path / "h.safetensors"
    recipe = Recipe(size=SIZE, epochs=12, batch_size=2, lr=5e-3)
    fitted = fit(
        tmp_path / "d",
        model := DINOv3ViT.from_pretrained(checkpoint),
        output,
        recipe=recipe,
        classes=3,
        report=lambda _: None,
    )
    assert fitted.history[fitted.best]["IoU"] > 0.7
    network, settings = load_head(output, model)
    mask = np.array(Image.open(tmp_path / "d" / "masks" / "0.png"))
    prediction = predict(network, np.array(Image.open(tmp_path / "d" / "images" / "0.png")), settings)
    assert (prediction == mask)[8:].mean() > 0.8 and prediction.max() <= 2


def test_bad_settings(checkpoint, data, tmp_path):
    model = DINOv3ViT.from_pretrained(checkpoint)
    output = tmp_path / "h.safetensors"
    with pytest.raises(ValueError, match="image height 60 and width 80 must be multiples of the patch size 16"):
        fit(data, model, output, recipe=replace(QUICK, size=(60, 80)))
    with pytest.raises(ValueError, match="classes is 300"):
        fit(data, model, output, recipe=QUICK, classes=300)
    with pytest.raises(ValueError, match="epochs is 0"):
        Recipe(epochs=0)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fit(data, model, tmp_path / "no" / "h.safetensors", recipe=QUICK)
    with pytest.raises(ValueError, match="the loss is (nan|inf)"):
        fit(data, model, output, recipe=replace(QUICK, lr=1e30), report=lambda _: None)
    output.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="h.safetensors: is there already"):
        fit(data, model, output, recipe=QUICK)
    assert output.read_bytes() == b"mine"


# ---- the file


@pytest.fixture(scope="module")
def head(checkpoint, data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("head") / "head.safetensors"
    fit(data, DINOv3ViT.from_pretrained(checkpoint), output, recipe=QUICK, report=lambda _: None)
    return output


def test_a_head_beside_another_backbone_is_refused(head, checkpoint, tmp_path):
    other = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path / "o", CONFIG, trained_like(CONFIG, seed=9)))
    ours = fingerprint(DINOv3ViT.from_pretrained(checkpoint))
    with pytest.raises(ValueError, match=f"with weights {ours}, and this is .* with weights {fingerprint(other)}"):
        load_head(head, other)


def test_a_head_beside_its_backbone_in_another_layout_is_taken(head, checkpoint, tmp_path):
    import convert

    converted = convert.convert(checkpoint, tmp_path / "lite.safetensors")
    for dtype in (None, torch.bfloat16):
        load_head(head, DINOv3ViT.from_pretrained(converted, dtype=dtype))


def test_files_that_are_no_head(checkpoint, head, tmp_path):
    model = DINOv3ViT.from_pretrained(checkpoint)
    with pytest.raises(FileNotFoundError, match="no such file: expected a head"):
        load_head(tmp_path / "no.safetensors", model)
    (tmp_path / "cut.safetensors").write_bytes(head.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.safetensors: is no whole safetensors file"):
        load_head(tmp_path / "cut.safetensors", model)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", {"format": "pt"})  # as checkpoints have it
    with pytest.raises(ValueError, match="holds other tensors than a head's: expected dinov3-lite head 1"):
        load_head(tmp_path / "other.safetensors", model)


# ---- predict


def test_predictions_have_the_pictures_sizes_and_stems(checkpoint, head, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (90, 130)), ("b.c.png", (64, 80)), ("tiny.png", (9, 7))):
        save(tmp_path / "in", name, rng.integers(0, 256, (*size, 3), np.uint8))
    arguments = ["predict", str(tmp_path / "in"), "--model", str(checkpoint), "--head", str(head)]
    assert main([*arguments, "--output", str(tmp_path / "out" / "deep"), "--overlay"]) == 0
    out = tmp_path / "out" / "deep"
    assert sorted(f.name for f in out.iterdir()) == ["a.png", "b.c.png", "overlay", "tiny.png"]
    network, settings = load_head(head, DINOv3ViT.from_pretrained(checkpoint))
    for name, size in (("a", (130, 90)), ("b.c", (80, 64)), ("tiny", (7, 9))):
        image = Image.open(out / f"{name}.png")
        assert image.mode == "L" and image.size == size
        assert Image.open(out / "overlay" / f"{name}.png").size == size
    pixels = np.array(Image.open(tmp_path / "in" / "b.c.png"))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor(settings.mean).view(3, 1, 1)) / torch.tensor(settings.std).view(3, 1, 1)
    logits = torch.nn.functional.interpolate(network(x), (64, 80), mode="bilinear")
    expected = (torch.sigmoid(logits)[0, 0] * 255).round().numpy()
    assert abs(expected - np.array(Image.open(out / "b.c.png"))).max() <= 1


def test_what_programs_read_of_fit_and_predict(checkpoint, data, tmp_path, capsys):
    head, pictures = tmp_path / "head.safetensors", tmp_path / "in"
    command = ["--model", str(checkpoint), "--size", "32", "--epochs", "2", "--output", str(head), "--json"]
    assert main(["fit", str(data), *command]) == 0
    told = json.loads(capsys.readouterr().out)
    network = DINOv3ViT.from_pretrained(checkpoint)
    assert (told["output"], told["model"], told["weights"]) == (str(head), network.config.name, network.weights_id)
    losses = [entry["loss"] for entry in told["history"]]
    with safe_open(head, "pt") as file:
        assert len(losses) == 2 and str(losses[told["epoch"] - 1]) in "".join(file.metadata().values())

    good, bad = save(pictures, "a.png", grey()), pictures / "b.png"
    bad.write_bytes(b"no picture")
    arguments = ["--model", str(checkpoint), "--head", str(head), "--output", str(tmp_path / "out"), "--json"]
    assert main(["predict", str(pictures), *arguments]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["predictions"] == {str(good): str(tmp_path / "out" / "a.png")} and (tmp_path / "out" / "a.png").exists()
    assert list(told["failed"]) == [str(bad)] and told["head"] == str(head) and told["weights"] == fingerprint(network)


def test_a_window_slides_over_large_pictures():
    """Where logits are a function of the pixel alone, blended windows give it back."""
    picture = torch.rand(1, 3, 50, 70)
    torch.testing.assert_close(slide(lambda x: x[:, :2] * 3, picture, (32, 32)), picture[:, :2] * 3)
    small = slide(lambda x: x[:, :1], torch.rand(1, 3, 20, 70), (32, 32))
    assert small.shape == (1, 1, 32, 112)  # enlarged until the window fits


def test_predictions_never_lie_over_pictures(checkpoint, head, tmp_path, capsys):
    save(tmp_path, "a.png", np.zeros((64, 64, 3), np.uint8))
    before = (tmp_path / "a.png").read_bytes()
    arguments = ["predict", str(tmp_path), "--model", str(checkpoint), "--head", str(head), "--output", str(tmp_path)]
    assert main(arguments) == 1 and "a.png: is one of the inputs and would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before
    save(tmp_path, "a.jpg", np.zeros((64, 64, 3), np.uint8))
    assert main(arguments) == 1 and "a.jpg and a.png have one stem" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["made", "made/Imgs", "made/Imgs/0.png", "."])
def test_predictions_never_lie_over_masks(given, checkpoint, head, tmp_path, monkeypatch, capsys):
    save(tmp_path / "made" / "Imgs", "0.png", np.zeros((64, 64, 3), np.uint8))
    save(tmp_path / "made" / "GT", "0.png", np.zeros((64, 64), np.uint8))
    before = (tmp_path / "made" / "GT" / "0.png").read_bytes()
    (tmp_path / "made" / "predicted").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "made").symlink_to(tmp_path / "made" / "GT")
    monkeypatch.chdir(tmp_path / "made" / "Imgs" if given == "made/Imgs" else tmp_path)
    arguments = ["predict", "." if given == "made/Imgs" else given, "--model", str(checkpoint), "--head", str(head)]
    output = tmp_path / "link" if given == "." else tmp_path / "made" / "GT"  # of data sets, a folder for each
    assert main([*arguments, "--output", str(output)]) == 1
    assert "0.png: is one of the inputs and would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "made" / "GT" / "0.png").read_bytes() == before
    for _ in range(2):  # earlier predictions make place
        assert main([*arguments, "--output", str(tmp_path / "made" / "predicted")]) == 0


def test_logits_as_bytes():
    assert as_bytes(torch.tensor([[[[-100.0, 0.0, 100.0]]]])).tolist() == [[[0, 128, 255]]]
    assert as_bytes(torch.tensor([[[[0.0]], [[2.0]], [[1.0]]]])).tolist() == [[[1]]]


# ---- evaluate


def blobs(count: int, seed: int, size=(40, 56)) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        _, mask = camouflage.example(rng, (96, 120))
        mask = np.array(Image.fromarray(mask).resize(size[::-1]))
        noisy = np.clip(mask * rng.uniform(0.4, 0.9) + rng.normal(30, 20, size), 0, 255).astype(np.uint8)
        found.append((noisy, mask))
    return found


def test_the_measures_are_pysodmetrics(tmp_path, capsys):
    pairs = blobs(5, seed=0)
    meters = {"S": sod.Smeasure(), "wF": sod.WeightedFmeasure(), "meanE": sod.Emeasure(), "MAE": sod.MAE()}
    with pytest.warns(UserWarning):
        meters["F"] = sod.Fmeasure()
    ious = []
    for i, (prediction, mask) in enumerate(pairs):
        save(tmp_path / "pred", f"{i}.png", prediction)
        save(tmp_path / "CAMO" / "GT", f"{i}.png", mask)
        for meter in meters.values():
            meter.step(prediction, mask)
        found, truth = prediction >= 128, mask > 128
        ious.append((found & truth).sum() / (found | truth).sum())
    results = {name: meter.get_results() for name, meter in meters.items()}
    expected = {
        "S": results["S"]["sm"],
        "wF": results["wF"]["wfm"],
        "meanE": results["meanE"]["em"]["curve"].mean(),
        "F": results["F"]["fm"]["curve"].mean(),
        "MAE": results["MAE"]["mae"],
        "IoU": np.mean(ious),
    }
    assert main(["evaluate", str(tmp_path / "pred"), str(tmp_path / "CAMO"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert list(table) == ["CAMO"]
    for name, value in expected.items():
        assert table["CAMO"][name] == pytest.approx(value, abs=1e-12), name


def test_many_data_sets_and_formats(tmp_path, capsys):
    for name, seed in (("CAMO", 0), ("NC|4K", 1)):
        for i, (prediction, mask) in enumerate(blobs(2, seed)):
            save(tmp_path / "pred" / name, f"{i}.png", prediction)
            save(tmp_path / "truth" / name / "GT", f"{i}.png", mask)
            save(tmp_path / "truth" / name / "Imgs", f"{i}.jpg", mask)
    command = ["evaluate", str(tmp_path / "pred"), str(tmp_path / "truth")]
    printed = {}
    for form in ([], ["--markdown"], ["--csv"]):
        assert main([*command, *form]) == 0
        printed[tuple(form)] = capsys.readouterr().out.splitlines()
    assert printed[()][0].split() == ["data", "set", "S", "wF", "meanE", "F", "MAE", "IoU", "pictures"]
    assert printed[("--csv",)][1].startswith("CAMO,0.") and printed[("--csv",)][2].startswith("NC|4K,0.")
    assert printed[("--markdown",)][1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert printed[("--markdown",)][3].startswith("| NC\\|4K | 0.")


def test_names_without_a_partner_are_listed_and_nothing_is_written(tmp_path, capsys):
    for i, (prediction, mask) in enumerate(blobs(4, seed=2)):
        if i != 3:
            resized = Image.fromarray(prediction).resize((28, 20)) if i == 1 else Image.fromarray(prediction)
            (tmp_path / "pred").mkdir(exist_ok=True)
            resized.save(tmp_path / "pred" / f"{i}.png")
        if i != 2:
            save(tmp_path / "gt", f"{i}.png", mask)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.png")}
    assert main(["evaluate", str(tmp_path / "pred"), str(tmp_path / "gt"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "1 masks without a prediction, left out: 3" in err and "1 predictions without a mask, left out: 2" in err
    assert "1 predictions have another size than their mask, such as 1.png: resized in memory" in err
    assert next(iter(json.loads(out).values()))["pictures"] == 2
    assert {f: f.read_bytes() for f in tmp_path.rglob("*.png")} == before


def test_nothing_to_measure(tmp_path, capsys):
    save(tmp_path / "gt", "a.png", half())
    save(tmp_path / "pred", "b.png", half())
    assert main(["evaluate", str(tmp_path / "pred"), str(tmp_path / "gt")]) == 1
    assert "holds no prediction named as a mask" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "nowhere"), str(tmp_path / "gt")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_classes_have_an_iou_each(tmp_path):
    truth = np.array([[0, 0, 1, 1], [2, 2, 255, 255]], np.uint8)
    found = np.array([[0, 1, 1, 1], [2, 0, 0, 1]], np.uint8)
    save(tmp_path / "gt", "a.png", truth)
    save(tmp_path / "pred", "a.png", found)
    (measures,) = evaluate(tmp_path / "pred", tmp_path / "gt", classes=4, report=print).values()
    assert measures["IoU per class"] == [1 / 3, 2 / 3, 1 / 2, None]
    assert measures["IoU"] == pytest.approx(0.5) and measures["accuracy"] == pytest.approx(4 / 6)
    save(tmp_path / "pred", "a.png", found + 7)
    with pytest.raises(ValueError, match="a.png: holds the value 9: expected classes 0 to 3"):
        evaluate(tmp_path / "pred", tmp_path / "gt", classes=4)


def test_two_empty_masks_agree():
    measures = Measures(1, ("IoU",))
    measures.add(grey(), grey())
    assert measures.result() == {"IoU": 1.0}
    assert Reading(1, above=3)(np.array([[3, 4]], np.uint8)).tolist() == [[0, 1]]
