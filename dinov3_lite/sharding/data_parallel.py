"""FSDP2 over a model: a group of tensors for each block and one for the rest, and methods that fetch them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map

METHODS = (
    *("forward_features", "forward_intermediates", "forward_packed", "get_intermediate_layers", "attention_maps"),
    *("embed", "embed_patches", "run_blocks", "run_packed", "run_prefix"),
)
"""The methods of a DINOv3ViT that compute, beside `forward`."""


def shard_data_parallel(
    model: Any, mesh: DeviceMesh, *, mp_policy: MixedPrecisionPolicy | None = None, **options: Any
) -> None:
    """Apply `fully_shard` to each block and to the model.

    options: of `fully_shard`. `reshard_after_forward` is for the blocks; what is not theirs is small, and stays until
        the backward pass.
    """
    at_root = mp_policy = replace(mp_policy or MixedPrecisionPolicy(), cast_forward_inputs=False)
    inside = replace(mp_policy, output_dtype=None)
    options = {"mesh": mesh, "shard_placement_fn": functools.partial(_placement, mesh.size()), **options}
    for block in model.blocks:
        fully_shard(block, mp_policy=inside, **options)
        register_fsdp_forward_method(block, "cls_attention")
    if model.cls_token.dtype != model.dtype:  # float32 under float16: a group is of one dtype
        for rest in (model.patch_embed, model.norm):
            fully_shard(rest, mp_policy=inside, **options | {"reshard_after_forward": False})
    fully_shard(model, mp_policy=at_root, **options | {"reshard_after_forward": False})
    _register(model)


def _placement(processes: int, parameter: nn.Parameter) -> Shard | None:
    """Along which dim FSDP cuts a parameter; None is the first.

    Projections that tensor parallelism has stacked (parts, F, C) and cut along F are cut along C, if it divides: of two
    or three parts, most processes would have none.
    """
    stacked = isinstance(parameter, DTensor) and parameter.ndim == 3
    return Shard(2) if stacked and parameter.shape[2] % processes == 0 else None


def _register(model: Any) -> None:
    """Have all methods that compute fetch the weights, once: those that run within another find them fetched."""
    running = False

    def outermost(hooked: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def method(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if running:
                return plain(*args, **kwargs)
            running = True
            try:
                return hooked(*args, **kwargs)
            finally:
                running = False

        return method

    for name in METHODS:
        plain = getattr(model, name)
        setattr(model, name, _without_views(plain))
        register_fsdp_forward_method(model, name)
        setattr(model, name, outermost(getattr(model, name), plain))
    model.forward = outermost(_without_views(model.forward), model.forward)  # whose hooks FSDP has put on


def _without_views(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with copies in place of views of other tensors: writing to one would undo FSDP's hook on it."""

    def copied(output: Any) -> Any:
        is_view = isinstance(output, Tensor) and output.requires_grad and output._is_view()
        return output.clone() if is_view else output

    @functools.wraps(method)
    def without_views(*args: Any, **kwargs: Any) -> Any:
        return tree_map(copied, method(*args, **kwargs))

    return without_views
