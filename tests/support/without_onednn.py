"""A pytest plugin (`-p without_onednn`): torch as if it had no oneDNN, or had renamed the operators that we call."""

from __future__ import annotations

import torch


class _Nothing:
    """A namespace without any operator."""

    def __getattr__(self, name: str) -> None:
        raise AttributeError(f"torch.ops.mkldnn has no operator {name!r}")


def _registrations(key: str, all_of_them=torch._C._dispatch_get_registrations_for_dispatch_key) -> list[str]:
    """What torch has registered, of which inductor looks up every one: no operator of oneDNN's."""
    return [name for name in all_of_them(key) if not name.startswith("mkldnn::")]


torch._C._has_mkldnn = False  # as torch was built without it; inductor asks this
torch._C._dispatch_get_registrations_for_dispatch_key = _registrations
torch.ops.mkldnn = _Nothing()
