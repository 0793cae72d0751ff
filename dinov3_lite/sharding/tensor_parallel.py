"""Tensor parallelism: each process has its own heads and its own hidden units (arXiv 1909.08053, section 3).

    attention   qkv by output rows, head by head; proj by input columns
    MLP         fc1 or w12 by output rows;        fc2 or w3 by input columns

All else is whole in every process. A fused projection is cut matrix by matrix: its parameter is a DTensor (parts, F, C)
in place of (parts * F, C), the same numbers in the same order, sharded along F. What a process holds of it, one below
the other, is again a fused projection, of fewer heads. Gradients with respect to the input are sums over processes.

In half precision each process rounds its addend of a sum, which is as much as the one rounding of the whole product.
Nothing else may be rounded that the whole model does not round: sums, what is added to them, and the gradients that
they pass on are in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..layers import GatedMlp, LayerNorm, Mlp, QKVProjection, SelfAttention, add_ours
from .mesh import device_of


def shard_tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Cut the projections of a model's blocks over a mesh of one dim."""
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        gated = isinstance(mlp, GatedMlp)
        first, last = ("w12", "w3") if gated else ("fc1", "fc2")
        _check(f"blocks.{i}.attn", attn, (SelfAttention,), {"qkv": QKVProjection, "proj": nn.Linear})
        _check(f"blocks.{i}.mlp", mlp, (GatedMlp, Mlp), {first: nn.Linear, last: nn.Linear})
        attn.qkv = ColumnParallelQKV(attn.qkv, 3, mesh)
        attn.__class__ = TensorParallelAttention
        attn.mesh = mesh
        mlp.add_module(first, ColumnParallel(getattr(mlp, first), 2 if gated else 1, mesh))
        for parent, name in ((attn, "proj"), (mlp, last)):
            parent.add_module(name, RowParallel(getattr(parent, name), mesh))
        for norm in (block.norm1, block.norm2):
            if type(norm) is LayerNorm:
                norm.__class__ = WideLayerNorm
    model.rope_embed.register_forward_pre_hook(functools.partial(_draw_alike, mesh))


def _check(name: str, module: Any, types: tuple[type, ...], children: dict[str, type]) -> None:
    """Raise ValueError unless the projections are the plain ones that this knows how to cut."""
    parts = [(name, module, types), *((f"{name}.{n}", getattr(module, n, None), (t,)) for n, t in children.items())]
    for path, part, expected in parts:
        if type(part) not in expected:
            raise ValueError(
                f"{path} is a {type(part).__module__}.{type(part).__name__}, which tensor parallelism can't cut: "
                f"expected {' or '.join(t.__name__ for t in expected)}; merge adapters first, or shard over 'fsdp' "
                "alone"
            )


class ColumnParallel(nn.Module):
    """Some rows of each of the matrices of a projection, this process's: (..., C) -> (..., parts * F / processes)."""

    def __init__(self, linear: nn.Linear, parts: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh, self.parts = mesh, parts
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = _cut(linear.weight, parts, mesh)
        self.bias = None if linear.bias is None else _cut(linear.bias, parts, mesh)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to_local().flatten(0, 1)  # type: ignore[attr-defined]
        bias = None if self.bias is None else self._acting(self.bias.to_local()).flatten()  # type: ignore[attr-defined]
        return F.linear(SumOfGradients.apply(x, self.mesh).to(weight.dtype), weight, bias)

    def _acting(self, bias: Tensor) -> Tensor:
        return bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, parts={self.parts}"


class ColumnParallelQKV(ColumnParallel):
    """Queries, keys and values of this process's heads. What the config lacks of `bias`, (3, C), does not act."""

    def __init__(self, qkv: QKVProjection, parts: int, mesh: DeviceMesh) -> None:
        super().__init__(qkv, parts, mesh)
        self.has_bias = qkv.has_bias

    def _acting(self, bias: Tensor) -> Tensor:
        thirds = zip(bias, self.has_bias.values(), strict=True)
        return torch.stack([third if present else torch.zeros_like(third) for third, present in thirds])


class RowParallel(nn.Module):
    """Some columns of a projection, this process's: (..., F / processes) -> (..., C), the sum over processes.

    It is float32 or wider, as the residual stream is that it goes to, and so the bias is added to it.
    """

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = _distributed(linear.weight, mesh, Shard(1))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        total = _summed(F.linear(x, self.weight.to_local()), self.mesh)  # type: ignore[attr-defined]
        return total if self.bias is None else total + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class WideLayerNorm(LayerNorm):
    """LayerNorm before a projection that is cut: where gradients are asked for, its output has x's dtype.

    The projection then passes on the sum of its gradients as it is, where half precision would round it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.unrounded(x) if torch.is_grad_enabled() else super().forward(x)


add_ours(WideLayerNorm)


class SumOfGradients(torch.autograd.Function):
    """The identity, of an input that all processes have, and the sum over them of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.mesh).to(grads[0].dtype), None


def _summed(partial: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over processes in float32 or wider: half precision would round each of the addends once more."""
    wide = partial.to(torch.promote_types(partial.dtype, torch.float32))
    total = DTensor.from_local(wide, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    return total.to_local()


class TensorParallelAttention(SelfAttention):
    """Attention of this process's heads."""

    mesh: DeviceMesh

    def cls_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As SelfAttention's, of the heads of all processes: (B, heads, N)."""
        own = super().cls_attention(x, cos, sin)
        return DTensor.from_local(own, self.mesh, [Shard(1)], run_check=False).full_tensor()


def _draw_alike(mesh: DeviceMesh, module: nn.Module, args: Any) -> None:
    """In training, go on from the first process's random numbers: all augment and drop alike, being one model."""
    if not module.training:
        return
    random = torch if mesh.device_type == "cpu" else torch.get_device_module(mesh.device_type)
    state = random.get_rng_state()
    shared = state.to(device_of(mesh))
    dist.broadcast(shared, dist.get_global_rank(mesh.get_group(), 0), mesh.get_group())
    random.set_rng_state(shared.to(state.device))


def _cut(parameter: Tensor, parts: int, mesh: DeviceMesh) -> nn.Parameter:
    """(parts * F, ...) as a DTensor (parts, F, ...), sharded along F."""
    stacked = nn.Parameter(parameter.detach().unflatten(0, (parts, -1)), requires_grad=parameter.requires_grad)
    return _distributed(stacked, mesh, Shard(1))


def _distributed(parameter: Tensor, mesh: DeviceMesh, placement: Shard) -> nn.Parameter:
    """A parameter that this process has whole, cut to its own part, in memory of its own."""
    local = parameter.detach().chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].clone()
    shape, stride = parameter.shape, parameter.detach().contiguous().stride()
    tensor = DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)
