"""Weights into a sharded model: every process reads its own numbers from the files, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.containers import cast
from ..checkpoint.hub import locate
from ..checkpoint.spans import Span
from ..checkpoint.words import few
from .mesh import check_mesh, device_of, mesh_of
from .parameters import Region, held_by, local_part, resharded
from .wrapping import shard


def load_weights(
    model: Any,
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    prefix: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> None:
    """Fill a DINOv3ViT that you have sharded, or not, from any checkpoint that `from_pretrained` reads.

    with torch.device("meta"):
        model = DINOv3ViT(DINOv3Config.from_name("vit7b16"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    load_weights(model, "checkpoint/")

    model: its parameters may be plain tensors and DTensors, on the meta device or not, and keep their dtypes: numbers
        are cast. Each process reads those that lie in it, also from files in shards, and nothing is sent.
    device: for parameters that are on the meta device; None is the mesh's device, or the CPU. With FSDP's
        CPUOffloadPolicy say "cpu".

    The other arguments are those of `from_pretrained`. Raises FileNotFoundError and ValueError as that does, and
    ValueError if the model is not one of the checkpoint's config.
    """
    on_hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    opened = open_checkpoint(locate(source, subfolder=subfolder, **on_hub), prefix=prefix)  # type: ignore[arg-type]
    fill(model, opened, device)
    model.weights_id, model.card = opened.weights_id, opened.card


@torch.inference_mode(False)  # FSDP needs parameters whose versions are counted, wherever it is called
def assign_sharded(
    model: nn.Module,
    opened: Checkpoint,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Shard a model on the meta device over the mesh and fill it, in `dtype` or the checkpoint's own."""
    check_mesh(mesh, device)
    fill(shard(model.to(dtype or opened.dtype), mesh), opened)


@torch.no_grad()
def fill(model: Any, opened: Checkpoint, device: torch.device | str | None = None) -> None:
    """Fill a model from an opened checkpoint: see `load_weights`."""
    state = opened.state()
    _check_same_model(model, opened, {name: shape for name, (shape, _) in state.items()})
    resharded(model)
    if any(held.tensor.is_meta for held in held_by(model)):
        mesh = mesh_of(model)
        place = device if device is not None else device_of(mesh) if mesh is not None else "cpu"
        model._apply(lambda tensor: torch.empty_like(tensor, device=place) if tensor.is_meta else tensor)
    for name, tensor, _ in held_by(model):
        part = local_part(tensor)
        numbers = read(state[name][1], Region.held(name, tensor).runs(), name, part.dtype)
        part.copy_(numbers.view(part.shape))


def _check_same_model(model: Any, opened: Checkpoint, found: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError that names the tensors which the model and the checkpoint do not share."""
    wanted = {name: shape for name, _, shape in held_by(model)}
    for names, words in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "holds")):
        if names:
            other = "which the model has" if words == "lacks" else "which the model does not have"
            raise ValueError(
                f"{opened.path}: {words} {few(sorted(names))}, {other}: expected a model of {opened.config.name}, "
                "without adapters"
            )
    if others := [name for name in wanted if wanted[name] != found[name]]:
        name = others[0]
        raise ValueError(
            f"{opened.path}: {name!r} has shape {found[name]} and the model's {wanted[name]}: expected a model of "
            f"{opened.config.name}"
        )


def read(spans: Iterable[Span], runs: Iterable[tuple[int, int]], name: str, dtype: torch.dtype) -> Tensor:
    """The numbers of these runs of spans laid one after the other, flat.

    Raises ValueError if float16 can't hold one of them.
    """
    pending, begin = list(runs), 0
    parts: list[Tensor] = []
    for span in spans:
        mine: list[tuple[int, int]] = []
        rest: list[tuple[int, int]] = []
        for start, stop in pending:
            low, high = max(start, begin), min(stop, begin + span.size)
            if low < high:
                mine.append((low - begin, high - begin))
            if stop > begin + span.size:
                rest.append((start, stop))
        if mine:
            parts.append(cast(span.load(mine), name, dtype))
        pending, begin = rest, begin + span.size
    return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, dtype=dtype), *parts])
