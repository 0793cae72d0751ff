"""The tools for a GPU, without one: what a sweep chooses and writes, and that nothing of the first half hour has rotted."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import gpu
import pytest
import torch
import tune
from dinov3_lite.kernels import tuning
from dinov3_lite.kernels.measured import Measured, Tiles
from helpers import ROOT

pytest.importorskip("triton")

ENTRY = Measured(
    where='A "GPU"',
    when="2026-11-25",
    torch="2.11.0",
    triton="3.6.0",
    tiles={
        "forward": {64: Tiles(64, 32, 4, 2), 128: Tiles(128, 128, 8, 1)},
        "backward_q": {64: Tiles(32, 64, 4, 1), 128: Tiles(64, 32, 8, 2)},
        "backward_kv": {64: Tiles(16, 64, 4, 1), 128: Tiles(32, 64, 8, 3)},
    },
    fused_up_to=325,
    sdpa_beyond={64: 1029, 128: 201},
    layer_norm_warps={384: 4, 1024: 1},
    swiglu=(2048, 8),
)


def test_a_dry_run_of_all_steps(tmp_path):
    """As on a machine where nothing is installed but what the tools need, twice: what is done is not done again."""
    blocked = ("transformers", "timm", "huggingface_hub", "tqdm", "PIL", "matplotlib", "peft", "scipy")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n")
    command = [sys.executable, ROOT / "tools" / "gpu.py", "--dry-run", "--output", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    state = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert list(state) == [step.name for step in gpu.STEPS]
    for step in gpu.STEPS:
        ended = "done" if step.dry else "skipped: it is timed, and a dry run times nothing"
        assert state[step.name]["ended"] == ended, (step.name, first.stdout)
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert again.stdout.count(": done before") == sum(step.dry is not None for step in gpu.STEPS), again.stdout


def test_the_most_valuable_steps_get_the_time_there_is(tmp_path, monkeypatch):
    steps = [
        gpu.Step("quick", 30, ("-c", "print('here')")),
        gpu.Step("slow", 1, ("-c", "import time; time.sleep(60)")),
        gpu.Step("wrong", 30, ("-c", "raise SystemExit(3)")),
        gpu.Step("long", 600, ("-c", "")),
        gpu.Step("sanitizer", 1, (), needs="a-program-that-nobody-has"),
    ]
    monkeypatch.setattr(gpu, "fingerprint", lambda step: step.name)
    state = gpu.run_all(steps, tmp_path, minutes=2, dry=False, again=False)
    assert {name: how["ended"].split(":")[0] for name, how in state.items()} == {
        "quick": "done",
        "slow": "ran out of its 1 seconds",
        "wrong": "failed, exit status 3",
        "long": "skipped",
        "sanitizer": "skipped",
    }
    assert (tmp_path / "quick.log").read_text() == "here\n"
    said = gpu.summary(state, tmp_path)
    assert "it wants 600 seconds" in said and "a-program-that-nobody-has is not installed" in said
    assert sum(step.seconds for step in gpu.STEPS[:3]) <= 12 * 60


@pytest.mark.parametrize("kernel", tune.GRID)
@pytest.mark.parametrize("arch, D", [(90, 64), (90, 128), (80, 64)])
def test_candidates_begin_with_the_present_launch(kernel, arch, D):
    found = tune.candidates(kernel, arch, D)
    assert found[0].tiles == tuning.tiles(kernel, arch, D, 2)
    assert len(found) == len(set(found)) > 8
    for candidate in found[1:]:
        assert candidate.tiles.block_m * candidate.tiles.block_n <= 128 * 32 * candidate.tiles.num_warps
    distances = [sum(a != b for a, b in zip(c.tiles, found[0].tiles, strict=True)) for c in found]
    assert distances == sorted(distances)


def test_a_candidate_is_launched_in_place_of_one_kernel():
    candidate = tune.Candidate("forward", 90, 64, Tiles(128, 32, 8, 1))
    before = {kernel: tuning.tiles(kernel, 90, 64, 2) for kernel in tune.GRID}
    with tune.launched_with(candidate):
        assert {kernel: tuning.tiles(kernel, 90, 64, 2) for kernel in tune.GRID} == {
            **before,
            "forward": candidate.tiles,
        }
    assert tuning.tiles("forward", 90, 64, 2) == before["forward"]


def test_the_best_is_so_over_all_lengths():
    rows = [
        {"tiles": "present", "ms": {201: 1.0, 1029: 10.0}},
        {"tiles": "short", "ms": {201: 0.5, 1029: 20.0}},
        {"tiles": "both", "ms": {201: 0.9, 1029: 9.5}},
    ]
    assert tune.ranked(rows) == ["both", "present", "short"]
    assert tune.threshold([10, 20, 30], [True, True, False]) == 20
    assert tune.threshold([10, 20, 30], [False, True, True]) == 0


def test_a_sweep_in_the_interpreter(monkeypatch):
    """Every call that is timed on a GPU, made once: the times are made up."""
    import kernel_inputs  # noqa: F401  which mends the interpreter's bfloat16

    if torch.cuda.is_available():
        pytest.skip("a rehearsal: here is a GPU")
    made_up = iter(range(10**6, 0, -1))  # each call is faster than the one before
    monkeypatch.setattr(tune, "milliseconds", lambda call: (call(), next(made_up))[1])
    monkeypatch.setattr(tune, "without", lambda fault, tried, *_: tried[:2])
    for name, value in {"TOKENS": (6, 9), "LENGTHS": (6, 9), "CHANNELS": (128, 384), "ROWS": 2, "HIDDEN": 64}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune, "FILL", 6)
    entry, rows = tune.sweep([64], minutes=10, pool=None)
    assert entry.tiles == {kernel: {64: tune.candidates(kernel, 90, 64)[1].tiles} for kernel in tune.GRID}
    assert entry.fused_up_to == 0 and entry.sdpa_beyond == {64: 0}  # the later way is always faster
    assert entry.layer_norm_warps == {128: 1, 384: 4} and entry.swiglu == (2048, 8)
    assert runpy.run_path is not None and len(rows) == 3 * 2 + 1 + 1 + 3 + 9
    json.dumps(rows)


def test_what_is_written_is_what_tuning_reads(tmp_path, monkeypatch):
    (tmp_path / "measured.py").write_text(tune.render({90: ENTRY, 80: ENTRY._replace(fused_up_to=0)}))
    read = runpy.run_path(str(tmp_path / "measured.py"))["MEASURED"]
    assert read[90] == ENTRY and list(read) == [80, 90]
    assert "No GPU has been measured" not in (tmp_path / "measured.py").read_text()

    monkeypatch.setattr(tuning, "MEASURED", {90: ENTRY})
    device = torch.device("cpu")  # launched as sm_90 is
    assert tuning.tiles("forward", 90, 64, 2) == Tiles(64, 32, 4, 2)
    assert tuning.tiles("forward", 90, 64, 4) == tuning.TABLES["forward"]["float32"][64]
    assert tuning.tiles("forward", 90, 80, 2) == tuning.TABLES["forward"]["wgmma"][128]
    assert tuning.tiles("forward", 80, 64, 2) == tuning.TABLES["forward"]["mma"][64]
    assert tuning.fused_up_to(device) == 325
    assert not tuning.prefers_sdpa(1029, 64, device, False) and tuning.prefers_sdpa(1030, 64, device, False)
    assert tuning.prefers_sdpa(202, 128, device, False) and tuning.prefers_sdpa(601, 32, device, False)
    assert tuning.layer_norm_launch(90, 384)["num_warps"] == 4 and tuning.layer_norm_launch(90, 768)["num_warps"] == 4
    assert tuning.layer_norm_launch(90, 1024)["num_warps"] == 1 and tuning.layer_norm_launch(80, 1024)["num_warps"] == 4
    assert {**tuning.swiglu_launch(90, 64)} == {**tuning.swiglu_launch(80, 64), "BLOCK_F": 2048, "num_warps": 8}


@pytest.mark.parametrize(
    "operation, capability, dtype, width, triton, measured",
    [
        ("rope_attention", 90, torch.bfloat16, 64, "3.6.0", True),
        ("rotate", 90, torch.float16, 128, "3.6.0", True),
        ("rope_attention", 90, torch.bfloat16, 80, "3.6.0", False),
        ("rope_attention", 90, torch.float32, 64, "3.6.0", False),
        ("rope_attention", 89, torch.bfloat16, 64, "3.6.0", False),
        ("rope_attention", 90, torch.bfloat16, 64, "3.9.0", False),
        ("add_layer_norm_backward", 90, torch.bfloat16, 384, "3.6.0", True),
        ("add_layer_norm", 90, torch.bfloat16, 768, "3.6.0", False),
        ("swiglu", 90, torch.bfloat16, 100, "3.6.0", True),
    ],
)
def test_what_counts_as_measured(monkeypatch, operation, capability, dtype, width, triton, measured):
    monkeypatch.setattr(tuning, "MEASURED", {90: ENTRY})
    monkeypatch.setattr(tuning, "capability", lambda device: capability)
    monkeypatch.setattr(tuning.importlib.metadata, "version", lambda name: triton)
    ask = tuning.is_measured.__wrapped__
    assert ask(operation, torch.device("cuda", 0), dtype, width) == measured
    assert not ask(operation, torch.device("cpu"), dtype, width)
