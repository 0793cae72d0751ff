"""`extract` into an object store: the same files as in a folder, the marker last, and read from there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
import torch
from extracted import OUTPUTS, tree
from helpers import run_python
from launch import free_ports

import dinov3_lite
from dinov3_lite.__main__ import main
from dinov3_lite.extraction import check, remote
from dinov3_lite.extraction.formats import convert

pytest.importorskip("PIL")
pytest_plugins = ["extracting"]

SAME = {"outputs": OUTPUTS, "store": "float32", "batch_size": 3, "shard_size": 7}


@pytest.fixture
def bucket(tmp_path):
    """A URL in memory that nobody has used."""
    yield f"memory://{tmp_path.name}/features"
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def remote_tree(url):
    """All files but logs."""
    store, root = fsspec.core.url_to_fs(url)
    names = (path[len(root.rstrip("/")) + 1 :] for path in store.find(root))
    return {name: store.cat_file(f"{root}/{name}") for name in names if not name.startswith("log/")}


def test_the_files_are_those_of_a_folder_and_read_alike(bucket, checkpoint, photos, complete, tmp_path):
    for i in (1, 2):
        store = dinov3_lite.extract(photos, checkpoint, bucket, part=f"{i}/2", **SAME)
        assert store.missing == ([0, 2] if i == 1 else [])
    assert remote_tree(bucket) == tree(complete.folder.path)
    assert repr(store).startswith(f"FeatureStore('{bucket}': 16 rows of cls_token (32,)")
    assert list(store.keys) == list(complete.keys)
    for output in OUTPUTS:
        assert np.array_equal(np.asarray(store[output]), np.asarray(complete[output]))
        assert np.array_equal(store[output][[12, 3]], complete[output][[12, 3]])
    assert not list(store.folder.path.rglob("*.npy"))  # nothing stays here
    loader = torch.utils.data.DataLoader(store.dataset("cls_token"), batch_size=5)
    assert torch.equal(torch.cat([rows for rows, _ in loader]), torch.from_numpy(complete["cls_token"][:]))
    convert(bucket, tmp_path / "tars", "webdataset")
    convert(complete.folder.path, tmp_path / "tars of the folder", "webdataset")
    assert tree(tmp_path / "tars") == tree(tmp_path / "tars of the folder")


def test_pictures_of_several_sizes(bucket, checkpoint, photos, tmp_path):
    arguments = {"outputs": OUTPUTS, "size": "native", "shard_size": 9}
    here = dinov3_lite.extract(photos, checkpoint, tmp_path, **arguments)
    there = dinov3_lite.extract(photos, checkpoint, bucket, **arguments)
    for i in (0, 9, 15):
        assert np.array_equal(there["patch_tokens"][i], here["patch_tokens"][i])


def test_the_marker_is_put_last_and_a_shard_without_it_is_done_again(bucket, checkpoint, photos, complete, monkeypatch):
    order, real = [], remote.RemoteFolder._there

    def full(self, path):
        if (
            path.suffix in (".npy", ".txt", ".json")
            and path.parent.name in (*OUTPUTS, "keys", "shards")
            and path.exists()
        ):
            order.append(f"{path.parent.name}/{path.name}")
            if order[-1] == "shards/00000001.json":
                raise OSError(28, "quota exceeded")
        return real(self, path)

    monkeypatch.setattr(remote.RemoteFolder, "_there", full)
    with pytest.raises(OSError, match="can't write shard 1 .*quota exceeded"):
        dinov3_lite.extract(photos, checkpoint, bucket, **SAME)
    monkeypatch.setattr(remote.RemoteFolder, "_there", real)
    assert order.index("shards/00000000.json") == len(OUTPUTS) + 1
    assert dinov3_lite.open_features(bucket).missing == [1, 2]
    dinov3_lite.extract(photos, checkpoint, bucket, **SAME)
    assert remote_tree(bucket) == tree(complete.folder.path)


def test_status_verify_and_another_job(bucket, checkpoint, photos, capsys):
    dinov3_lite.extract(photos, checkpoint, bucket, **SAME)
    assert check.status(bucket)["rows"] == 16 and list(check.verify(bucket)) == []
    assert main(["extract", "--status", bucket]) == 0 == main(["extract", "--verify", bucket])
    assert f"{bucket}: 3 of 3 shards, 0 being worked on" in capsys.readouterr().out
    assert main(["extract", "--status", bucket, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["done"], told["shards"], told["rows"], told["failed"]) == (3, 3, 16, {})
    store = fsspec.filesystem("memory")
    path = bucket.removeprefix("memory:/") + "/cls_token/00000001.npy"
    store.pipe_file(path, store.cat_file(path)[:-1] + b"\0")
    store.rm_file(path.replace("00000001", "00000002"))
    faults = dict(check.verify(bucket))
    assert faults[1].startswith("cls_token/00000001.npy has changed") and faults[2] == "cls_token/00000002.npy is gone"
    items = bucket.removeprefix("memory:/") + "/plan/items.txt"
    store.pipe_file(items, store.cat_file(items)[1:])
    with pytest.raises(ValueError, match=f"{bucket}: its plan is not that of its job.json"):
        dinov3_lite.extract(photos, checkpoint, bucket, **SAME)
    store.pipe_file(items, b"i" + store.cat_file(items))
    with pytest.raises(ValueError, match=f"{bucket}: holds another job: batch_size is 3 there and 64 here"):
        dinov3_lite.extract(photos, checkpoint, bucket, **{**SAME, "batch_size": None})
    with pytest.raises(FileNotFoundError, match=f"{bucket}/other: no job.json"):
        dinov3_lite.open_features(bucket + "/other")


def test_a_shard_that_failed_is_listed_and_tried_again(bucket, checkpoint, photos):
    (photos / "bad.jpg").write_bytes(b"bad")
    try:
        with pytest.raises(RuntimeError, match=f"{bucket}: 1 of 3 shards failed; shard 0: 1 of 7 pictures"):
            dinov3_lite.extract(photos, checkpoint, bucket, max_rejects=0, **SAME)
        assert check.status(bucket)["failed"].keys() == {0}
        assert len(dinov3_lite.extract(photos, checkpoint, bucket, **SAME)) == 16
        assert not [name for name in remote_tree(bucket) if name.startswith(("failed/", "attempts/"))]
    finally:
        (photos / "bad.jpg").unlink()


def test_a_url_of_this_machine_is_a_folder(checkpoint, photos, complete, tmp_path):
    dinov3_lite.extract(photos, checkpoint, f"file://{tmp_path}/out", **SAME)
    assert tree(tmp_path / "out") == tree(complete.folder.path)


# ---- a server that speaks S3


@pytest.fixture(scope="module")
def s3():
    """The environment that its clients need; a bucket is there."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    (port,) = free_ports(1)
    words = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    env = {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    while server.poll() is None:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.1)
    before = dict(os.environ)
    os.environ.update(env)
    fsspec.filesystem("s3").mkdir("bucket")
    yield env
    os.environ.clear()
    os.environ.update(before)
    server.kill()
    server.communicate()


