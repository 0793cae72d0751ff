"""What RoPE attention refuses, in one sentence, and what it says where no kernel can run."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
import torch
from dinov3_lite.kernels import availability, rope_attention, rope_attention_packed, rotate, tuning
from helpers import run_python
from kernel_inputs import DEVICE, attention_inputs
from torch import Tensor

pytest.importorskip("triton")

OPS = import_module("dinov3_lite.kernels.rope_attention")  # the package's name is the function's


def changed(**changes):
    """Arguments of rope_attention, some of them changed by a function of the right one."""
    qkv, cos, sin = attention_inputs(2, 6, 2, 32, 4, torch.float32)
    right = dict(zip("qkv", qkv.unbind(2), strict=True)) | {"cos": cos, "sin": sin, "scale": None}
    return {name: changes[name](x) if name in changes else x for name, x in right.items()}


BAD_INPUTS = [
    ({"q": lambda q: q[0]}, "q has 3 dimensions: expected (B, N, heads, D)"),
    ({"k": lambda k: k[:, 1:]}, "k has shape (2, 5, 2, 32): expected q's, (2, 6, 2, 32)"),
    ({"v": lambda v: v[..., :16]}, "v has shape (2, 6, 2, 16): expected q's, (2, 6, 2, 32)"),
    ({"v": lambda v: v.half()}, "v is torch.float16: expected q's dtype, torch.float32"),
    ({"q": lambda q: q.long()}, "q is torch.int64: expected torch.float16, torch.bfloat16 or torch.float32"),
    ({"q": lambda q: q.double()}, "q is torch.float64: expected torch.float16, torch.bfloat16 or torch.float32"),
    ({"k": lambda k: k.mT.contiguous().mT}, "k has stride 2 in its last dimension: expected 1"),
    ({x: lambda x: x[..., :24] for x in "qkv"}, "q has head dim 24: expected a multiple of 16 from 16 to 256"),
    (
        {x: lambda x: x.repeat(1, 1, 1, 9) for x in "qkv"},
        "q has head dim 288: expected a multiple of 16 from 16 to 256",
    ),
    (
        {x: lambda x: x.repeat(2, 1) for x in ("cos", "sin")},
        "cos has shape (8, 16): expected (P, 16) with P at most 6 tokens",
    ),
    ({"cos": lambda cos: cos[:, :8]}, "cos has shape (4, 8): expected (P, 16) with P at most 6 tokens"),
    ({"sin": lambda sin: sin[1:]}, "sin has shape (3, 16): expected cos's, (4, 16)"),
    ({"sin": lambda sin: sin.double()}, "sin is torch.float64: expected torch.float32"),
    ({"cos": lambda cos: cos.mT.contiguous().mT}, "cos has strides (1, 4): expected a contiguous table"),
    ({x: lambda x: x[..., :0] for x in "qkv"}, "q has head dim 0: expected a multiple of 16 from 16 to 256"),
    ({"scale": lambda scale: -1.0}, "scale is -1.0: expected a positive number"),
    ({"scale": lambda scale: float("nan")}, "scale is nan: expected a positive number"),
    ({"scale": lambda scale: float("inf")}, "scale is inf: expected a positive number"),
]


@pytest.mark.parametrize("changes, message", BAD_INPUTS, ids=[message for _, message in BAD_INPUTS])
def test_bad_input_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rope_attention(**changed(**changes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens is torch.int64 of shape (2,): expected torch.int32 of shape (S + 1,)"),
        ({"q": torch.zeros(6, 32)}, "q has 2 dimensions: expected (T, heads, D)"),
        ({"cos": torch.ones(5, 16), "sin": torch.ones(5, 16)}, "cos has 5 rows: expected one for each of the 6 tokens"),
        ({"cu_seqlens": torch.tensor([0, 9, 6, 9], dtype=torch.int32)[::2]}, "cu_seqlens has stride 2: expected 1"),
        ({"cu_seqlens": torch.tensor(6, dtype=torch.int32)}, "cu_seqlens is torch.int32 of shape (): expected torch.int32 of shape (S + 1,)"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens is torch.int32 of shape (0,): expected torch.int32 of shape (S + 1,)"),
        ({"scale": 0.0}, "scale is 0.0: expected a positive number"),
        ({"max_seqlen": -1}, "max_seqlen is -1: expected the length of the longest sequence"),
    ],
)  # fmt: skip
def test_bad_pack_is_one_sentence(change, message):
    q = torch.zeros(6, 2, 32)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
    right = {"q": q, "k": q, "v": q, "cos": torch.ones(6, 16), "sin": torch.zeros(6, 16), "cu_seqlens": cu_seqlens}
    arguments = {**right, "max_seqlen": 6, **change}

    def moved(x: object) -> object:
        """On the device, with the strides that it has."""
        return (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
            if isinstance(x, Tensor)
            else x
        )

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rope_attention_packed(**{name: moved(x) for name, x in arguments.items()})


@pytest.mark.parametrize("name", ["k", "v", "cos", "sin", "cu_seqlens"])
def test_another_device_is_one_sentence(name):
    """Asked of the check itself: with a tensor of the meta device among its arguments, the op would never run."""
    x, table = torch.zeros(1, 6, 2, 32, device=DEVICE), torch.ones(6, 16, device=DEVICE)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE)
    arguments = {"q": x, "k": x, "v": x, "cos": table, "sin": table, "cu_seqlens": cu_seqlens}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name} is on meta: expected q's device, {DEVICE}"):
        OPS._check_attention(**arguments, max_seqlen=6, scale=0.1)


def test_training_through_pytorch_refuses_the_same(monkeypatch):
    """Where PyTorch's attention takes over, before any kernel of ours, a shape that it would broadcast is still wrong."""
    monkeypatch.setattr(tuning, "prefers_sdpa", lambda tokens, head_dim, device, training: True)
    arguments = changed(v=lambda v: v[:1])
    arguments["q"].requires_grad_()
    with pytest.raises(ValueError, match=re.escape("v has shape (1, 6, 2, 32): expected q's, (2, 6, 2, 32)")):
        rope_attention(**arguments)
    with pytest.raises(ValueError, match=r"scale is -1.0: expected a positive number"):
        rope_attention(**changed(q=lambda q: q.clone().requires_grad_(), scale=lambda scale: -1.0))


