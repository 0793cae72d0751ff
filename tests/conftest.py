"""Which versions were tried: printed at the head of every run."""

from __future__ import annotations

import importlib.metadata
import os
import platform

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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
