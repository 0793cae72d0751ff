"""Which versions were tried: printed at the head of every run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# the kernels run in triton's interpreter where there is no GPU; triton reads this when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} not installed"

    packages = ("transformers", "safetensors", "huggingface-hub", "triton", "numpy", "pillow")
    return f"tried: python {platform.python_version()}, torch {torch.__version__}, " + ", ".join(map(version, packages))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory) -> Iterator[None]:
    """What is kept in the user's cache folder stays out of it."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model(tmp_path) -> Any:
    """A tiny ViT with trained-like weights, from its checkpoint in transformers' layout."""
    from helpers import TINY, write_checkpoint

    from dinov3_lite import DINOv3ViT

    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 40, 24)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New memory is NaN, so that an output which no kernel writes can't pass by luck.

    Deterministic algorithms fill it, those that have no such form would raise.
    """
    torch.use_deterministic_algorithms(True)
    assert torch.empty(0).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def own_attention(request, monkeypatch) -> None:
    """On a GPU, tests of the kernels are of our own attention, also where inference prefers cuDNN's."""
    if torch.cuda.is_available() and request.node.path.name.startswith("test_kernels"):
        from dinov3_lite.kernels import tuning

        monkeypatch.setattr(tuning, "CUDNN_LEADS", ())


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """No architecture was measured: the tables of `tuning` count."""
    from dinov3_lite.kernels import tuning

    monkeypatch.setattr(tuning, "MEASURED", {})


@pytest.fixture
def strategy(request, monkeypatch) -> str:
    """Attention with the rotation "fused" or "separate", whatever the number of tokens."""
    from dinov3_lite.kernels import tuning

    limit = {"fused": 10**9, "separate": 0}[request.param]
    monkeypatch.setattr(tuning, "fused_up_to", lambda device: limit)
    monkeypatch.setattr(tuning, "prefers_sdpa", lambda tokens, head_dim, device, training: False)
    return request.param
