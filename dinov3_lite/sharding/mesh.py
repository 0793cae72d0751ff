"""Which meshes a model can be sharded over, and the mesh that a sharded model lies on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

DIMS = (("fsdp",), ("tp",), ("fsdp", "tp"))


def check_mesh(mesh: Any, device: torch.device | str | None = None) -> tuple[str, ...]:
    """Return the names of its dims. Raises ValueError for a mesh that models are not sharded over.

    device: where the model is asked to be, if anywhere.
    """
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"mesh is a {type(mesh).__name__}: expected a DeviceMesh, which init_device_mesh makes")
    if not dist.is_initialized():
        raise ValueError(
            f"mesh is {tuple(mesh.shape)} and there is no process group (any more): expected one, as torchrun's "
            "processes make it by init_device_mesh or torch.distributed.init_process_group"
        )
    names = tuple(mesh.mesh_dim_names or ())
    if names not in DIMS:
        found = f"dims {names}" if names else "no names for its dims"
        raise ValueError(f"mesh has {found}: expected ('fsdp',), ('tp',) or ('fsdp', 'tp'), in this order")
    if "fsdp" in names and mesh.device_type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(
            f"mesh has dims {names} of CPUs, on which FSDP of PyTorch {torch.__version__} does not run: expected "
            "a newer PyTorch, a mesh of GPUs, or ('tp',)"
        )
    if device is not None and torch.device(device).type != mesh.device_type:
        raise ValueError(
            f"device is {str(device)!r} and the mesh is of {mesh.device_type!r}: leave device out, or make a mesh of it"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"this process has rank {dist.get_rank()} and the mesh holds ranks {mesh.mesh.flatten().tolist()}: only "
            "those may shard a model over it"
        )
    return names


def check_sizes(tp: DeviceMesh, model: Any) -> None:
    """Raise ValueError unless heads and hidden units divide by the number of processes along "tp"."""
    config = model.config
    for field in ("num_attention_heads", "intermediate_size"):
        if getattr(config, field) % tp.size():
            raise ValueError(
                f"'tp' of the mesh is {tp.size()} and the model has {field} {getattr(config, field)}: expected a "
                "number of processes that divides it"
            )


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The mesh that a model is sharded over, that of its tensor in the most dims; None for a model that is whole."""
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)


def device_of(mesh: DeviceMesh) -> torch.device:
    """The device of the mesh that is this process's."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
