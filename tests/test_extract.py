"""`extract` and `open_features`: rows are those of a direct forward, and the folder is what the page says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from extracted import OUTPUTS, tree
from helpers import TINY, relative_error, run_python, write_checkpoint
from pictures import PREPROCESSING_48

import dinov3_lite
from dinov3_lite import DINOv3ViT, ImageProcessor
from dinov3_lite.__main__ import main
from dinov3_lite.extraction.compute import Network, images_at_once

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
pytest_plugins = ["extracting"]


def direct(checkpoint, file, size=(48, 48), blocks=None):
    """The outputs of one picture by the model's own doors, in OUTPUTS' order."""
    model, processor = DINOv3ViT.from_pretrained(checkpoint), ImageProcessor.from_pretrained(checkpoint)
    processor = ImageProcessor(size, processor.mean, processor.std)
    photo = ImageOps.exif_transpose(Image.open(file))
    with torch.no_grad():
        x = processor(photo)["pixel_values"]
        layers = model.get_intermediate_layers(x, blocks or 1, return_class_token=True, return_extra_tokens=True)
    of_block = [(cls[0], patches[0].mean(0), patches[0], registers[0]) for patches, cls, registers in layers]
    return of_block[0] if blocks is None else [torch.stack(xs) for xs in zip(*of_block, strict=True)]


def test_rows_are_those_of_a_direct_forward(complete, checkpoint, photos, names):
    assert list(complete.keys) == names and len(complete) == 16
    assert complete.missing == [] and complete.rejects == []
    for i, name in enumerate(names):
        for output, expected in zip(OUTPUTS, direct(checkpoint, photos / name), strict=True):
            assert relative_error(torch.from_numpy(complete[output][i]), expected) < 2e-6, (name, output)


def test_the_folder_is_what_the_page_says(complete, names):
    folder = complete.folder.path
    for shard, rows in enumerate((7, 7, 2)):
        found = np.load(folder / "patch_tokens" / f"{shard:08d}.npy", mmap_mode="r")
        assert found.shape == (rows, 36, 32) and found.dtype == np.float32
        assert (folder / "keys" / f"{shard:08d}.txt").read_text().splitlines() == names[7 * shard : 7 * shard + rows]
        marker = json.loads((folder / "shards" / f"{shard:08d}.json").read_text())
        assert marker["rows"] == marker["pictures"] == rows and marker["rejects"] == []
    job = json.loads((folder / "job.json").read_text())
    assert job["plan"]["left_out"] == {".txt": 1} and job["plan"]["pictures"] == 16
    assert not list(folder.rglob("*.tmp")) and not list((folder / "attempts").iterdir())


def test_rows_are_taken_like_those_of_an_array(complete):
    rows, whole = complete["cls_token"], np.asarray(complete["cls_token"])
    assert rows.shape == (16, 32) == whole.shape and rows.dtype == whole.dtype == np.float32
    assert np.array_equal(rows[-1], whole[15]) and np.array_equal(rows[5:9], whole[5:9])
    assert np.array_equal(rows[[13, 2, 2]], whole[[13, 2, 2]])
    assert np.array_equal(rows[whole[:, 0] > 0], whole[whole[:, 0] > 0])
    assert np.array_equal(np.concatenate(list(rows.blocks())), whole)
    assert complete.keys[3:5] == list(complete.keys)[3:5]
    with pytest.raises(IndexError, match="row 16: there are 16"):
        rows[16]
    for bad, message in [
        (np.array([False, True]), "mask of 2 values for 16 rows: expected one value a row"),
        (np.r_[np.ones(3, bool), np.zeros(50, bool)], "mask of 53 values for 16 rows"),
        (1.7, "row 1.7: expected a whole number, a slice, a list of numbers or a mask"),
        (np.array([1.7, 2.2]), "row 1.7: expected a whole number"),
        ("000.jpg", r"row '000.jpg': expected .*; that of a key is store.keys.index\(key\)"),
        (None, "row None: expected a whole number"),
        (True, "row True: expected a whole number"),
        (np.zeros((2, 3), int), r"rows of shape \(2, 3\): expected a whole number"),
    ]:
        for sequence in (rows, complete.keys):
            with pytest.raises(IndexError, match=message):
                sequence[bad]
    assert rows[[]].shape == (0, 32) and complete.keys[[]] == []
    for several in ((3, 5), (0, slice(5))):
        with pytest.raises(TypeError, match="take rows first"):
            rows[several]
    with pytest.raises(KeyError, match="holds cls_token, patch_mean"):
        complete["feature_map"]


def test_a_torch_dataset_of_the_rows(complete, names):
    loader = torch.utils.data.DataLoader(complete.dataset("cls_token", "patch_mean"), batch_size=5)
    cls, means, keys = zip(*loader, strict=True)
    assert torch.equal(torch.cat(cls), torch.from_numpy(np.asarray(complete["cls_token"])))
    assert torch.equal(torch.cat(means), torch.from_numpy(np.asarray(complete["patch_mean"])))
    assert [key for some in keys for key in some] == names


def test_reading_needs_neither_torch_nor_a_model(complete):
    code = f"""
