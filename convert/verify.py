"""`--verify`: open again what was written, compare every tensor with its source, and run both through a forward."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_lite.checkpoint import Checkpoint, open_checkpoint
from dinov3_lite.checkpoint.layouts.table import pattern
from dinov3_lite.checkpoint.layouts.transformers import opens
from dinov3_lite.checkpoint.spans import Span
from dinov3_lite.config import DINOv3Config, DINOv3ConvNeXtConfig
from dinov3_lite.loading import load

from .plan import Plan, make_plan
from .writer import write

# transformers' class for a config, and the stride of its tokens in pixels.
REFERENCES = {
    DINOv3Config: lambda config: ("DINOv3ViTModel", config.patch_size),
    DINOv3ConvNeXtConfig: lambda config: ("DINOv3ConvNextModel", 32),
}


@dataclass(frozen=True)
class Verified:
    """What a verification found."""

    tensors: int
    errors: list[float] | None
    """Relative error against transformers of each hidden state and of the output; None where it is not installed."""

    def __str__(self) -> str:
        tensors = f"verified: {self.tensors} tensors equal and finite"
        if self.errors is None:
            return f"{tensors}; no forward, since transformers is not installed"
        each = " ".join(f"{error:.1e}" for error in self.errors)
        return f"{tensors}; hidden states within {max(self.errors):.1e} of transformers' (each: {each})"


def verify(plan: Plan) -> Verified:
    """Compare what was written by the plan with its source, tensor by tensor, and run both.

    Raises ValueError that names the tensor if one differs or is not finite.
    """
    source, written = plan.source, open_checkpoint(plan.path, original=plan.layout.is_folder)
    compared = 0
    for name, spans in source.spans.items():
        if name not in written.spans or pattern(name) in plan.lost:
            continue
        asked = None if name == "rope_embed.periods" else plan.dtype
        expected, found = _joined(spans, asked), _joined(written.spans[name], asked)
        if not expected.isfinite().all():
            raise ValueError(f"{source.path}: tensor {name!r} holds NaN or infinity")
        if not _equal(expected, found):
            raise ValueError(f"{plan.path}: tensor {name!r} differs from its source: convert again")
        compared += 1
    for name in source.carried.keys() & written.carried.keys():
        a, b = (_joined([c.carried[name].span()], plan.dtype) for c in (source, written))
        if not _equal(a, b):
            raise ValueError(f"{plan.path}: tensor {name!r} differs from its source: convert again")
    return Verified(compared, _forward_errors(source, written))


def _joined(spans: list[Span], asked: torch.dtype | None) -> Tensor:
    """The elements, flat, as cast to the dtype that was asked for or as they are stored."""
    return torch.cat([span.load().to(asked) for span in spans]) if spans else torch.empty(0)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether these are the same numbers, in whatever dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(dtype), b.to(dtype))


def _forward_errors(source: Checkpoint, written: Checkpoint) -> list[float] | None:
    """Ours from the output against transformers' from the source, both in float32, state by state."""
    if importlib.util.find_spec("transformers") is None:
        return None
    with tempfile.TemporaryDirectory() as scratch, transformers_module() as transformers:
        folder = source.path
        if not opens(source.layout, folder):
            folder = write(make_plan(source, scratch, to="transformers", dtype=torch.float32))
        name, stride = REFERENCES[type(source.config)](source.config)
        theirs = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
        ours = load(written.path, dtype=torch.float32)
        sides = 4 * stride, 6 * stride
        images = torch.randn(1, source.config.num_channels, *sides, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            a = ours(images, output_hidden_states=True)
            b = theirs(images, output_hidden_states=True)
        # the last hidden state is compared through the output: up to transformers 4.57.1 it was normed already
        pairs = [
            *zip(a.hidden_states[:-1], b.hidden_states[:-1], strict=True),
            (a.last_hidden_state, b.last_hidden_state),
        ]
        return [((x - y).norm() / y.norm()).item() for x, y in pairs]


@contextmanager
def transformers_module() -> Iterator[Any]:
    """Import transformers while a checkout's root is off `sys.path`: transformers would take our folder `kernels` there
    for the package of that name.

    Where dinov3-lite is installed, `kernels` lies within it, and the root, where transformers lies too, stays.
    """
    root = Path(__file__).resolve().parent.parent
    path = sys.path[:]
    if (root / "kernels" / "first_use.py").is_file():
        sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != root]
    try:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        yield transformers
    finally:
        sys.path[:] = path
