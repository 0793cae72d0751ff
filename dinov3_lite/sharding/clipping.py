"""The norm of gradients that lie in parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_, of parameters that are whole, sharded, and sharded over different meshes.

    Returns the norm of all gradients together, a plain tensor, the same in every process. (PyTorch's own function takes
    parameters of one mesh only: under FSDP alone either may be used.)
    """
    kinds: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            kinds.setdefault(mesh, []).append(parameter)
    norms = []
    for same in kinds.values():
        norm = get_total_norm([parameter.grad for parameter in same if parameter.grad is not None], norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    for same in kinds.values():
        clip_grads_with_norm_(same, max_norm, total)
    return total
