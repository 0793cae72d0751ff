"""A model sharded over a mesh, in place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from ..config import DINOv3Config
from .data_parallel import shard_data_parallel
from .mesh import check_mesh, check_sizes
from .tensor_parallel import shard_tensor_parallel

Model = TypeVar("Model", bound=nn.Module)


def shard(
    model: Model,
    mesh: DeviceMesh,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    reshard_after_forward: bool | int | None = None,
) -> Model:
    """Shard a DINOv3ViT over a mesh, in place, and return it: to train, or to load its weights in your own way.

    model: with weights, the same in every process, or without (on the meta device: fill it by `load_weights`). Put in
        adapters, and freeze what does not train, before.
    mesh: with dims "fsdp" or "tp", or ("fsdp", "tp").
    mp_policy, offload_policy, reshard_after_forward: as of torch's `fully_shard`, for "fsdp". Under a mixed precision
        policy the residual stream and the RoPE tables stay float32, as they do under half-precision weights: inputs of
        blocks are not cast (`cast_forward_inputs` is taken as False) and `output_dtype` is that of the model's outputs.

    Make optimizers after this. Raises ValueError for a mesh that the model can't be sharded over, and for policies
    without "fsdp" in the mesh.
    """
    names = check_mesh(mesh)
    if not isinstance(getattr(model, "config", None), DINOv3Config):
        raise ValueError(
            f"model is a {type(model).__name__}: expected a DINOv3ViT; what stands around it you shard by torch's "
            "fully_shard, after this"
        )
    policies = dict(mp_policy=mp_policy, offload_policy=offload_policy, reshard_after_forward=reshard_after_forward)
    given: dict[str, Any] = {name: policy for name, policy in policies.items() if policy is not None}
    if given and "fsdp" not in names:
        raise ValueError(f"{', '.join(given)} is for FSDP, and the mesh has dims {names}: expected one named 'fsdp'")
    if "tp" in names:
        check_sizes(mesh["tp"], model)
        shard_tensor_parallel(model, mesh["tp"])
    if "fsdp" in names:
        shard_data_parallel(model, mesh["fsdp"], **given)
    return model