import sys, dinov3_lite
store = dinov3_lite.open_features({str(complete.folder.path)!r})
store["cls_token"][3], store.keys[3], store.rejects, store.missing, len(store)
print("torch" in sys.modules)
"""
    done = run_python(code)
    assert done.stdout.strip() == "False", done.stderr


def test_the_same_call_again_does_nothing_and_another_is_refused(complete, checkpoint, photos):
    folder = complete.folder.path
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    same = {"outputs": OUTPUTS, "store": "float32", "batch_size": 3, "shard_size": 7}
    assert len(dinov3_lite.extract(photos, checkpoint, folder, **same)) == 16
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    with pytest.raises(
        ValueError, match=r"another job: batch_size is 3 there and 64 here; .* preprocessing.size is \[48, 48\]"
    ):
        dinov3_lite.extract(photos, checkpoint, folder, **{**same, "batch_size": None}, size=64)


@pytest.mark.parametrize("changed", ["cls_token", "layer.1.mlp.up_proj.bias"])
def test_a_model_that_differs_in_one_number_is_another_job(complete, photos, tmp_path, changed):
    from helpers import trained_like

    weights = trained_like(TINY)
    name = next(name for name in weights if changed in name)
    weights[name].view(-1)[-1] += 1e-3
    other = write_checkpoint(tmp_path / "model", TINY, weights, PREPROCESSING_48)
    same = {"outputs": OUTPUTS, "store": "float32", "batch_size": 3, "shard_size": 7}
    with pytest.raises(ValueError, match=r"another job: model.weights is \w+... there and \w+... here: give another"):
        dinov3_lite.extract(photos, other, complete.folder.path, **same)


def test_several_blocks_are_an_axis_and_one_is_none(checkpoint, photos, names, tmp_path):
    both = dinov3_lite.extract(photos, checkpoint, tmp_path / "2", outputs=OUTPUTS, blocks=[0, -1], store="float32")
    one = dinov3_lite.extract(photos, checkpoint, tmp_path / "1", outputs=OUTPUTS, blocks=[0], store="float32")
    assert both["patch_tokens"].shape == (16, 2, 36, 32) and one["patch_tokens"].shape == (16, 36, 32)
    for i in (0, 9):
        for output, expected in zip(OUTPUTS, direct(checkpoint, photos / names[i], blocks=[0, 2]), strict=True):
            assert relative_error(torch.from_numpy(both[output][i]), expected) < 2e-6
            assert relative_error(torch.from_numpy(one[output][i]), expected[0]) < 2e-6


@pytest.mark.parametrize("blocks", [None, [0, 2]])
def test_pictures_in_their_native_size(checkpoint, photos, names, tmp_path, blocks):
    store = dinov3_lite.extract(
        photos, checkpoint, tmp_path, outputs=OUTPUTS, size="native", store="float32", batch_size=5, shard_size=9,
        blocks=blocks,
    )  # fmt: skip
    assert list(store.keys) == names
    sizes = set()
    for i, name in enumerate(names):
        width, height = Image.open(photos / name).size
        size = tuple(max(8, round(n / 8) * 8) for n in (height, width))
        assert store["grid"][i].tolist() == [size[0] // 8, size[1] // 8]
        sizes.add(size)
        for output, expected in zip(OUTPUTS, direct(checkpoint, photos / name, size, blocks), strict=True):
            assert relative_error(torch.from_numpy(store[output][i]), expected) < 2e-6, (name, output)
    assert len(sizes) > 3
    assert [len(block) for block in store["patch_tokens"].blocks()] == [9, 7]


def test_packs_of_native_pictures_have_a_bearable_length(checkpoint, photos, names, tmp_path, monkeypatch):
    monkeypatch.setattr("dinov3_lite.extraction.shard.PACK", 40)  # patches a picture of a batch
    packs, real = [], Network.run_several

    def watched(self, images):
        packs.append([image.shape[1] * image.shape[2] // 64 for image in images])
        return real(self, images)

    monkeypatch.setattr(Network, "run_several", watched)
    store = dinov3_lite.extract(photos, checkpoint, tmp_path, size="native", batch_size=4)
    assert list(store.keys) == names and sum(map(len, packs)) == 16
    assert all(len(pack) == 1 or sum(pack) <= 4 * 40 for pack in packs)
    assert max(map(len, packs)) > 1 and len(packs) > 4


def test_a_batch_that_runs_in_several_forwards_has_the_same_rows(complete, checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("dinov3_lite.extraction.compute.AT_ONCE", 5 * 48 * 48)
    assert (images_at_once(48, 48), images_at_once(48, 96), images_at_once(480, 480)) == (4, 2, 1)
    runs, real = [], Network.run
    monkeypatch.setattr(Network, "run", lambda self, images: runs.append(len(images)) or real(self, images))
    store = dinov3_lite.extract(photos, checkpoint, tmp_path, outputs=OUTPUTS, store="float32", batch_size=7)
    for output in OUTPUTS:
        expected = torch.from_numpy(np.asarray(complete[output]))
        assert relative_error(torch.from_numpy(np.asarray(store[output])), expected) < 2e-6
    assert runs == [4] * 5  # of batches of 7, 7 and 2


def test_float16_files_and_half_precision(checkpoint, photos, complete, tmp_path):
    half = dinov3_lite.extract(photos, checkpoint, tmp_path / "16")
    assert half["cls_token"].dtype == np.float16 and half.outputs == ["cls_token"]
    exact = np.asarray(complete["cls_token"])
    assert np.array_equal(np.asarray(half["cls_token"]), exact.astype(np.float16))
    bfloat16 = dinov3_lite.extract(photos, checkpoint, tmp_path / "b16", dtype=torch.bfloat16)
    assert bfloat16.job["dtype"] == "bfloat16"
    error = relative_error(torch.from_numpy(np.asarray(bfloat16["cls_token"])), torch.from_numpy(exact))
    assert 1e-4 < error < 3e-2
    options = {"outputs": ["patch_mean", "patch_tokens"], "store": "float32", "dtype": "bfloat16"}
    means = dinov3_lite.extract(photos, checkpoint, tmp_path / "means", **options)  # not rounded once more
    expected = np.asarray(means["patch_tokens"]).astype(np.float64).mean(axis=1)
    assert relative_error(torch.from_numpy(np.asarray(means["patch_mean"])), torch.from_numpy(expected)) < 1e-6


# ---- models


def test_a_model_object_is_the_checkpoint_that_it_was_loaded_from(checkpoint, photos, complete, tmp_path):
    model, processor = DINOv3ViT.from_pretrained(checkpoint), ImageProcessor.from_pretrained(checkpoint)
    same = {"outputs": OUTPUTS, "store": "float32", "batch_size": 3, "shard_size": 7}
    store = dinov3_lite.extract(photos, model, tmp_path, processor=processor, part="1/2", **same)
    assert store.missing == [0, 2]
    dinov3_lite.extract(photos, checkpoint, tmp_path, **same)  # goes on
    assert tree(tmp_path) == tree(complete.folder.path)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, DINOv3ViT.from_pretrained(checkpoint).blocks[0].mlp.fc1.weight)


def test_a_model_object_that_was_trained_on_is_another_job(checkpoint, photos, names, tmp_path):
    model, processor = DINOv3ViT.from_pretrained(checkpoint), ImageProcessor.from_pretrained(checkpoint)
    store = dinov3_lite.extract(photos, model, tmp_path, processor=processor, store="float32")
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[3, 5] += 0.5
    with pytest.raises(ValueError, match=r"another job: model.weights is"):
        dinov3_lite.extract(photos, model, tmp_path, processor=processor, store="float32")
    changed = dinov3_lite.extract(photos, model, tmp_path / "2", processor=processor, store="float32")
    with torch.no_grad():
        expected = model(**processor(str(photos / names[2]))).cls_token[0]
    assert relative_error(torch.from_numpy(changed["cls_token"][2]), expected) < 2e-6
    assert relative_error(torch.from_numpy(store["cls_token"][2]), expected) > 1e-5


def test_a_model_object_in_half_precision_with_another_processor(checkpoint, photos, names, tmp_path):
    model = DINOv3ViT.from_pretrained(checkpoint, dtype=torch.bfloat16)
    processor = ImageProcessor(size=(32, 64), mean=0.5, std=0.25)
    store = dinov3_lite.extract(photos, model, tmp_path, processor=processor, outputs="patch_tokens")
    assert store.job["dtype"] == "bfloat16" and store["patch_tokens"].shape == (16, 32, 32)
    with torch.no_grad():
        expected = model(**processor(str(photos / names[7]))).patch_tokens[0]
    assert relative_error(torch.from_numpy(store["patch_tokens"][7]), expected) < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processor": None}, "the model is an object, which knows no preprocessing: give a processor"),
        ({"engine": "ray"}, "engine 'ray' loads the model in other processes: save it"),
        ({"dtype": "bfloat16"}, r"dtype 'bfloat16', and the model's is float32: give model.to\(torch.bfloat16\)"),
        ({"revision": "main"}, "revision: of a model that is loaded already"),
        ({"device": "meta"}, "device 'meta', and the model is on cpu"),
        ({"training": True}, "the model is in training mode"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_model_object_is_given_with(checkpoint, photos, tmp_path, options, message):
    model = DINOv3ViT.from_pretrained(checkpoint).train(options.pop("training", False))
    with pytest.raises(ValueError, match=message):
        dinov3_lite.extract(photos, model, tmp_path / "out", **{"processor": ImageProcessor(48), **options})
    assert not (tmp_path / "out").exists()


def test_something_that_is_no_backbone(photos, tmp_path):
    with pytest.raises(TypeError, match="model is a Linear: expected a checkpoint or a DINOv3ViT"):
        dinov3_lite.extract(photos, torch.nn.Linear(2, 2), tmp_path / "out")


def test_a_checkpoint_in_a_folder_and_a_processor_of_ones_own(checkpoint, photos, complete, tmp_path):
    same = {"outputs": OUTPUTS, "store": "float32", "batch_size": 3, "shard_size": 7}
    shutil.copytree(checkpoint, tmp_path / "repository" / "backbone")
    dinov3_lite.extract(photos, tmp_path / "repository", tmp_path / "out", subfolder="backbone", **same)
    assert tree(tmp_path / "out") == tree(complete.folder.path)
    (tmp_path / "repository" / "backbone" / "preprocessor_config.json").unlink()
    processor = ImageProcessor.from_pretrained(checkpoint)
    dinov3_lite.extract(photos, tmp_path / "repository" / "backbone", tmp_path / "2", processor=processor, **same)
    assert tree(tmp_path / "2") == tree(complete.folder.path)
    words = ["extract", str(photos), "--model", str(tmp_path / "repository"), "--output", str(tmp_path / "3")]
    assert main([*words, "--subfolder", "backbone"]) == 1  # has no preprocessing
    assert main([*words, "--subfolder", "elsewhere"]) == 1


def test_what_says_where_a_hub_id_lies_is_passed_on(checkpoint, photos, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return checkpoint

    monkeypatch.setattr("dinov3_lite.checkpoint.hub.download", download)
    words = ["extract", str(photos), "--model", "owner/name", "--output", str(tmp_path / "out"), "--quiet"]
    words += ["--revision", "v2", "--cache-dir", str(tmp_path / "cache"), "--local-files-only", "--subfolder", "inner"]
    assert main(words) == 0
    expected = {"subfolder": "inner", "revision": "v2", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    assert len(asked) >= 2 and all(one == ("owner/name", expected) for one in asked)
