"""`extract` and `open_features`: rows are those of a direct forward, whatever the pictures come from."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from helpers import TINY, relative_error, run_python, write_checkpoint
from pictures import PREPROCESSING_48, picture, write_pictures, write_tar

import dinov3_lite
from dinov3_lite import DINOv3ViT, ImageProcessor
from dinov3_lite.extraction import decode
from dinov3_lite.extraction.formats import convert

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

OUTPUTS = ["cls_token", "patch_mean", "patch_tokens", "register_tokens"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), TINY, preprocessing=PREPROCESSING_48)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixteen pictures and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 16)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def names(photos):
    return sorted(str(p.relative_to(photos)) for p in photos.rglob("*") if p.is_file() and p.suffix != ".txt")


@pytest.fixture(scope="module")
def complete(checkpoint, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("complete") / "features"
    return dinov3_lite.extract(
        photos, checkpoint, output, outputs=OUTPUTS, store="float32", batch_size=3, shard_size=7, decode_threads=2
    )


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


def test_float16_files_and_half_precision(checkpoint, photos, complete, tmp_path):
    half = dinov3_lite.extract(photos, checkpoint, tmp_path / "16")
    assert half["cls_token"].dtype == np.float16 and half.outputs == ["cls_token"]
    exact = np.asarray(complete["cls_token"])
    assert np.array_equal(np.asarray(half["cls_token"]), exact.astype(np.float16))
    bfloat16 = dinov3_lite.extract(photos, checkpoint, tmp_path / "b16", dtype=torch.bfloat16)
    assert bfloat16.job["dtype"] == "bfloat16"
    error = relative_error(torch.from_numpy(np.asarray(bfloat16["cls_token"])), torch.from_numpy(exact))
    assert 1e-4 < error < 3e-2


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


# Sources -------------------------------------------------------------------------------------------------------------


def same_rows(store, complete, names):
    return np.array_equal(
        np.asarray(store["cls_token"]), complete["cls_token"][[list(complete.keys).index(n) for n in names]]
    )


FLOAT32 = {"store": "float32", "batch_size": 3}


def test_a_list_keeps_its_order_and_its_lines_as_keys(checkpoint, photos, names, complete, tmp_path):
    order = [names[i] for i in (5, 1, 12)]
    lines = [order[0], f"./{order[1]}", str(photos / order[2])]
    (photos / "list.txt").write_text("\n".join(lines) + "\n\n")
    store = dinov3_lite.extract(photos / "list.txt", checkpoint, tmp_path, **FLOAT32)
    (photos / "list.txt").unlink()
    assert list(store.keys) == lines and same_rows(store, complete, order)


def test_tars_as_webdataset_writes_them(checkpoint, photos, names, complete, tmp_path):
    for number, some in ((8, names[:6]), (9, names[6:7]), (10, names[7:])):
        members = [(f"{i:04d}{name[name.rindex('.') :]}", (photos / name).read_bytes()) for i, name in enumerate(some)]
        captions = [(f"{i:04d}.json", b"{}") for i in range(len(some))]
        write_tar(tmp_path / f"a-{number:02d}.tar", [m for pair in zip(members, captions, strict=True) for m in pair])
    store = dinov3_lite.extract(str(tmp_path / "a-{08..10}.tar"), checkpoint, tmp_path / "out", **FLOAT32)
    assert same_rows(store, complete, names) and store.offsets.tolist() == [0, 6, 7, 16]
    assert store.keys[0] == f"a-08.tar/0000{names[0][names[0].rindex('.') :]}" and store.keys[6][:9] == "a-09.tar/"
    by_pattern = dinov3_lite.extract(str(tmp_path / "a-*.tar"), checkpoint, tmp_path / "out2", **FLOAT32)
    assert list(by_pattern.keys) == list(store.keys)


def test_a_parquet_column_of_bytes_of_hugging_face_or_of_paths(checkpoint, photos, names, complete, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = [(photos / name).read_bytes() for name in names]
    tables = {
        "bytes": pa.table({"image": data, "label": list(range(16))}),
        "hf": pa.table({"picture": [{"bytes": d, "path": None} for d in data]}),
        "paths": pa.table({"file": [str(photos / name) for name in names], "other": names}),
    }
    for name, table in tables.items():
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3)
        column = {"column": "file"} if name == "paths" else {}
        store = dinov3_lite.extract(
            tmp_path / f"{name}.parquet", checkpoint, tmp_path / name, shard_size=6, **FLOAT32, **column
        )
        assert same_rows(store, complete, names), name
        assert store.offsets.tolist() == [0, 6, 12, 16]
        assert store.keys[7] == f"{name}.parquet/7"
    with pytest.raises(
        ValueError, match=r"which column holds the pictures\? .*--column: file \(string\), other \(string\)"
    ):
        dinov3_lite.extract(tmp_path / "paths.parquet", checkpoint, tmp_path / "none")
    with pytest.raises(ValueError, match=r"no column 'img': it has image \(binary\), label \(int64\)"):
        dinov3_lite.extract(tmp_path / "bytes.parquet", checkpoint, tmp_path / "none", column="img")


def test_urls_of_fsspec(checkpoint, photos, names, complete, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in names:
        memory.pipe(f"/photos/{name}", (photos / name).read_bytes())
    members = [(name.replace("/", "_"), (photos / name).read_bytes()) for name in names]
    write_tar(tmp_path / "all.tar", members)
    memory.pipe("/tars/all.tar", (tmp_path / "all.tar").read_bytes())
    folder = dinov3_lite.extract("memory://photos", checkpoint, tmp_path / "a", **FLOAT32)
    assert sorted(folder.keys) == names and same_rows(folder, complete, list(folder.keys))
    tars = dinov3_lite.extract("memory://tars/*.tar", checkpoint, tmp_path / "b", **FLOAT32)
    assert same_rows(tars, complete, names)
    with pytest.raises(ValueError, match="s7://bucket"):
        dinov3_lite.extract("s7://bucket", checkpoint, tmp_path / "c")


def test_several_folders_and_pictures_by_name(checkpoint, photos, names, complete, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    loose = [name for name in names if "/" not in name]
    store = dinov3_lite.extract(["inner", *loose], checkpoint, tmp_path / "out", **FLOAT32)
    assert sorted(store.keys) == names and same_rows(store, complete, list(store.keys))
    with pytest.raises(ValueError, match="inner: given twice"):
        dinov3_lite.extract(["inner", photos / "inner"], checkpoint, tmp_path / "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ["cls"]}, "outputs 'cls': expected some of cls_token, patch_mean"),
        ({"outputs": ["cls_token"] * 2}, "each once"),
        ({"store": "bfloat16"}, "store 'bfloat16': expected one of float16, float32"),
        ({"size": 50}, "size 50 x 50: expected multiples of the patch size 8"),
        ({"blocks": [3]}, r"blocks \[3\]: expected indices from -3 to 2"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"engine": "spark"}, "engine 'spark': expected one of local, ray"),
        ({"part": "3/2"}, "part '3/2'"),
        ({"max_rejects": "few"}, "max_rejects 'few'"),
        ({"inputs": "nowhere"}, "nowhere: no such file or folder"),
        ({"inputs": []}, "no input"),
        ({"model": "nowhere"}, "nowhere: no such file or folder"),
        ({"output": "https://example.com/x"}, "https://example.com/x: http.* is no object store"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_asked_wrongly_is_said_in_a_sentence(checkpoint, photos, tmp_path, options, message):
    arguments = {"inputs": photos, "model": checkpoint, "output": tmp_path / "out", **options}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dinov3_lite.extract(**arguments)
    assert not (tmp_path / "out" / "job.json").exists()


def test_a_folder_without_pictures_and_a_folder_that_is_no_store(checkpoint, tmp_path):
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match=r"no pictures there \(but 1 .csv\)"):
        dinov3_lite.extract(tmp_path, checkpoint, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no job.json in it"):
        dinov3_lite.open_features(tmp_path)


# Other formats -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(checkpoint, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    return dinov3_lite.extract(photos, checkpoint, folder, outputs=OUTPUTS, size="native", shard_size=9)


def check_table(table, store):
    """A table of arrow's against the store."""
    assert table.column("key").to_pylist() == list(store.keys)
    for output in store.outputs:
        values = table.column(output).to_pylist()
        for i in range(len(store)):
            expected = store[output][i]
            expected = np.moveaxis(expected, -2, 0) if None in store[output].shape else expected
            assert np.array_equal(np.array(values[i], expected.dtype), expected), output


