"""`extract` and dead processes: killed at any step, going on ends in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from pictures import picture, write_pictures

import dinov3_lite
from dinov3_lite.extraction.folder import Folder

pytest.importorskip("PIL")
pytest_plugins = ["extracting"]


@pytest.fixture
def command(checkpoint, tmp_path):
    """The command in a process of its own, in which `hook` is run first."""

    def start(*words: object, hook: str = "", **env: str) -> subprocess.Popen:
        (tmp_path / "hook").mkdir(exist_ok=True)
        (tmp_path / "hook" / "sitecustomize.py").write_text(hook)
        path = os.pathsep.join(filter(None, (str(tmp_path / "hook"), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-m", "dinov3_lite", "extract", tmp_path / "in", "--model", checkpoint,
             "--output", tmp_path / "out", "--quiet", *map(str, words)],
            env={**os.environ, "PYTHONPATH": path, **env},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


POISON = """
import builtins, os, signal
real = builtins.open
def deadly(path, *args, **kwargs):
    if str(path).endswith("poison.jpg"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(path, *args, **kwargs)
builtins.open = deadly
"""


def test_a_shard_that_kills_its_process_is_set_aside_and_the_rest_is_done(command, tmp_path):
    names = write_pictures(tmp_path / "in", 5)
    (tmp_path / "in" / "a poison.jpg").write_bytes(picture(0))
    for _ in range(3):
        process = command("--shard-size", 2, hook=POISON)
        process.communicate()
        assert process.returncode == -signal.SIGSEGV
    process = command("--shard-size", 2, hook=POISON)
    out, err = process.communicate()
    assert process.returncode == 3
    assert "1 of 3 shards failed; shard 0: it ended its process 4 times, at last by signal 11" in err
    assert "2 of 3 shards" in out and "shard 0 failed: it ended its process" in out
    store = dinov3_lite.open_features(tmp_path / "out")
    assert store.missing == [0] and list(store.keys) == names[1:]
    assert len(list((tmp_path / "out" / "attempts").iterdir())) == 3  # what tells of the last death is in failed/
    process = command("--shard-size", 2, hook=POISON)  # it stays set aside
    process.communicate()
    assert process.returncode == 3

    (tmp_path / "out" / "failed" / "00000000.json").unlink()
    process = command("--shard-size", 2)  # and when its owner says so it is tried, in a process of its own, and done
    out, err = process.communicate()
    assert process.returncode == 0, err
    store = dinov3_lite.open_features(tmp_path / "out")
    assert store.missing == [] and list(store.keys) == ["a poison.jpg", *names]
    assert not list((tmp_path / "out" / "attempts").iterdir()) and not list((tmp_path / "out" / "failed").iterdir())


def test_sigterm_ends_after_the_shard_at_hand(command, tmp_path):
    write_pictures(tmp_path / "in", 40)
    slow = "import builtins, time\nreal = builtins.open\n"
    slow += "def late(path, *a, **k):\n    if str(path).endswith(('.jpg', '.png', '.webp')): time.sleep(0.1)\n"
    slow += "    return real(path, *a, **k)\nbuiltins.open = late\n"
    process = command("--shard-size", 4, "--decode-threads", 1, hook=slow)
    for _ in range(600):
        if (tmp_path / "out" / "shards").is_dir() and list((tmp_path / "out" / "shards").iterdir()):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143 and "stopped by SIGTERM after shard" in err
    done = dinov3_lite.open_features(tmp_path / "out")
    assert 1 <= len(done.shards) < 10 and not list((tmp_path / "out").rglob("*.tmp"))
    process = command("--shard-size", 4)
    process.communicate()
    assert process.returncode == 0 and len(dinov3_lite.open_features(tmp_path / "out")) == 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("engine", ["local", "parts"])
def test_killed_at_every_step_and_gone_on_the_files_are_the_same(engine):
    words = ["--kills", "14" if engine == "local" else "4", "--pictures", "24", "--engines", engine, "--dry"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "extract_kills.py", *words],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["engines"][engine]
    assert sum(result["kills"].values()) >= 4 and result["most_shards_redone_a_kill"] <= 1


def test_whose_attempts_count_as_deaths(tmp_path):
    """Those of processes that live on this machine do not; of another nobody can tell, and a shard is one process's."""
    folder, host = Folder(tmp_path), socket.gethostname()
    folder.make([])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for shard, pid, at in (
        (0, os.getppid(), host),
        (1, gone.pid, host),
        (2, os.getppid(), "elsewhere"),
        (3, os.getpid(), host),
    ):
        (folder.attempts / f"{shard:08d}.{pid}.0a1b2c3d.{at}").touch()
    with folder.attempt(4):
        assert len(folder.names(folder.attempts)) == 5
    assert {shard: len(files) for shard, files in folder.deaths().items()} == {1: 1, 2: 1, 3: 1}


def test_what_is_left_of_the_dead_goes_and_what_the_living_write_stays(checkpoint, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    write_pictures(tmp_path / "in", 5)
    store = dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", shard_size=2)
    (tmp_path / "out" / "index.json").unlink()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    dead = [".job.json.0123abcd.tmp", ".index.json.0123abcd.tmp", "cls_token/.00000001.npy.0123abcd.tmp"]
    dead += [f".plan.01234567.{gone.pid}.{host}.tmp"]
    living = [
        ".index.json.4567abcd.tmp",
        "keys/.00000001.txt.4567abcd.tmp",
        f".plan.89abcdef.{os.getppid()}.{host}.tmp",
    ]
    for name in (dead[-1], living[-1]):
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / "items.txt").write_text("")
    locked = []
    for name in (*dead[:-1], *living[:-1]):
        locked.append((tmp_path / "out" / name).open("wb"))
        if name in living:
            fcntl.flock(locked[-1], fcntl.LOCK_EX)
    dinov3_lite.extract(tmp_path / "in", checkpoint, tmp_path / "out", shard_size=2)
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob(".*.tmp")}
    assert left == set(living) and list(store.keys) == list(dinov3_lite.open_features(tmp_path / "out").keys)