def test_processes_of_an_s3_store_one_of_them_killed(s3, checkpoint, photos, complete):
    deadly = """
import os, signal
from dinov3_lite.extraction.remote import RemoteFolder
real = RemoteFolder.hand_over
def deadly(self, paths, **options):
    shard = len(paths) > 3
    real(self, paths[:2] if shard else paths, **options)
    if shard:
        os.kill(os.getpid(), signal.SIGKILL)
RemoteFolder.hand_over = deadly
"""
    arguments = f"{str(photos)!r}, {str(checkpoint)!r}, 's3://bucket/features', **{SAME!r}"
    killed = run_python(f"{deadly}\nimport dinov3_lite\ndinov3_lite.extract({arguments}, part='1/2')")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert dinov3_lite.open_features("s3://bucket/features").missing == [0, 1, 2]
    for part in ("1/2", "2/2"):
        done = run_python(f"import dinov3_lite\ndinov3_lite.extract({arguments}, part='{part}')")
        assert done.returncode == 0, done.stderr
    assert remote_tree("s3://bucket/features") == tree(complete.folder.path)
    store = dinov3_lite.open_features("s3://bucket/features")
    loader = torch.utils.data.DataLoader(store.dataset("cls_token"), batch_size=4, num_workers=1)
    assert torch.equal(torch.cat([rows for rows, _ in loader]), torch.from_numpy(complete["cls_token"][:]))


def test_a_store_that_can_not_be_reached_is_said_in_a_line(s3, checkpoint, photos, capsys):
    words = ["extract", str(photos), "--model", str(checkpoint), "--output", "s3://no-such-bucket/x"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("dinov3_lite: ") and "no-such-bucket" in error and error.count("\n") == 1, error
