"""Which launch a device, a head dim and a dtype get, and where the kernels say that they can't run."""

from __future__ import annotations

import importlib.metadata
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from dinov3_lite.kernels import availability, tuning
from dinov3_lite.kernels.measured import Measured, Tiles

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "capability, arch",
    [
        *(((8, 0), 80), ((8, 6), 86), ((8, 7), 86), ((8, 9), 86), ((9, 0), 90)),
        *(((10, 0), 100), ((10, 3), 100), ((12, 0), 120), ((12, 1), 120)),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_a_gpu_takes_the_newest_table_that_it_can_run(monkeypatch, capability, arch):
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    device = torch.device("cuda", 0)
    assert tuning.architecture.__wrapped__(device) == arch
    monkeypatch.setattr(tuning, "architecture", tuning.architecture.__wrapped__)
    assert tuning.fused_up_to(device) == (450 if arch in (90, 100) else 64)


@pytest.mark.parametrize(
    "arch, D, itemsize, cores, entry",
    [
        (90, 64, 2, "wgmma", 64),
        (100, 64, 2, "wgmma", 64),
        (80, 64, 2, "mma", 64),
        (120, 64, 2, "mma", 64),
        (90, 16, 2, "wgmma", 64),
        (90, 80, 2, "wgmma", 128),
        (86, 144, 2, "mma", 256),
        (90, 256, 2, "wgmma", 256),
        (90, 64, 4, "float32", 64),
        (80, 112, 4, "float32", 128),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_tiles_are_those_of_the_next_head_dim(arch, D, itemsize, cores, entry):
    for kernel, table in tuning.TABLES.items():
        launch = tuning.attention_launch(kernel, arch, D, itemsize)
        found = tuple(launch[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
        assert found == table[cores][entry]
        assert launch["enable_fp_fusion"]


@pytest.mark.parametrize("D, half, width", [(16, 16, 16), (32, 16, 32), (48, 32, 64), (64, 32, 64), (80, 64, 128)])
def test_widths_are_powers_of_two_that_tensor_cores_take(D, half, width):
    assert tuning.widths(D) == {"D": D, "HALF": half, "WIDTH": width}
    assert tuning.rotate_launch(D)["BLOCK"] * half == 2048


@pytest.mark.parametrize("C, block, warps", [(128, 128, 1), (384, 512, 2), (1280, 2048, 8), (4096, 4096, 16)])
@pytest.mark.usefixtures("unmeasured")
def test_a_row_is_a_program_of_8_channels_a_thread(C, block, warps):
    launch = tuning.layer_norm_launch(90, C)
    assert (launch["C"], launch["BLOCK_C"], launch["num_warps"]) == (C, block, warps)


def test_float32_is_exact_unless_pytorch_allows_tf32(monkeypatch):
    assert tuning.precision(torch.float32) == "ieee"
    for switches in ({"fp32_precision": "tf32"}, {"allow_tf32": True}):  # its name since torch 2.9, and before
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**switches))
        assert tuning.precision(torch.float32) == "tf32"
    assert tuning.precision(torch.bfloat16) == tuning.precision(torch.float16) == "ieee"


@pytest.mark.parametrize("T, warps, programs", [(3, 2, 3), (37, 2, 8), (37, 16, 1), (0, 1, 0)])
def test_a_backward_over_rows_takes_no_more_programs_than_rows(T, warps, programs):
    layer_norm = import_module("dinov3_lite.kernels.layer_norm")
    assert layer_norm._num_programs(T, warps, torch.device("cpu")) == programs


@pytest.mark.parametrize(
    "installed, cuda, capability, reason",
    [
        (False, True, (9, 0), "triton is not installed"),
        (True, False, (9, 0), "there is no CUDA device, and TRITON_INTERPRET=1 is not set"),
        (True, True, (7, 5), "Some GPU has capability 7.5: the kernels need 8.0 or more"),
        (True, True, (8, 0), None),
    ],
)
def test_why_the_kernels_cannot_run(monkeypatch, installed, cuda, capability, reason):
    monkeypatch.setattr(availability, "TRITON_INSTALLED", installed)
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    assert availability.unavailable_reason.__wrapped__() == reason
    monkeypatch.setattr(availability, "unavailable_reason", lambda: reason)
    assert availability.is_available() == (reason is None)


ENTRY = Measured(
    where="Some GPU", when="one day", torch="2", triton=importlib.metadata.version("triton"),
    tiles={kernel: {64: Tiles(16, 32, 1, 5)} for kernel in tuning.TABLES},
    fused_up_to=123, sdpa_beyond={64: 700}, layer_norm_warps={384: 7}, swiglu=(512, 2),
)  # fmt: skip


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """A GPU of capability 9.0, for which an entry can be made."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(major=9, minor=0))
    for name in ("architecture", "is_measured"):
        monkeypatch.setattr(tuning, name, getattr(tuning, name).__wrapped__)
    return torch.device("cuda", 0)


@pytest.mark.usefixtures("unmeasured")
def test_pytorchs_attention_takes_over_beyond_a_number_of_tokens(device, monkeypatch):
    for head_dim, most in ((16, 600), (64, 600), (80, 450), (128, 450)):
        assert [tuning.prefers_sdpa(most + i, head_dim, device, training=True) for i in (0, 1)] == [False, True]
    monkeypatch.setattr(tuning, "MEASURED", {90: ENTRY})
    for head_dim, most in ((64, 700), (128, 450)):  # of the other head dim nothing was measured
        assert [tuning.prefers_sdpa(most + i, head_dim, device, training=True) for i in (0, 1)] == [False, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels' tests are of our own attention")
@pytest.mark.usefixtures("unmeasured")
def test_where_pytorchs_attention_is_cudnns_it_takes_few_tokens_and_wide_heads(monkeypatch):
    """On sm_90, as timed there; a training step, whose backward was not timed, goes as elsewhere."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    for training, expected in ((False, [True, False, False, True, True]), (True, [False, False, True, False, True])):
        shapes = ((450, 64), (451, 64), (1029, 64), (201, 128), (1029, 128))
        assert [tuning.prefers_sdpa(*shape, gpu, training) for shape in shapes] == expected
    monkeypatch.setattr(tuning, "capability", lambda device: 80)
    assert not tuning.prefers_sdpa(450, 64, gpu, False) and tuning.prefers_sdpa(601, 64, gpu, False)


def test_what_was_measured_comes_first(device, monkeypatch):
    before = tuning.attention_launch("forward", 90, 128, 2), tuning.attention_launch("forward", 90, 64, 4)
    monkeypatch.setattr(tuning, "MEASURED", {90: ENTRY})
    launch = tuning.attention_launch("forward", 90, 64, 2)
    assert [launch[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")] == [16, 32, 1, 5]
    assert (tuning.attention_launch("forward", 90, 128, 2), tuning.attention_launch("forward", 90, 64, 4)) == before
    assert tuning.tiles("forward", 80, 64, 2) == tuning.TABLES["forward"]["mma"][64]
    assert tuning.fused_up_to(device) == 123
    assert [tuning.layer_norm_launch(90, C)["num_warps"] for C in (384, 1280)] == [7, 8]
    assert tuning.swiglu_launch(90, 5120)["BLOCK_F"] == 512 and tuning.swiglu_launch(80, 5120)["BLOCK_F"] == 1024


def test_only_what_was_measured_here_is_taken_unchecked(device, monkeypatch):
    """On this architecture, with this triton, in half precision, and at this width."""
    monkeypatch.setattr(tuning, "MEASURED", {90: ENTRY})
    half = torch.bfloat16
    assert tuning.is_measured("rope_attention", device, half, 64)
    assert tuning.is_measured("add_layer_norm_backward", device, half, 384)
    assert tuning.is_measured("swiglu", device, half, 5120)
    assert not tuning.is_measured("rope_attention", device, half, 80)
    assert not tuning.is_measured("add_layer_norm", device, half, 768)
    for operation in ("rope_attention", "add_layer_norm", "swiglu"):
        assert not tuning.is_measured(operation, device, torch.float32, 64)
        assert not tuning.is_measured(operation, torch.device("cpu"), half, 64)
    monkeypatch.setattr(tuning, "MEASURED", {90: ENTRY._replace(triton="0.1")})
    assert not tuning.is_measured("swiglu", device, half, 5120)
    monkeypatch.setattr(tuning, "MEASURED", {80: ENTRY})
    assert not tuning.is_measured("swiglu", device, half, 5120)