@pytest.mark.parametrize(
    "B, N, heads, D, strides, message",
    [
        (2**16, 2**14, 2, 16, (0, 0, 0, 1), "q has 65536 x 16384 x 2 heads of tokens: expected fewer than 2^31"),
        # the output is contiguous, whatever the input's strides
        (
            1,
            2**17,
            64,
            256,
            (0, 0, 0, 1),
            "q spans 2^31 elements or more in a sequence of 131072 tokens: expected fewer",
        ),
        (1, 4, 2**15, 16, (0, 0, 2**16, 1), "q spans 2^31 elements or more in a sequence of 4 tokens: expected fewer"),
    ],
)
def test_more_than_32_bits_count_is_refused(B, N, heads, D, strides, message, monkeypatch):
    monkeypatch.setattr(rotate, "require", lambda *_: None)  # such tensors exist without memory alone
    q = torch.empty(1, device="meta").as_strided((B, N, heads, D), strides)
    table = torch.empty(5, D // 2, device="meta") if N >= 5 else torch.empty(0, D // 2, device="meta")
    with pytest.raises(ValueError, match=re.escape(message)):
        rotate.check_rotation(q, q, table, table, N)


def test_an_image_of_2_to_the_31_elements_is_refused(monkeypatch):
    monkeypatch.setattr(rotate, "require", lambda *_: None)
    q = torch.empty_strided((1, 2**15 + 1, 1, 64), (2**32, 2**16, 64, 1), device="meta")
    table = torch.empty(5, 32, device="meta")
    with pytest.raises(
        ValueError, match=r"q spans 2\^31 elements or more in a sequence of 32769 tokens: expected fewer"
    ):
        rotate.check_rotation(q, q, table, table, q.shape[1])


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's own limit")
def test_the_interpreter_refuses_what_it_multiplies_wrongly():
    """In a process of its own: here it is mended, see tests/support/interpreter.py."""
    code = """
import os, torch
os.environ["TRITON_INTERPRET"] = "1"
from dinov3_lite.kernels import rope_attention
x, table = torch.zeros(1, 6, 1, 16, dtype=torch.bfloat16), torch.zeros(6, 8)
try:
    rope_attention(x, x, x, table, table)
except ValueError as error:
    print(error)
"""
    done = run_python(code)
    message = "q is torch.bfloat16: expected torch.float16 or torch.float32 under triton's interpreter"
    assert done.stdout.strip() == message, done.stderr


CALL = """
import os, sys, torch
os.environ.pop("TRITON_INTERPRET", None)
{before}
from dinov3_lite.kernels import is_available, rope_attention, unavailable_reason
assert "triton" not in sys.modules or sys.modules["triton"] is None
x, table = torch.zeros(1, 6, 1, 16), torch.zeros(6, 8)
print(is_available(), unavailable_reason())
try:
    rope_attention(x, x, x, table, table)
except RuntimeError as error:
    print(error)
print("triton" in sys.modules and sys.modules["triton"] is not None)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine that has no GPU")
@pytest.mark.parametrize(
    "before, reason",
    [
        ("", "there is no CUDA device, and TRITON_INTERPRET=1 is not set"),
        ("sys.modules['triton'] = None", "triton is not installed"),
    ],
)
def test_where_the_kernels_cannot_run_they_say_why(before, reason):
    done = run_python(CALL.format(before=before))
    assert done.stdout.splitlines() == [f"False {reason}", f"rope_attention can't run: {reason}", "False"], done.stderr


def test_tensors_of_the_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    qkv, cos, sin = (x.cpu() for x in attention_inputs(1, 6, 1, 16, 6, torch.float32))
    with pytest.raises(RuntimeError, match="q is on cpu: expected a CUDA device, or the CPU under TRITON_INTERPRET=1"):
        rope_attention(*qkv.unbind(2), cos, sin)
