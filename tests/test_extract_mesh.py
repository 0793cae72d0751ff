"""`extract --mesh tp=N`: several processes with one model between them do a part."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from extracted import OUTPUTS, tree
from helpers import relative_error
from launch import torchrun

import dinov3_lite
from dinov3_lite.extraction.mesh import Team, parse_mesh
from dinov3_lite.extraction.parts import Part

pytest.importorskip("PIL")
pytest_plugins = ["extracting"]
SUPPORT = Path(__file__).parent / "support"
NOWHERE = "/nowhere: no such file or folder, and no hub id (owner/name) either"
WHAT = {"outputs": OUTPUTS, "store": "float32", "batch_size": 3, "shard_size": 5, "decode_threads": 1}


def became(done: subprocess.CompletedProcess[str]) -> dict[tuple[int, int], str]:
    """What `extract_in_meshes.py` says of each rank and job."""
    found = re.findall(r"^rank (\d) job (\d): (.*)$", done.stdout, re.MULTILINE)
    return {(int(rank), int(job)): what for rank, job, what in found}


def same(store, whole) -> bool:
    """The same rows up to the rounding of sums over processes."""
    assert list(store.keys) == list(whole.keys) and store.outputs == whole.outputs
    for output in whole.outputs:
        for a, b in zip(store[output].blocks(), whole[output].blocks(), strict=True):
            for x, y in zip(a, b, strict=True):
                x, y = torch.tensor(np.array(x)).double(), torch.tensor(np.array(y)).double()
                assert relative_error(x, y) <= 1e-6, output
    return True


def test_a_part_is_a_mesh(checkpoint, photos, tmp_path):
    """Two meshes; one of which a process dies; the same command again, in other processes: the same bytes."""
    whole = dinov3_lite.extract(photos, checkpoint, tmp_path / "whole", **WHAT)
    native = {**WHAT, "size": "native", "outputs": ["cls_token", "patch_tokens"]}
    packed = dinov3_lite.extract(photos, checkpoint, tmp_path / "packed", **native)
    job = {"inputs": str(photos), "model": str(checkpoint), "mesh": "tp=2", "progress": False, **WHAT}

    rounded = dinov3_lite.extract(photos, checkpoint, tmp_path / "rounded", **{**WHAT, "resize": "uint8"})

    two = [{**job, "output": str(tmp_path / "two")}, {**job, **native, "output": str(tmp_path / "native")}]
    two += [{**job, "resize": "uint8", "output": str(tmp_path / "uint8")}]
    done = torchrun(4, SUPPORT / "extract_in_meshes.py", json.dumps(two))
    assert done.returncode == 0, done.stderr
    two_meshes = dinov3_lite.open_features(tmp_path / "two")
    assert not two_meshes.missing and same(two_meshes, whole)
    assert same(dinov3_lite.open_features(tmp_path / "native"), packed)
    assert same(dinov3_lite.open_features(tmp_path / "uint8"), rounded)
    assert two_meshes.job["mesh"] == {"tp": 2} and "mesh" not in whole.job
    writers = {path.stem.rpartition("-")[2] for path in (tmp_path / "two" / "log").iterdir()}
    assert len(writers) == 2  # of four processes

    killed = [{**job, "output": str(tmp_path / "one"), "dies": 1}]
    done = torchrun(2, SUPPORT / "extract_in_meshes.py", json.dumps(killed))
    assert done.returncode != 0 and (1, 0) not in became(done)
    first = became(done).get((0, 0), "RuntimeError: a process of the mesh failed or ended ()")
    assert re.match(r"RuntimeError: a process of the mesh failed or ended \(.*\): the same command goes on", first) or (
        first.endswith("ended ()")  # torchrun ended it before it could say so
    )
    half = dinov3_lite.open_features(tmp_path / "one")
    assert half.missing

    again = [{**job, "output": str(tmp_path / "new"), "model": "/nowhere"}, {**job, "output": str(tmp_path / "one")}]
    done = torchrun(2, SUPPORT / "extract_in_meshes.py", json.dumps(again))
    assert done.returncode == 0, done.stderr
    assert became(done) == {
        (0, 0): f"FileNotFoundError: {NOWHERE}",
        (1, 0): f"RuntimeError: the first process of the mesh ended: {NOWHERE}",
        (0, 1): "16 rows",
        (1, 1): "16 rows",
    }
    assert tree(tmp_path / "one") == tree(tmp_path / "two")

    with pytest.raises(ValueError, match=r"another job: mesh is \{'tp': 2\} there and None here"):
        dinov3_lite.extract(photos, checkpoint, tmp_path / "two", **WHAT)


def test_meshes_that_are_refused(checkpoint, photos, tmp_path, monkeypatch):
    for text in ("tp", "tp=0", "fsdp=2", "tp=2,fsdp=2", "2"):
        with pytest.raises(ValueError, match=rf"mesh '{text}': expected tp=N"):
            parse_mesh(text)
    extract = dinov3_lite.extract
    with pytest.raises(ValueError, match=r"mesh 'tp=2' is for processes that torchrun starts"):
        extract(photos, checkpoint, tmp_path / "out", mesh="tp=2")
    with pytest.raises(ValueError, match=r"mesh 'tp=2' loads a checkpoint in every process"):
        extract(photos, checkpoint, tmp_path / "out", mesh="tp=2", engine="ray")
    with pytest.raises(ValueError, match="torchrun started 3 processes: expected a multiple of 2"):
        Team(2, env={"RANK": "0", "WORLD_SIZE": "3"})
    assert not (tmp_path / "out").exists()
    team = Team(2, env={"RANK": "2", "WORLD_SIZE": "4"})
    assert team.leads and team.part(Part(2, 4, "RANK"), given=False) == Part(1, 2, "RANK")
    with pytest.raises(ValueError, match="part 0/3 is given to 2 meshes at once"):
        team.part(Part(0, 3), given=True)
