"""`extract` and bad input, bad disks, dead processes: rejects are data, rows never shift, and going on ends the same."""

from __future__ import annotations

import errno
import os
import re

import numpy as np
import pytest
from bad_pictures import BAD, flip
from extracted import tree
from helpers import TINY, write_checkpoint
from pictures import PREPROCESSING_48, picture, write_pictures, write_tar

import dinov3_lite
from dinov3_lite.__main__ import main
from dinov3_lite.extraction import check, plan, reading, writer
from dinov3_lite.extraction.engines import ShardsFailed

Image = pytest.importorskip("PIL.Image")

FLOAT32 = {"store": "float32", "batch_size": 4, "shard_size": 100, "decode_threads": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), TINY, preprocessing=PREPROCESSING_48)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(reading, "PAUSES", (0, 0))
    monkeypatch.setattr("dinov3_lite.extraction.shard.PAUSES", (0, 0))


def test_twelve_kinds_of_bad_bytes_are_rejects_and_the_neighbours_rows_stay_the_same(checkpoint, tmp_path):
    names = write_pictures(tmp_path / "in", 20)
    clean = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "clean", **FLOAT32)
    bad = {}
    for i, (what, (make, reason)) in enumerate(BAD.items()):
        suffix = names[i + 3][names[i + 3].rindex(".") :]
        name = f"{names[i + 3]} {what}{suffix}"
        (tmp_path / "in" / name).write_bytes(make())
        bad[name] = reason
    # and what is no file
    (tmp_path / "in" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "in" / "circle.jpg").symlink_to(tmp_path / "in" / "circle.jpg")
    (tmp_path / "in" / "inner" / "up").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    bad |= {
        "gone.jpg": "no such file",
        "circle.jpg": "links in a circle",
        "inner/up": "a link to a folder that it lies in",
    }
    bad["pipe.jpg"] = "no regular file"

    store = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", **FLOAT32)
    assert list(store.keys) == names
    assert np.array_equal(np.asarray(store["cls_token"]), np.asarray(clean["cls_token"]))
    assert list(check.verify(tmp_path / "out")) == []  # of files with fewer rows than were planned, too
    reasons = {reject["key"]: reject["reason"] for reject in store.rejects}
    assert reasons.keys() == bad.keys()
    for name, reason in bad.items():
        assert re.search(reason, reasons[name]), (name, reasons[name])


def test_names_with_ends_of_lines_backslashes_and_bytes_that_are_no_text(checkpoint, tmp_path):
    names = ["a\nb.jpg", "c\\n.jpg", "d\r.jpg", os.fsdecode(b"e\xff.jpg"), "ünïcode 漢.jpg", " f .jpg"]
    (tmp_path / "in").mkdir()
    for i, name in enumerate(names):
        (tmp_path / "in" / name).write_bytes(picture(i))
    (tmp_path / "in" / "bad\n.jpg").write_bytes(b"")
    store = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", **FLOAT32)
    assert list(store.keys) == sorted(names) and [r["key"] for r in store.rejects] == ["bad\n.jpg"]
    alone = dinov3_lite.extract(tmp_path / "in" / names[3], checkpoint, tmp_path / "alone", **FLOAT32)
    assert np.allclose(alone["cls_token"][0], store["cls_token"][sorted(names).index(names[3])], atol=1e-6)


