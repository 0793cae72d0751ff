"""Every command takes a ConvNeXt, or says in one sentence why not; and extract's numbers are the model's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from convnexts import TINY_CONVNEXT, TRANSFORMERS, made, renamed, trained_like
from helpers import PREPROCESSING, relative_error, write_checkpoint

from dinov3_lite import ImageProcessor, extract, load
from dinov3_lite.__main__ import main
from dinov3_lite.tasks import load_head
from dinov3_lite.tasks.matching import match

Image = pytest.importorskip("PIL.Image")
SIZES = [(64, 64), (90, 120), (40, 70), (33, 100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, pictures of several sizes, a frame's mask, pairs to fit to, and two classes."""
    folder = tmp_path_factory.mktemp("commands")
    preprocessing = {**PREPROCESSING, "size": {"height": 70, "width": 101}}
    weights = renamed(trained_like(TINY_CONVNEXT), TRANSFORMERS)
    write_checkpoint(folder / "checkpoint", TINY_CONVNEXT, weights, preprocessing)
    rng = np.random.default_rng(0)

    def save(name: str, pixels: np.ndarray) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)

    for i, size in enumerate(SIZES):
        save(f"pictures/{i}.png", rng.integers(0, 256, (*size, 3), np.uint8))
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 10:40] = 255
    save("mask.png", mask)
    for i in range(4):
        pixels = rng.integers(0, 100, (64, 64, 3), np.uint8)
        pixels[mask > 0] += 100
        for name in ("frames/{}.png", "pairs/Image/{}.png", "classes/a/{}.png", "classes/b/{}.png"):
            save(name.format(i), pixels if "/b/" not in name else pixels[::-1] // 2)
        save(f"pairs/GT/{i}.png", mask)
    return folder


def run(folder, monkeypatch, *words: str) -> int:
    monkeypatch.chdir(folder)
    return main([word.format(folder=folder) for word in words])


# ---- extract


@torch.no_grad()
@pytest.mark.parametrize("stage", [None, 0, 2])
def test_extract_writes_what_the_model_gives(stage, folder, tmp_path):
    names = ["cls_token", "patch_mean", "patch_tokens"]
    store = extract(
        folder / "pictures",
        folder / "checkpoint",
        tmp_path / "features",
        outputs=names,
        blocks=stage,
        store="float32",
        device="cpu",
    )
    model, processor = load(folder / "checkpoint"), ImageProcessor.from_pretrained(folder / "checkpoint")
    for i in range(len(SIZES)):
        images = processor(folder / "pictures" / f"{i}.png")["pixel_values"]
        n = [3 if stage is None else stage]
        ((patches, cls_token),) = model.get_intermediate_layers(images, n=n, return_class_token=True)
        expected = cls_token[0], patches[0].mean(0), patches[0]
        for name, e in zip(names, expected, strict=True):
            found = torch.from_numpy(store[name][i])
            assert found.shape == e.shape and relative_error(found, e) < 3e-6, name
    again = extract(
        folder / "pictures", folder / "checkpoint", tmp_path / "features", outputs=names, blocks=stage, store="float32"
    )
    assert len(again) == len(SIZES)


@torch.no_grad()
@pytest.mark.parametrize("stage", [3, 1])
def test_extract_in_native_sizes_and_of_a_model_that_is_an_object(stage, folder, tmp_path):
    model, processor = made(), ImageProcessor.from_pretrained(folder / "checkpoint")
    options = {"size": "native", "blocks": stage, "store": "float32", "processor": processor}
    store = extract(folder / "pictures", model, tmp_path / "out", outputs=["cls_token", "patch_tokens"], **options)
    stride = model.strides[stage]
    for i, (height, width) in enumerate(SIZES):
        size = [max(32, round(side / 32) * 32) for side in (height, width)]
        images = ImageProcessor(tuple(size))(folder / "pictures" / f"{i}.png")["pixel_values"]
        ((patches, cls_token),) = model.get_intermediate_layers(images, n=[stage], return_class_token=True)
        assert store["grid"][i].tolist() == [side // stride for side in size]
        assert relative_error(torch.from_numpy(store["cls_token"][i]), cls_token[0]) < 3e-6
        assert relative_error(torch.from_numpy(store["patch_tokens"][i]), patches[0]) < 3e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [0, 3]}, "stages of 8, 32 channels, which make no one array: extract them one at a time"),
        ({"outputs": ["register_tokens"]}, "outputs has register_tokens, and convnext-c8-.* has none: leave it out"),
        ({"size": 31}, "image height 31 and width 31 must be at least 32, the stride of the last stage"),
        ({"blocks": [4]}, r"blocks \[4\]: expected indices from -4 to 3"),
    ],
)
def test_what_extract_can_not_do(options, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        extract(folder / "pictures", folder / "checkpoint", tmp_path / "out", **options)


# ---- a head


@pytest.mark.parametrize("unfreeze", [0, 2])
def test_fit_and_predict(unfreeze, folder, tmp_path, monkeypatch):
    head, made_of = tmp_path / "head.safetensors", "{folder}/checkpoint"
    fit = ["fit", "pairs", "--model", made_of, "--output", str(head), "--size", "50x70", "--epochs", "2"]
    assert run(folder, monkeypatch, *fit, "--batch-size", "2", "--unfreeze", str(unfreeze)) == 0
    network, settings = load_head(head, load(folder / "checkpoint"))
    assert settings.channels == (8, 16, 24, 32)
    trained = {name for name, p in network.maps.backbone.state_dict().items() if name.startswith("stages.3")}
    original = made().state_dict()
    changed = {name for name, p in network.backbone.state_dict().items() if not torch.equal(p, original[name])}
    last = {name for name in original if name.startswith(("stages.3.", "stages.2.blocks.2.", "norm."))}
    assert trained and changed == (last if unfreeze else set())
    assert network(torch.randn(2, 3, 50, 70)).shape == (2, 1, 13, 18)
    predict = ["predict", "frames", "--model", made_of, "--head", str(head), "--output", str(tmp_path / "out")]
    assert run(folder, monkeypatch, *predict, "--sliding") == 0
    with Image.open(tmp_path / "out" / "3.png") as prediction:
        assert prediction.size == (64, 64)


# ---- the others


def test_match_finds_a_picture_in_itself(folder, tmp_path, monkeypatch):
    output = tmp_path / "matches.json"
    command = ["match", "pictures/1.png", "pictures/1.png", "--model", "{folder}/checkpoint", "--size", "128"]
    assert run(folder, monkeypatch, *command, "--output", str(output), "--spacing", "0") == 0
    found = json.loads(output.read_text())["matches"]
    assert len(found) == 12 and all(m["first"] == m["second"] for m in found)  # 3 x 4 patches of 32 px
    assert {tuple(m["first"]) for m in found} == {(30 * x + 15, 30 * y + 15) for x in range(4) for y in range(3)}
    feature_map = made()(torch.randn(1, 3, 96, 128)).feature_map[0]
    assert len(match(feature_map, feature_map)) == 12


def test_track_probe_and_features(folder, tmp_path, monkeypatch, capsys):
    model = ["--model", "{folder}/checkpoint"]
    track = ["track", "frames", "--mask", "mask.png", *model, "--size", "128", "--output", str(tmp_path / "tracked")]
    assert run(folder, monkeypatch, *track) == 0 and len(list((tmp_path / "tracked").iterdir())) == 4
    assert run(folder, monkeypatch, "probe", "classes", *model, "--json") == 0
    assert json.loads(capsys.readouterr().out.split("masks\n")[-1])["classes"] == ["a", "b"]
    features = ["features", "pictures/2.png", *model, "--size", "64", "--output", str(tmp_path / "f.safetensors")]
    assert run(folder, monkeypatch, *features) == 0
    assert "1 CLS + 0 registers + 2 x 2 patches = 5 tokens of 32" in capsys.readouterr().out


@torch.no_grad()
def test_explore_shows_the_stages_on_one_grid(folder, tmp_path, monkeypatch):
    output = tmp_path / "page.html"
    command = ["explore", "pictures/1.png", "--model", "{folder}/checkpoint", "--size", "128", "--output", str(output)]
    assert run(folder, monkeypatch, *command) == 0
    data = json.loads(output.read_text().split('type="application/json">')[1].split("</script>")[0])
    assert data["blocks"] == [0, 1, 2, 3] and data["dims"] == [8, 16, 24, 32] and data["heads"] == 0
    (picture,) = data["pictures"]
    assert (picture["rows"], picture["columns"], data["patch"]) == (6, 8, 16)
    model = load(folder / "checkpoint")
    images = ImageProcessor((96, 128))(folder / "pictures" / "1.png")["pixel_values"]
    expected = model.get_intermediate_layers(images, n=4, patch_size=16)

    def array(text: str, dtype: type) -> np.ndarray:
        import base64

        return np.frombuffer(base64.b64decode(text), dtype)

    for layer, patches in zip(picture["layers"], expected, strict=True):
        values, scales = array(layer["vectors"], np.int8).reshape(48, -1), array(layer["scales"], np.float32)
        vectors = scales[:, None] * array(layer["channels"], np.float32) * values
        assert relative_error(torch.from_numpy(vectors), patches[0]) < 1e-2