@pytest.mark.parametrize("kind", ["complete", "native"])
def test_parquet(kind, request, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    store = request.getfixturevalue(kind)
    convert(store.folder.path, tmp_path / "p", "parquet")
    assert len(list((tmp_path / "p").iterdir())) == len(store.shards)
    check_table(parquet.read_table(tmp_path / "p"), store)
    with pytest.raises(ValueError, match="is not empty"):
        convert(store.folder.path, tmp_path / "p", "parquet")


@pytest.mark.parametrize("kind", ["complete", "native"])
def test_lance(kind, request, tmp_path):
    lance = pytest.importorskip("lance")
    store = request.getfixturevalue(kind)
    convert(store.folder.path, tmp_path / "l", "lance")
    check_table(lance.dataset(str(tmp_path / "l")).to_table(), store)


@pytest.mark.parametrize("kind", ["complete", "native"])
def test_webdataset(kind, request, tmp_path):
    wds = pytest.importorskip("webdataset")
    store = request.getfixturevalue(kind)
    convert(store.folder.path, tmp_path / "w", "webdataset")
    files = sorted(str(file) for file in (tmp_path / "w").iterdir())
    samples = list(wds.WebDataset(files, shardshuffle=False).decode())
    assert [sample["key.txt"] for sample in samples] == list(store.keys)
    for i, sample in enumerate(samples):
        assert sample["__key__"] == f"{i:012d}"
        for output in store.outputs:
            assert np.array_equal(sample[f"{output}.npy"], store[output][i])


def test_an_unknown_format_is_refused(complete, tmp_path):
    with pytest.raises(ValueError, match="format 'hdf5': expected one of parquet, webdataset, lance"):
        convert(complete.folder.path, tmp_path / "x", "hdf5")
