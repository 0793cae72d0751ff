"""A pytest plugin (`-p without_onednn`): torch as if it had no oneDNN, or had renamed the operators that we call."""

from __future__ import annotations

import torch


class _Nothing:
    """A namespace without any operator."""

    def __getattr__(self, name: str) -> None:
        raise AttributeError(f"torch.ops.mkldnn has no operator {name!r}")


torch._C._has_mkldnn = False  # as torch was built without it; inductor asks this
torch.ops.mkldnn = _Nothing()
