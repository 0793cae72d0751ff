"""One door for both architectures: the tensors of a checkpoint say which it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from .attention import resolve_attention
from .checks import check_dtype
from .convnext import DINOv3ConvNeXt
from .model import DINOv3ViT
from .pretrained import Opening, WithoutWeights, open_source

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

Backbone = DINOv3ViT | DINOv3ConvNeXt
CLASSES: dict[type, type[DINOv3ViT] | type[DINOv3ConvNeXt]] = {
    model_class.config_class: model_class for model_class in (DINOv3ViT, DINOv3ConvNeXt)
}


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: str = "auto",
    mesh: DeviceMesh | None = None,
    **opening: Unpack[Opening],
) -> Backbone:
    """Load whichever DINOv3 backbone a checkpoint holds, as its class's `from_pretrained` does, in evaluation mode.

    attention, mesh: for a vision transformer, see `DINOv3ViT`. The other arguments are those of its `from_pretrained`:
        prefix, num_channels, channel_rule, subfolder, revision, cache_dir, local_files_only.

    Returns a DINOv3ViT or a DINOv3ConvNeXt. Raises FileNotFoundError and ValueError as `DINOv3ViT.from_pretrained`, and
    ValueError if `attention` or `mesh` is given for a ConvNeXt, which has none.
    """
    resolve_attention(attention)
    check_dtype(dtype)
    opened = open_source(source, **opening)
    model_class = CLASSES[type(opened.config)]
    if model_class is DINOv3ViT:
        return DINOv3ViT.from_checkpoint(opened, dtype=dtype, device=device, mesh=mesh, attention=attention)
    if attention != "auto":
        raise ValueError(f"attention is {attention!r} and {opened.path} holds a ConvNeXt, which has none: leave it out")
    if mesh is not None:
        raise ValueError(
            f"mesh is given and {opened.path} holds a ConvNeXt, of 0.2 billion parameters at most: leave it out"
        )
    return model_class.from_checkpoint(opened, dtype=dtype, device=device)


def skeleton(config: Any) -> Backbone:
    """A model of that config without weights, on the meta device: what it takes and gives can be asked of it."""
    with WithoutWeights():
        return CLASSES[type(config)](config)