def test_doubled_keys_vanished_files_and_files_that_come_back(checkpoint, tmp_path):
    names = write_pictures(tmp_path / "in", 6)
    (tmp_path / "in" / "list.txt").write_text("\n".join([*names, names[2], "gone.jpg"]))
    store = dinov3_lite.extract(tmp_path / "in" / "list.txt", checkpoint, tmp_path / "out", **FLOAT32)
    assert list(store.keys) == names
    assert [(r["key"], r["picture"]) for r in store.rejects] == [(names[2], 6), ("gone.jpg", 7)]

    # where no file at all is there, it is the folder that is missing: nothing is written, and it may come back
    (tmp_path / "in").rename(tmp_path / "away")
    (tmp_path / "list.txt").write_text("\n".join(f"in/{name}" for name in names))
    with pytest.raises(ShardsFailed, match=r"1 of 1 shards failed; shard 0: none of 6 pictures can be read"):
        dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "late", **FLOAT32)
    (tmp_path / "away").rename(tmp_path / "in")
    late = dinov3_lite.extract(tmp_path / "list.txt", checkpoint, tmp_path / "late", **FLOAT32)
    assert np.array_equal(late["cls_token"][:], store["cls_token"][:])
    assert not list((tmp_path / "late" / "failed").iterdir())


def test_damaged_tars(checkpoint, tmp_path):
    data = [(f"{i}.jpg", picture(i)) for i in range(6)]
    write_tar(tmp_path / "0.tar", [*data, ("0.jpg", picture(9)), ("sub/x.txt", b"")])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(b"")
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "3.tar").write_bytes(whole[: 512 * 2 + 2000])
    write_tar(tmp_path / "4.tar", [])
    write_tar(tmp_path / "5.tar", [("a.jpg", b"bad"), *data])
    write_tar(tmp_path / "6.tgz", data)
    (tmp_path / "7.tgz").write_bytes((tmp_path / "6.tgz").read_bytes()[:1500])
    (tmp_path / "8.tar").write_bytes(flip(whole, 512 + 2048 + 5))  # in the second header
    (tmp_path / "9.tar").write_bytes(whole[: whole.rindex(b"sub/x.txt") + 512])  # without its end
    tars = sorted(str(file) for file in tmp_path.glob("*.t*"))
    store = dinov3_lite.extract(tars, checkpoint, tmp_path / "out", **FLOAT32)
    rows = np.diff(store.offsets).tolist()
    assert rows[:3] == [6, 0, 0] and rows[4:7] == [0, 6, 6]
    assert store.keys[0:6] == [f"0.tar/{i}.jpg" for i in range(6)]
    assert np.array_equal(store["cls_token"][rows[3] + 6 : rows[3] + 12], store["cls_token"][:6])
    reasons = [(reject["shard"], reject["key"], reject["reason"]) for reject in store.rejects]
    assert (0, "0.tar/0.jpg", "its key is that of an earlier picture") in reasons
    assert (5, "5.tar/a.jpg", "not an image") in reasons
    for shard, name in ((1, "1.tar"), (2, "2.tar"), (3, "3.tar"), (7, "7.tgz"), (8, "8.tar"), (9, "9.tar")):
        assert any(s == shard and key == name and "not a whole tar file" in reason for s, key, reason in reasons), name
    assert len(reasons) == 9 and rows[8:] == [1, 6]


