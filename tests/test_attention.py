from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from dinov3_lite.kernels import availability, rope_attention_reference
from helpers import TINY, relative_error, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_lite import DINOv3ViT, load
from dinov3_lite import attention as attention_module
from dinov3_lite.attention import ATTENTION, eager_attention, resolve_attention, sdpa_attention, triton_attention


def inputs(N: int, D: int, dtype: torch.dtype, heads: int = 3):
    """q, k, v as views of one fused projection, and tables whose first rows are the identity."""
    qkv = torch.randn(2, N, 3 * heads * D).to(dtype)
    angles = torch.rand(N, D // 2) * 6
    angles[:5] = 0
    return *qkv.unflatten(-1, (3, heads, D)).unbind(-3), angles.cos(), angles.sin()


@pytest.mark.parametrize("D", [16, 64, 128])
@pytest.mark.parametrize("N", [1, 6, 41])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_all_functions_agree_with_the_definition(N, D, scale):
    q, k, v, cos, sin = inputs(N, D, torch.float32)
    prefix = min(5, N - 1)
    truth = rope_attention_reference(q.double(), k.double(), v.double(), cos[prefix:], sin[prefix:], scale)
    for attention in (eager_attention, sdpa_attention):
        assert relative_error(attention(q, k, v, cos, sin, scale), truth) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype):
    q, k, v, cos, sin = inputs(41, 64, dtype)
    truth = rope_attention_reference(q.double(), k.double(), v.double(), cos, sin)
    for attention in (eager_attention, sdpa_attention):
        out = attention(q, k, v, cos, sin)
        assert out.dtype == dtype
        assert relative_error(out, truth) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "N", "amx", "scale", "padded"),
    [
        (torch.bfloat16, 41, True, None, True),
        (torch.bfloat16, 201, True, 0.2, True),
        (torch.bfloat16, 48, True, None, False),
        (torch.bfloat16, 521, True, None, False),
        (torch.bfloat16, 41, False, None, False),
        (torch.float32, 41, True, None, False),
    ],
)
def test_keys_in_sixteens_change_no_value(monkeypatch, dtype, N, amx, scale, padded):
    """Where it is the way taken, the error and the gradients' are those of the plain call: no row of padding counts."""
    wide = [x.requires_grad_() for x in inputs(N, 64, torch.float64)[:3]]
    _, _, _, cos, sin = inputs(N, 64, torch.float32)
    truth = eager_attention(*wide, cos.double(), sin.double(), scale)
    weights = torch.randn_like(truth)
    true_gradients = torch.autograd.grad((truth * weights).sum(), wide)
    errors = []
    for has_amx in (False, amx):
        monkeypatch.setattr(attention_module, "has", lambda name, has_amx=has_amx: has_amx and name == "amx_tile")
        here = [x.detach().to(dtype).requires_grad_() for x in wide]
        with Recorded() as seen:
            out = sdpa_attention(*here, cos, sin, scale)
        gradients = torch.autograd.grad((out * weights.to(dtype)).sum(), here)
        assert out.shape == truth.shape and out.dtype == dtype
        errors.append([relative_error(a, b) for a, b in zip([out, *gradients], [truth, *true_gradients], strict=True)])
    keys = max(x.shape[-2] for x in seen.tensors)
    assert keys == (-(-N // 16) * 16 if padded else N)
    assert all(error <= 1.05 * plain for plain, error in zip(*errors, strict=True))


@pytest.mark.parametrize(
    ("dtype", "instructions", "wanted", "taken"),
    [
        (torch.bfloat16, ["avx512_bf16"], "", True),
        (torch.bfloat16, ["avx512_bf16", "amx_tile"], "", False),
        (torch.bfloat16, [], "", False),
        (torch.bfloat16, ["avx512_bf16"], "q", False),
        (torch.bfloat16, ["avx512_bf16"], "v", False),
        (torch.float32, ["avx512_bf16"], "", False),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_products_attend_where_they_are_faster(monkeypatch, dtype, instructions, wanted, taken, scale):
    """bfloat16 without AMX, whose gradient nobody wants; what is asked for by name is given."""
    monkeypatch.setattr(attention_module, "has", lambda name: name in instructions)
    q, k, v, cos, sin = inputs(41, 64, dtype)
    truth = eager_attention(q.double(), k.double(), v.double(), cos.double(), sin.double(), scale)
    given = {name: x.detach().requires_grad_(name == wanted) for name, x in zip("qkv", (q, k, v), strict=True)}
    errors = {}
    for name in ("auto", "sdpa"):
        with Recorded() as seen:
            out = ATTENTION[name](*given.values(), cos, sin, scale)
        assert out.requires_grad == bool(wanted) and bool(seen.tensors) == (name == "sdpa" or not taken)
        errors[name] = relative_error(out, truth)
        with torch.no_grad(), Recorded() as seen:
            ATTENTION[name](*given.values(), cos, sin, scale)
        assert bool(seen.tensors) == (name == "sdpa" or not (taken or wanted))
    assert errors["auto"] <= 2.0 * errors["sdpa"]  # scores are rounded once, as queries and keys are


class Recorded(TorchDispatchMode):
    """Sees the tensors that PyTorch's fused kernel is given."""

    tensors: tuple[torch.Tensor, ...] = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "flash_attention" in str(func):
            self.tensors = tuple(x for x in args if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_an_explicit_choice_is_taken_at_its_word():
    for name, function in ATTENTION.items():
        assert resolve_attention(name) is function


class OnGPU:
    """What the choice reads of a tensor on a GPU, for a machine that has none."""

    device = torch.device("cuda", 0)
    is_cuda = True

    def __init__(self, dtype: torch.dtype, D: int) -> None:
        self.dtype, self.shape = dtype, (2, 41, 3, D)


@pytest.mark.parametrize(
    "dtype, D, capability, installed, chosen",
    [
        (torch.bfloat16, 64, 9, True, "triton"),
        (torch.float16, 80, 8, True, "triton"),
        (torch.float32, 64, 9, True, "sdpa"),
        (torch.bfloat16, 72, 9, True, "sdpa"),
        (torch.bfloat16, 272, 9, True, "sdpa"),
        (torch.float16, 64, 7, True, "sdpa"),
        (torch.bfloat16, 64, 9, False, "sdpa"),
    ],
)
def test_auto_takes_the_kernels_where_they_are_made_for_it(monkeypatch, dtype, D, capability, installed, chosen):
    properties = SimpleNamespace(major=capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(availability, "TRITON_INSTALLED", installed)
    for name in ("triton", "sdpa"):
        monkeypatch.setattr(attention_module, f"{name}_attention", lambda *args, name=name: name)
    assert attention_module.auto_attention(OnGPU(dtype, D), None, None, None, None) == chosen


def test_auto_is_sdpa_on_the_cpu():
    for dtype in (torch.float32, torch.float16):
        arguments = inputs(6, 64, dtype)
        for scale in (None, 0.3):
            assert torch.equal(resolve_attention("auto")(*arguments, scale), sdpa_attention(*arguments, scale))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_scale_reaches_the_kernels(scale):
    """With a table for all, and with one of each sequence's own, which is a pack."""
    q, k, v, cos, sin = inputs(9, 16, torch.float32)
    own = torch.stack((cos, cos.flip(0))), torch.stack((sin, sin.flip(0)))
    for tables in ((cos, sin), own):
        expected = eager_attention(q, k, v, *tables, scale)
        assert relative_error(triton_attention(q, k, v, *tables, scale), expected) < 2e-6


def test_the_name_is_taken_at_every_door(tmp_path):
    folder = write_checkpoint(tmp_path, TINY)
    for door in (DINOv3ViT.from_pretrained, load):
        assert door(folder).attention == "auto" and door(folder, attention="eager").attention == "eager"


def test_unknown_name_at_any_door(tmp_path):
    message = "attention is 'flash': expected one of auto, sdpa, eager, triton"
    with pytest.raises(ValueError, match=message):
        DINOv3ViT(TINY, attention="flash")
    with pytest.raises(ValueError, match=message):
        DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY), attention="flash")
    model = DINOv3ViT(TINY)
    model.attention = "flash"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    "attention, on_gpu, dtype, fused",
    [
        ("triton", False, torch.float32, True),
        ("triton", True, torch.float64, False),
        ("auto", True, torch.bfloat16, True),
        ("auto", True, torch.float32, True),
        ("auto", False, torch.bfloat16, False),
        ("sdpa", True, torch.bfloat16, False),
        ("eager", True, torch.bfloat16, False),
    ],
)
def test_where_a_blocks_rows_are_our_kernels_too(monkeypatch, attention, on_gpu, dtype, fused):
    """Beside auto on a GPU alone: on a CPU they would be right, under the interpreter, and a thousand times as slow."""
    monkeypatch.setattr(attention_module, "_on_gpu", lambda x: on_gpu)
    x = torch.empty(1, 6, 32, dtype=dtype)
    for function in (ATTENTION[attention], SimpleNamespace(within=ATTENTION[attention])):  # of a pack
        assert attention_module.fuses_rows(function, x) == fused
