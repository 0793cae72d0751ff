"""A sharded model into one checkpoint: the first process asks for tensor after tensor, all gather it, it writes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..checkpoint.saving import save_tensors
from ..checkpoint.spans import StoredTensor
from .mesh import device_of, mesh_of
from .parameters import Held, held_by, resharded


@torch.no_grad()
def save_sharded(model: Any, path: Path, layout: str, dtype: torch.dtype | None) -> Path:
    """Write a sharded model's weights: see `save_pretrained`, which all processes of its mesh call together.

    Whatever fails where the file is written is raised in every process.
    """
    mesh = mesh_of(model)
    assert mesh is not None
    held = list(held_by(resharded(model)))
    if any(mesh.get_coordinate() or ()):
        return _serve(held, mesh)
    try:
        written = save_tensors(model, _Gathered(held, mesh).stored(), path, layout, dtype)
    except BaseException as error:
        _tell(mesh, error if isinstance(error, Exception) else RuntimeError(repr(error)))
        raise
    _tell(mesh, written)
    return written


def _serve(held: list[Held], mesh: DeviceMesh) -> Path:
    """What all but the first process do: help to gather what it asks for, until it is done."""
    while True:
        asked = _tell(mesh)
        if isinstance(asked, int):
            _whole(held[asked].tensor)
        elif isinstance(asked, Exception):
            raise asked
        else:
            return asked


class _Gathered:
    """A sharded model's tensors in the first process: whole when they are read, and the last one read stays so."""

    def __init__(self, held: list[Held], mesh: DeviceMesh) -> None:
        self.held, self.mesh = held, mesh
        self._last: tuple[int, Tensor] = (-1, torch.empty(0))

    def stored(self) -> dict[str, StoredTensor]:
        """By the names of the model's state dict."""
        return {
            name: StoredTensor(name, tensor.dtype, shape, functools.partial(self._read, i), Path())
            for i, (name, tensor, shape) in enumerate(self.held)
        }

    def _read(self, i: int, stored: StoredTensor) -> Tensor:
        if self._last[0] != i:
            _tell(self.mesh, i)
            _, tensor, shape = self.held[i]
            self._last = i, _whole(tensor).detach().cpu().reshape(shape)
        return self._last[1]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _tell(mesh: DeviceMesh, what: Any = None) -> Any:
    """Return in all processes what the mesh's first one tells: along its first dim, from there along the next."""
    coordinate: Any = mesh.get_coordinate()
    told = [what]
    for dim in range(mesh.ndim):
        if not any(coordinate[dim + 1 :]):
            group = mesh.get_group(dim)
            dist.broadcast_object_list(told, dist.get_global_rank(group, 0), group, device_of(mesh))
    return told[0]