def test_a_tar_that_was_exchanged_fails_its_shard_alone(checkpoint, tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", picture(0))])
    write_tar(tmp_path / "b.tar", [("0.jpg", picture(0))])
    arguments = ([tmp_path / "a.tar", tmp_path / "b.tar"], checkpoint, tmp_path / "out")
    dinov3_lite.extract(*arguments, part="0/2")
    write_tar(tmp_path / "b.tar", [(f"{i}.jpg", picture(i)) for i in range(9)])
    with pytest.raises(ShardsFailed, match="b.tar: has 20480 bytes|b.tar: has .* when it was planned"):
        dinov3_lite.extract(*arguments)
    assert dinov3_lite.open_features(tmp_path / "out").missing == [1]


def test_more_rejects_than_allowed_fail_a_shard(checkpoint, tmp_path):
    names = write_pictures(tmp_path / "in", 6)
    for name in names[:2]:
        (tmp_path / "in" / name).write_bytes(b"bad")
    with pytest.raises(ShardsFailed, match="2 of 6 pictures were rejected, more than 1: the first, .*: not an image"):
        dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", max_rejects=1, **FLOAT32)
    assert dinov3_lite.open_features(tmp_path / "out").missing == [0]
    store = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", max_rejects="5%", **FLOAT32)
    assert len(store) == 4 and store.missing == []  # a percentage always allows ten


def test_why_a_shard_failed_goes_once_it_is_done(checkpoint, tmp_path):
    """Not when all are: with other shards to be done, it would be said of one that is."""
    names, bad = write_pictures(tmp_path / "in", 4), {}
    for name in (names[0], names[2]):
        bad[name] = (tmp_path / "in" / name).read_bytes()
        (tmp_path / "in" / name).write_bytes(b"bad")
    arguments, options = (tmp_path / "in", checkpoint, tmp_path / "out"), {"shard_size": 2, "max_rejects": 0}
    with pytest.raises(ShardsFailed, match="2 of 2 shards failed"):
        dinov3_lite.extract(*arguments, **options)
    for name, data in bad.items():
        (tmp_path / "in" / name).write_bytes(data)
    dinov3_lite.extract(*arguments, part="0/2", **options)
    assert [file.name for file in (tmp_path / "out" / "failed").iterdir()] == ["00000001.json"]


def test_a_read_is_tried_three_times_and_then_fails_its_shard(checkpoint, tmp_path, monkeypatch):
    names = write_pictures(tmp_path / "in", 8)
    real, failures = reading._read_local, {names[1]: 2, names[6]: 99}

    def flaky(path):
        name = os.path.relpath(path, tmp_path / "in")
        failures[name] = failures.get(name, 0) - 1
        if failures[name] >= 0:
            raise OSError(errno.EIO, "Input/output error", path)
        return real(path)

    monkeypatch.setattr(reading, "_read_local", flaky)
    with pytest.raises(
        ShardsFailed, match=f"1 of 2 shards failed; shard 1: reading failed: {names[6]}: .*Input/output"
    ):
        dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", shard_size=4)
    assert failures[names[6]] == 96  # tried thrice
    assert list(dinov3_lite.open_features(tmp_path / "out").keys) == names[:4]
    assert check.status(tmp_path / "out")["failed"].keys() == {1}
    monkeypatch.setattr(reading, "_read_local", real)
    assert len(dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", shard_size=4)) == 8
    assert check.status(tmp_path / "out")["failed"] == {}


def test_an_archive_is_read_again_from_its_start(checkpoint, tmp_path, monkeypatch):
    """Whole or not at all: one that fails thrice, or that has fewer pictures than were counted, fails its shard."""
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", picture(i)) for i in range(5)])
    real, failures, most = reading._read_tar, [99], [5]

    def flaky(shard):
        for i, item in enumerate(real(shard)):
            if i == most[0]:
                return
            if i == 3 and failures[0] > 0:
                failures[0] -= 1
                raise OSError(errno.EIO, "Input/output error", shard["path"])
            yield item

    monkeypatch.setattr(reading, "_read_tar", flaky)
    arguments = ([tmp_path / "a.tar"], checkpoint, tmp_path / "out")
    with pytest.raises(ShardsFailed, match="1 of 1 shards failed; shard 0: reading failed: .*Input/output error"):
        dinov3_lite.extract(*arguments, **FLOAT32)
    assert failures == [96]
    failures[0], most[0] = 0, 2
    with pytest.raises(ShardsFailed, match="reading failed: 2 pictures were read, and 5 are planned"):
        dinov3_lite.extract(*arguments, **FLOAT32)
    failures[0], most[0] = 2, 5
    store = dinov3_lite.extract(*arguments, **FLOAT32)
    assert failures == [0] and list(store.keys) == [f"a.tar/{i}.jpg" for i in range(5)]
    assert not list((tmp_path / "out" / "failed").iterdir())


def test_a_full_disk_ends_in_a_sentence_and_goes_on_when_there_is_room(checkpoint, tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "in", 8)
    real, room = writer.Hashed.write, [500]

    def write(self, data):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    command = [str(tmp_path / "in"), "--model", str(checkpoint), "--output", str(tmp_path / "out"), "--shard-size", "3"]
    dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "undisturbed", shard_size=3)
    # the job is there before
    dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", shard_size=3, part="2/3")
    monkeypatch.setattr(writer.Hashed, "write", write)
    assert main(["extract", *command]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and str(tmp_path / "out") in error and error.count("\n") == 1, error
    assert not list((tmp_path / "out").rglob("*.tmp"))
    monkeypatch.setattr(writer.Hashed, "write", real)
    assert main(["extract", *command]) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_a_disk_that_is_full_before_the_plan_is_written(checkpoint, tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "in", 2)

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plan._Counted, "write", full)
    assert main(["extract", str(tmp_path / "in"), "--model", str(checkpoint), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / 'out'}: can't write the plan (No space left on device)\n" in error
    assert not list((tmp_path / "out").iterdir())


def test_what_can_not_be_written_is_said_in_a_line(checkpoint, tmp_path, capsys):
    write_pictures(tmp_path / "in", 2)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out", "/proc/out"):
        assert main(["extract", str(tmp_path / "in"), "--model", str(checkpoint), "--output", str(output)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("dinov3_lite: ") and error.count("\n") == 1 and str(output).split("/out")[0] in error


def test_verify_finds_every_changed_missing_and_shortened_file(checkpoint, tmp_path, capsys):
    write_pictures(tmp_path / "in", 9)
    dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", shard_size=2)
    assert list(check.verify(tmp_path / "out")) == []
    files = {i: tmp_path / "out" / "cls_token" / f"{i:08d}.npy" for i in range(5)}
    files[0].write_bytes(flip(files[0].read_bytes(), 150))
    files[1].write_bytes(files[1].read_bytes()[:-2])
    files[2].unlink()
    keys = tmp_path / "out" / "keys" / "00000003.txt"
    keys.write_bytes(flip(keys.read_bytes(), 0))
    marker = tmp_path / "out" / "shards" / "00000004.json"
    marker.write_text(marker.read_text().replace('"rows": 1', '"rows": 2'))
    faults = dict(check.verify(tmp_path / "out"))
    assert faults.keys() == {0, 1, 2, 3, 4}
    assert main(["extract", "--verify", str(tmp_path / "out")]) == 3
    out = capsys.readouterr().out
    for words in ("has changed: its SHA-256", "has 254 bytes, not 256", "is gone", "5 of 5 shards are damaged: delete"):
        assert words in out, out
    for i in range(5):
        (tmp_path / "out" / "shards" / f"{i:08d}.json").unlink()
    (tmp_path / "out" / "index.json").unlink()
    dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", shard_size=2)
    assert main(["extract", "--verify", str(tmp_path / "out")]) == 0


def test_features_that_are_not_finite_are_rejects(tmp_path):
    from helpers import trained_like

    weights = trained_like(TINY)
    weights["norm.weight"][3] = 1e7  # beyond float16 for most pictures
    checkpoint = write_checkpoint(tmp_path / "model", TINY, weights, PREPROCESSING_48)
    names = write_pictures(tmp_path / "in", 4)
    exact = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "32", store="float32")
    fits = np.abs(exact["cls_token"][:]).max(axis=1) < 65504
    store = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "16", max_rejects=4)
    assert list(store.keys) == [name for name, fit in zip(names, fits, strict=True) if fit]
    assert {r["reason"] for r in store.rejects} == {"features that are not finite, or beyond what they are stored in"}


def test_the_reason_for_a_reject_has_no_address_in_it(checkpoint, tmp_path):
    from dinov3_lite.extraction.decode import decode

    for make, _ in BAD.values():
        with pytest.raises(reading.Rejected) as first:
            decode(make())
        assert "0x" not in str(first.value) and "\n" not in str(first.value)
