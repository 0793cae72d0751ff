"""What a sharded model's parameters hold of its state dict, and which of their numbers each process has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .tensor_parallel import ColumnParallel


class Held(NamedTuple):
    """A parameter or buffer, and the shape that it has in the unsharded model: the same numbers in the same order."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]


def held_by(model: nn.Module) -> Iterator[Held]:
    """The parameters and buffers of a model, in the order of its modules."""
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in own:
            shape = tuple(tensor.shape)
            if isinstance(module, ColumnParallel):
                shape = (shape[0] * shape[1], *shape[2:])
            yield Held(start + name, tensor, shape)


def resharded(model: nn.Module) -> nn.Module:
    """The model, of which each process holds its own parts alone: what FSDP has fetched and kept is let go."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def local_part(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that this process holds: all, or a DTensor's part. Writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Region(NamedTuple):
    """A box of a tensor's numbers."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def held(cls, name: str, tensor: Tensor) -> Region:
        """What this process holds of a tensor. Raises ValueError for a placement whose parts are no boxes."""
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return cls(shape, (0,) * len(shape), shape)
        placements: Any = tensor.placements
        for i, placement in enumerate(placements):
            # FSDP over tensor parallelism along one axis: what it is strided by lies in the later dims of the mesh
            later = math.prod(
                tensor.device_mesh.size(j)
                for j in range(i + 1, len(placements))
                if placements[j].is_shard(placement.dim if hasattr(placement, "dim") else None)
            )
            if placement.is_partial() or getattr(placement, "split_factor", later) != later:
                raise ValueError(f"parameter {name!r} is placed {placements}: expected Shard or Replicate in each dim")
        chunk = tensor.__create_chunk_list__()[0]
        return cls(shape, tuple(chunk.offsets), tuple(chunk.sizes))

    def runs(self) -> Iterator[tuple[int, int]]:
        """Start and stop of each run of numbers that lie one after the other in the whole tensor, in order."""
        if not math.prod(self.sizes):
            return
        axis = len(self.shape)  # the first axis from which on the box is as wide as the tensor
        while axis and self.sizes[axis - 1] == self.shape[axis - 1]:
            axis -= 1
        axis = max(0, axis - 1)
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        length = math.prod(self.sizes[axis:])
        first = sum(offset * stride for offset, stride in zip(self.offsets, strides, strict=True))
        for index in itertools.product(*map(range, self.sizes[:axis])):
            start = first + sum(i * stride for i, stride in zip(index, strides[:axis], strict=True))
            yield start, start + length
