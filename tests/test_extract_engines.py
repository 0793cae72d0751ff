"""Which process does which shard: parts by launchers' variables, and Ray. The files are the same whoever wrote them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest
from extracted import tree
from helpers import TINY, run_python, trained_like, write_checkpoint
from pictures import PREPROCESSING_48, write_pictures

import dinov3_lite
from dinov3_lite.extraction.engines import RayWorker
from dinov3_lite.extraction.parts import Part, parse_part, part_from_environment
from dinov3_lite.extraction.shard import Setup

pytest.importorskip("PIL")

SLURM_ARRAY = {
    "SLURM_ARRAY_TASK_ID": "12",
    "SLURM_ARRAY_TASK_MIN": "10",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "1",
}
OPTIONS = {"outputs": ["cls_token", "patch_tokens"], "batch_size": 4, "shard_size": 5}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A checkpoint, pictures (one of them damaged), and the files of an undisturbed run."""
    root = tmp_path_factory.mktemp("job")
    write_checkpoint(root / "model", TINY, preprocessing=PREPROCESSING_48)
    write_pictures(root / "in", 32)
    (root / "in" / "p005.jpg").write_bytes(b"damaged")
    dinov3_lite.extract(root / "in", root / "model", root / "out", **OPTIONS)
    return root


@pytest.mark.parametrize(
    ("env", "index", "count"),
    [
        ({}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, 3, 8),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, 5, 6),
        (SLURM_ARRAY, 2, 4),
        ({**SLURM_ARRAY, "SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_STEP": "2"}, 2, 4),
        ({**SLURM_ARRAY, "SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, 7, 12),
        ({**SLURM_ARRAY, "RANK": "2", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 18, 32),
        ({"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETIONS": "10"}, 4, 10),
        ({"JOB_COMPLETION_INDEX": "4", "WORLD_SIZE": "10"}, 4, 10),
        ({"SLURM_PROCID": "0"}, 0, 1),
    ],
)
def test_launchers_say_which_part_it_is(env, index, count):
    part = part_from_environment(env)
    assert (part.index, part.count) == (index, count)
    assert all(name in part.told_by for name in ("RANK",) if name in env)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JOB_COMPLETION_INDEX": "4"}, "set JOB_COMPLETIONS"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, "RANK: part 8 of 8: give --part"),
    ],
)
def test_a_part_that_can_not_be_is_an_error(env, message):
    with pytest.raises(ValueError, match=message):
        part_from_environment(env)


@pytest.mark.parametrize("first", [0, 1])
def test_parts_share_all_shards_whether_counted_from_0_or_from_1(first):
    parts = [parse_part(f"{i}/3") for i in range(first, first + 3)]
    assert sorted(shard for part in parts for shard in range(10) if shard in part) == list(range(10))
    assert parse_part("3/3") == Part(0, 3)
    for text in ("4/3", "1", "-1/3", "0/0", "a/b"):
        with pytest.raises(ValueError, match="expected I/N"):
            parse_part(text)


def test_parts_one_after_the_other_write_what_one_process_writes(job, tmp_path):
    for i, missing in ((1, [0, 2, 3, 5, 6]), (0, [2, 5]), (2, [])):
        store = dinov3_lite.extract(job / "in", job / "model", tmp_path / "out", part=f"{i}/3", **OPTIONS)
        assert store.missing == missing
    assert tree(tmp_path / "out") == tree(job / "out")


def test_two_processes_of_torchrun_write_what_one_writes(job, tmp_path):
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone",
        "-m", "dinov3_lite", "extract", job / "in", "--model", job / "model",
        "--output", tmp_path / "out", "--outputs", "cls_token", "patch_tokens", "--batch-size", 4, "--shard-size", 5,
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(job / "out")
    logs = [file.read_text().count("\n") for file in (tmp_path / "out" / "log").iterdir()]
    assert sorted(logs) == [3, 4]  # shards of each process


def test_ray_with_one_of_two_actors_killed_and_a_shard_failed(job, tmp_path):
    """What is left of it when a shard may not have rejects, and the whole when it may."""
    pytest.importorskip("ray.data")
    code = f"""
import os, signal, threading, time
from pathlib import Path
import dinov3_lite

output, killed = Path({str(tmp_path / "out")!r}), []

def kill_one():
    while not killed:
        time.sleep(0.01)
        for file in (output / "attempts").glob("*"):
            killed.append(int(file.name.split(".")[1]))
            os.kill(killed[0], signal.SIGKILL)
            return

threading.Thread(target=kill_one, daemon=True).start()
options = {OPTIONS!r}
try:
    dinov3_lite.extract({str(job / "in")!r}, {str(job / "model")!r}, output, engine="ray", workers=2, max_rejects=0,
                        **options)
except RuntimeError as error:
    print(len(killed), sorted(error.failures), error)
"""
    done = run_python(code, timeout=300)
    last = done.stdout.splitlines()[-1]  # after what Ray has to say of the actor
    assert last.startswith("1 [2] "), done.stdout + done.stderr
    assert "1 of 7 shards failed; shard 2: 1 of 5 pictures were rejected, more than 0" in last
    store = dinov3_lite.open_features(tmp_path / "out")
    assert store.missing == [2] and len(store) == 27
    dinov3_lite.extract(job / "in", job / "model", tmp_path / "out", **OPTIONS)
    assert tree(tmp_path / "out") == tree(job / "out")


def test_an_actor_that_begins_late_finds_that_the_checkpoint_was_exchanged(job, tmp_path):
    dinov3_lite.extract(job / "in", job / "model", tmp_path / "out", part="1/7", **OPTIONS)
    setup = asdict(Setup(str(tmp_path / "out"), str(job / "model"), "cpu", decode_threads=1))
    assert RayWorker(setup)({"shard": [2]}) == {"shard": [2], "reason": [""], "error": [""]}
    other = write_checkpoint(tmp_path / "model", TINY, trained_like(TINY, seed=1), PREPROCESSING_48)
    (told,) = RayWorker({**setup, "model": str(other)})({"shard": [3]})["error"]
    assert told.startswith(f"{other}: other weights than those of the job in {tmp_path / 'out'}: name the same model")
    assert dinov3_lite.open_features(tmp_path / "out").shards == [1, 2]


def test_sigterm_in_a_thread_that_is_not_the_main_one_stays_whose_it_was(job, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    arguments = (job / "in", job / "model", tmp_path / "out")
    thread = threading.Thread(target=dinov3_lite.extract, args=arguments, kwargs=OPTIONS)
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGTERM) == before
        time.sleep(0.01)
    assert tree(tmp_path / "out") == tree(job / "out")
