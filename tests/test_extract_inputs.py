"""What `extract` takes: lists, tars, parquet, URLs; and what is asked wrongly."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from functools import partial
from urllib.parse import quote

import numpy as np
import pytest
from extracted import FLOAT32, same_rows
from pictures import write_tar

import dinov3_lite
from dinov3_lite.extraction import doubled, plan, reading, tars
from dinov3_lite.extraction.engines import ShardsFailed

pytest.importorskip("PIL")
pytest_plugins = ["extracting"]


def test_a_list_keeps_its_order_and_its_lines_as_keys(checkpoint, photos, names, complete, tmp_path):
    order = [names[i] for i in (5, 1, 12)]
    lines = [order[0], f"./{order[1]}", str(photos / order[2])]
    (photos / "list.txt").write_text("\n".join(lines) + "\n\n")
    store = dinov3_lite.extract(photos / "list.txt", checkpoint, tmp_path, **FLOAT32)
    (photos / "list.txt").unlink()
    assert list(store.keys) == lines and same_rows(store, complete, order)


def test_tars_as_webdataset_writes_them(checkpoint, photos, names, complete, tmp_path):
    for number, some in ((8, names[:6]), (9, names[6:7]), (10, names[7:])):
        dot = "./" if number == 9 else ""  # as tar writes the names of a folder that it stands in
        members = [
            (f"{dot}{i:04d}{name[name.rindex('.') :]}", (photos / name).read_bytes()) for i, name in enumerate(some)
        ]
        captions = [(f"{i:04d}.json", b"{}") for i in range(len(some))]
        write_tar(tmp_path / f"a-{number:02d}.tar", [m for pair in zip(members, captions, strict=True) for m in pair])
    store = dinov3_lite.extract(str(tmp_path / "a-{08..10}.tar"), checkpoint, tmp_path / "out", **FLOAT32)
    assert same_rows(store, complete, names) and store.offsets.tolist() == [0, 6, 7, 16]
    assert store.keys[0] == f"a-08.tar/0000{names[0][names[0].rindex('.') :]}" and store.keys[6][:13] == "a-09.tar/0000"
    by_pattern = dinov3_lite.extract(str(tmp_path / "a-*.tar"), checkpoint, tmp_path / "out2", **FLOAT32)
    assert list(by_pattern.keys) == list(store.keys)


def members(photos, names):
    return [(name.replace("/", "_"), (photos / name).read_bytes()) for name in names]


def test_a_long_tar_is_several_shards(checkpoint, photos, names, complete, tmp_path, monkeypatch):
    captions = [("notes.json", b"{}"), ("a long name " * 12 + ".txt", b"no picture")]
    write_tar(tmp_path / "a.tar", [*captions, *members(photos, names[:11]), *captions, *members(photos, names[11:])])
    whole = dinov3_lite.extract(tmp_path / "a.tar", checkpoint, tmp_path / "whole", **FLOAT32)
    cut = dinov3_lite.extract(tmp_path / "a.tar", checkpoint, tmp_path / "cut", shard_size=5, **FLOAT32)
    assert whole.offsets.tolist() == [0, 16] and cut.offsets.tolist() == [0, 5, 10, 15, 16]
    assert cut.job["plan"]["pictures"] == 16 and whole.job["plan"]["pictures"] is None
    assert list(cut.keys) == list(whole.keys) and same_rows(cut, complete, names)
    monkeypatch.setattr(tars, "CUT", (tmp_path / "a.tar").stat().st_size - 1)  # and without being asked, a huge one
    monkeypatch.setattr("dinov3_lite.extraction.job.GLOBAL_SHARD", 6)
    huge = dinov3_lite.extract(tmp_path / "a.tar", checkpoint, tmp_path / "huge", **FLOAT32)
    assert huge.offsets.tolist() == [0, 6, 12, 16] and same_rows(huge, complete, names)


def test_pieces_of_damaged_and_of_compressed_tars(checkpoint, photos, names, complete, tmp_path):
    write_tar(tmp_path / "a.tar", members(photos, names))
    write_tar(tmp_path / "b.tgz", members(photos, names[:3]))
    write_tar(tmp_path / "c.tar", [])
    data = (tmp_path / "a.tar").read_bytes()
    damaged = data.index(names[9].replace("/", "_").encode())
    (tmp_path / "d.tar").write_bytes(data[:damaged] + b"?" + data[damaged + 1 :])
    (tmp_path / "e.tar").write_bytes(data[: damaged + 600])  # ends within a picture
    files = [tmp_path / name for name in ("a.tar", "b.tgz", "c.tar", "d.tar", "e.tar")]
    store = dinov3_lite.extract(files, checkpoint, tmp_path / "out", shard_size=4, **FLOAT32)
    assert np.diff(store.offsets).tolist() == [4, 4, 4, 4, 3, 0, 4, 4, 1, 4, 4, 1]
    assert same_rows(store, complete, [*names, *names[:3], *names[:9], *names[:9]])
    assert [reject["key"] for reject in store.rejects] == ["d.tar", "e.tar"]
    assert all("not a whole tar file" in reject["reason"] for reject in store.rejects)


@pytest.mark.parametrize("shard_size", [2, 3, 100])
def test_a_key_that_comes_twice_is_a_reject_wherever_it_does(shard_size, checkpoint, photos, names, complete, tmp_path):
    again = [*names[:4], names[1], *names[4:7], names[0], names[1], names[6]]
    lines = [str(photos / name) for name in again]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    write_tar(tmp_path / "a.tar", members(photos, again))
    inputs = [tmp_path / "list.txt", tmp_path / "a.tar"]
    store = dinov3_lite.extract(inputs, checkpoint, tmp_path / "out", shard_size=shard_size, **FLOAT32)
    assert same_rows(store, complete, names[:7] * 2) and len(set(store.keys)) == 14
    twice = [again[i] for i in (4, 8, 9, 10)]
    expected = [f"{tmp_path}/list.txt/{photos / n}" for n in twice] + [f"a.tar/{n.replace('/', '_')}" for n in twice]
    assert [reject["key"] for reject in store.rejects] == expected
    assert {reject["reason"] for reject in store.rejects} == {"its key is that of an earlier picture"}
    assert store.job["plan"]["doubled"] == 8


def test_keys_that_come_twice_are_found_among_many():
    rng = np.random.default_rng(0)
    keys = [f"{i:06d}.jpg" for i in rng.integers(0, 40_000, 20_000)]
    seen, expected = set(), []
    for number, key in enumerate(keys):
        if key in seen:
            expected.append(number)
        seen.add(key)
    with doubled.Keys() as found:
        for key in keys:
            found.add(key)
        assert found.doubled() == expected and len(expected) > 3000


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
    with pytest.raises(ValueError, match=r"column 'label' has neither bytes nor paths: it has image \(binary\), label"):
        dinov3_lite.extract(tmp_path / "bytes.parquet", checkpoint, tmp_path / "none", column="label")
    with pytest.raises(ValueError, match=r"no column 'img': it has image \(binary\), label \(int64\)"):
        dinov3_lite.extract(tmp_path / "bytes.parquet", checkpoint, tmp_path / "none", column="img")


def test_what_a_row_of_parquet_holds(photos, names):
    """Bytes before a path, empty ones too; of a path what lies there; anything else is a reject."""
    data = (photos / names[0]).read_bytes()
    for value, expected in (
        (data, data),
        ({"bytes": data, "path": "nowhere.jpg"}, data),
        ({"bytes": b"", "path": names[0]}, b""),
        ({"bytes": None, "path": names[0]}, data),
        (names[0], data),
    ):
        assert reading._parquet_item("key", value, str(photos)).read() == expected
    for value, reason in (
        (None, "nothing in this row"),
        (3, "a int, not bytes or a path"),
        ("s7://bucket/a.jpg", r"fsspec serves no such URL \(Protocol not known: s7\)"),
    ):
        with pytest.raises(reading.Rejected, match=reason):
            reading._parquet_item("key", value, str(photos)).read()


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


def test_names_with_colons_are_no_urls_wherever_they_stand(checkpoint, photos, names, complete, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    odd = ["cat::1.jpg", "memory::2.jpg"]
    for name, file in zip(odd, names[:2], strict=True):
        (tmp_path / name).write_bytes((photos / file).read_bytes())
        fsspec.filesystem("memory").pipe(f"/odd/{name}", (photos / file).read_bytes())
    (tmp_path / "list.txt").write_text("\n".join(odd))
    monkeypatch.chdir(tmp_path)
    for i, inputs in enumerate((tmp_path, "list.txt", odd, "memory://odd", "simplecache::memory://odd/")):
        store = dinov3_lite.extract(inputs, checkpoint, tmp_path / str(i), **FLOAT32)
        assert list(store.keys) == odd and same_rows(store, complete, names[:2]), inputs


def test_a_line_whose_scheme_nobody_serves_is_a_reject(checkpoint, photos, names, complete, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    lines, bad = [str(photos / name) for name in names[:3]], ["s7://bucket/a.jpg", "simplecache::s7://b.jpg"]
    (tmp_path / "list.txt").write_text("\n".join([*lines, *bad, "github://c.jpg"]))
    store = dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "out", **FLOAT32)
    assert list(store.keys) == lines and same_rows(store, complete, names[:3])
    assert [reject["key"] for reject in store.rejects] == [*bad, "github://c.jpg"]
    assert all(reject["reason"].startswith("fsspec serves no such URL (") for reject in store.rejects)
    (tmp_path / "list.txt").write_text("\n".join(bad))
    with pytest.raises(ShardsFailed, match=r"none of 2 pictures can be read \(fsspec serves no such URL"):
        dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "none", **FLOAT32)

    def without_its_package(url):
        raise ImportError("Please install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without_its_package)  # then the shard waits for it
    (tmp_path / "list.txt").write_text("\n".join([*lines, "gs://bucket/a.jpg"]))
    with pytest.raises(ShardsFailed, match="1 of 1 shards failed; shard 0: gs://bucket/a.jpg: Please install it"):
        dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "late", **FLOAT32)


@pytest.fixture
def server(photos, tmp_path):
    """The URL of a server of the photos; what is asked for below /<status>/ it answers with that status."""
    asked = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            status = self.path.split("/")[1]
            self.send_error(int(status)) if status.isdigit() else super().do_GET()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "photos").symlink_to(photos)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_pictures_and_tars_behind_http(server, checkpoint, photos, names, complete, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("dinov3_lite.extraction.reading.PAUSES", (0, 0))
    monkeypatch.setattr("dinov3_lite.extraction.shard.PAUSES", (0, 0))
    url, asked = server
    lines = [f"{url}/photos/{quote(name)}" for name in names[:4]]
    (tmp_path / "list.txt").write_text("\n".join([*lines, f"{url}/404/a.jpg", f"{url}/403/b.jpg"]))
    store = dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "out", **FLOAT32)
    assert list(store.keys) == lines and same_rows(store, complete, names[:4])
    assert [reject["reason"] for reject in store.rejects] == ["no such file", "may not be read"]

    (tmp_path / "list.txt").write_text("\n".join([*lines[:2], f"{url}/500/c.jpg", lines[2]]))
    with pytest.raises(ShardsFailed, match=rf"1 of 2 shards failed; shard 1: reading failed: {url}/500/c.jpg: .*500"):
        dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "late", shard_size=2, **FLOAT32)
    assert asked["/500/c.jpg"] == 3 and dinov3_lite.open_features(tmp_path / "late").missing == [1]

    write_tar(tmp_path / "served" / "all.tar", members(photos, names))
    tar = dinov3_lite.extract(f"{url}/all.tar", checkpoint, tmp_path / "tar", **FLOAT32)
    assert same_rows(tar, complete, names)
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{url}/500/all.tar'"):
        dinov3_lite.extract(f"{url}/500/all.tar", checkpoint, tmp_path / "none", **FLOAT32)


def test_a_list_that_begins_with_a_byte_order_mark(checkpoint, photos, names, complete, tmp_path):
    lines = [str(photos / name) for name in names[:2]]
    (tmp_path / "list.txt").write_text("\r\n".join(lines), encoding="utf-8-sig")
    store = dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "out", **FLOAT32)
    assert list(store.keys) == lines and same_rows(store, complete, names[:2])


def test_several_folders_and_pictures_by_name(checkpoint, photos, names, complete, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    loose = [name for name in names if "/" not in name]
    store = dinov3_lite.extract(["inner", *loose], checkpoint, tmp_path / "out", **FLOAT32)
    assert sorted(store.keys) == names and same_rows(store, complete, list(store.keys))
    with pytest.raises(ValueError, match="inner: given twice"):
        dinov3_lite.extract(["inner", photos / "inner"], checkpoint, tmp_path / "no")


def test_inputs_that_overlap_give_each_key_one_row(checkpoint, photos, names, complete, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    inner, options = [name for name in names if name.startswith("inner/")], {"shard_size": 4, "max_rejects": 0}
    inputs = [f"{photos.name}/{names[0]}", photos.name, f"{photos.name}/inner"]
    store = dinov3_lite.extract(inputs, checkpoint, tmp_path / "out", **options, **FLOAT32)
    assert list(store.keys) == [f"{photos.name}/{name}" for name in names] and same_rows(store, complete, names)
    assert [reject["key"] for reject in store.rejects] == [f"{photos.name}/{name}" for name in (*inner, names[0])]
    assert {reject["reason"] for reject in store.rejects} == {"its key is that of an earlier picture"}
    (tmp_path / "list.txt").write_text("gone.jpg\ngone.jpg\n")
    with pytest.raises(ShardsFailed, match="none of 1 pictures can be read"):
        dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "gone", **options)
    # of a folder alone no keys are kept, and in a tar the second of a name may be another picture
    alone = dinov3_lite.extract(photos, checkpoint, tmp_path / "alone", **options)
    assert "keyed" in plan.Plan(store.folder)[0] and "keyed" not in plan.Plan(alone.folder)[0]
    write_tar(tmp_path / "a.tar", members(photos, [*names[:2], names[0]]))
    with pytest.raises(ShardsFailed, match="1 of 3 pictures were rejected, more than 0"):
        dinov3_lite.extract(tmp_path / "a.tar", checkpoint, tmp_path / "tar", **options)


def test_a_tar_that_is_called_as_a_folder_has_keys_of_its_own(checkpoint, photos, names, tmp_path, monkeypatch):
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "0.jpg").write_bytes((photos / names[0]).read_bytes())
    (tmp_path / "old").mkdir()
    write_tar(tmp_path / "old" / "a.tar", [("0.jpg", (photos / names[1]).read_bytes())])
    monkeypatch.chdir(tmp_path)
    store = dinov3_lite.extract(["a.tar", "old/a.tar"], checkpoint, tmp_path / "out", **FLOAT32)
    assert list(store.keys) == ["a.tar/0.jpg", "old/a.tar/0.jpg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ["cls"]}, "outputs 'cls': expected some of cls_token, patch_mean"),
        ({"outputs": ["cls_token"] * 2}, "each once"),
        ({"store": "bfloat16"}, "store 'bfloat16': expected one of float16, float32"),
        ({"size": 50}, "image height 50 and width 50 must be multiples of the patch size 8"),
        ({"blocks": [3]}, r"blocks \[3\]: expected indices from -3 to 2"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"decode_threads": 0}, "decode_threads is 0: expected at least 1"),
        ({"workers": 0, "engine": "ray"}, "workers is 0"),
        ({"workers": 2}, "workers is 2, and engine 'local' is this process: ask for engine 'ray'"),
        ({"device": "tpu"}, "device 'tpu': expected 'cpu', 'cuda' or"),
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
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures_and_a_folder_that_is_no_store(checkpoint, tmp_path):
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match=r"no pictures there \(but 1 .csv\)"):
        dinov3_lite.extract(tmp_path, checkpoint, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no job.json in it"):
        dinov3_lite.open_features(tmp_path)
