"""Fine-tuning: what trains, at which rate, and a summary of it. Plain functions over the model's parameters."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn

from .pretrained import Pretrained


def freeze_but_last(model: nn.Module, n: int) -> None:
    """Train the last n blocks and the final LayerNorm and freeze the rest of the model; n = 0 freezes all of it.

    model: a DINOv3ViT or DINOv3ConvNeXt, or a module with one inside, whose other parts stay as they are. A ConvNeXt's
        blocks are counted through its stages, 18 or 36 of them, and a step down goes with the block behind it.

    No activations of the frozen blocks are kept: autograd starts at the first block that trains. With all blocks
    training, embeddings and tokens (a ConvNeXt's stem) stay frozen; `model.requires_grad_(True)` trains everything.

    Raises ValueError for an n that is not a whole number from 0 to that of the blocks, and for a module without a
    backbone.
    """
    for backbone in backbones_inside(model):
        layers = backbone.layers
        try:
            count = operator.index(n)
        except TypeError:
            count = -1
        if isinstance(n, bool) or not 0 <= count <= len(layers):
            raise ValueError(f"n is {n!r}: expected a number of blocks from 0 to {len(layers)}")
        backbone.requires_grad_(False)
        trained = [part for layer in layers[len(layers) - count :] for part in layer]
        for part in (*trained, backbone.norm) if count else ():
            part.requires_grad_(True)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer, with layer-wise decay of the learning rate.

    model: a DINOv3ViT or DINOv3ConvNeXt, or any module with one inside: compiled, wrapped by peft or
        DistributedDataParallel, a detector.

    The learning rate is lr * layer_decay ** (n + 1 - l) for n blocks, with l = 0 for embeddings and tokens (a
    ConvNeXt's stem), l = i + 1 for block i, l = n + 1 for the final LayerNorm (arXiv 1801.06146, section 3.1;
    2106.08254 for ViTs). A ConvNeXt's blocks are counted as by `freeze_but_last`. Parameters outside of the backbone,
    such as a head's, have the rate lr in groups of their own. Norms, biases, tokens and LayerScale get no weight decay.
    Frozen parameters are left out. Each group also has a `name`.

    Raises ValueError for a layer_decay that is not above zero, and for a module without a backbone.
    """
    if not layer_decay > 0:
        raise ValueError(f"layer_decay is {layer_decay!r}: expected a number above zero, 1.0 for no decay")
    places: dict[nn.Parameter, tuple[str, int]] = {}  # the layer's name, and how many layers follow it
    for backbone in backbones_inside(model):
        layers = [
            *backbone.layers,
            (backbone.norm,),
            (backbone,),
        ]  # last, as layer 0: tokens, embedding
        for number, layer in zip((*range(1, len(layers)), 0), layers, strict=True):
            for parameter in (p for part in layer for p in part.parameters()):
                places.setdefault(parameter, (f"layer {number}", len(layers) - 1 - number))
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer_name, following = places.get(parameter, ("head", 0))
        decays = parameter.ndim > 1 and not name.endswith(("token", "tokens", "bias"))  # stacked, in tensor parallelism
        key = f"{layer_name}, {'decay' if decays else 'no decay'}"
        group = {"name": key, "lr": lr * layer_decay**following, "params": []}
        group["weight_decay"] = weight_decay if decays else 0.0
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def backbones_inside(module: nn.Module) -> list[Any]:
    """The backbones in a module, which may be one. Raises ValueError where there is none."""
    inside = [part for part in module.modules() if isinstance(part, Pretrained)]
    if not inside:
        raise ValueError(f"model is a {type(module).__name__} without a DINOv3ViT or DINOv3ConvNeXt inside")
    return inside


def trainable_summary(module: nn.Module) -> str:
    """A table of what trains: a line for each part with its parameters, the blocks one by one, and the total.

    For any module: wrappers (peft's among them) and decoders show with their own parts.
    """
    rows: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        row = rows.setdefault(_part(name), [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() * parameter.requires_grad
    total = [sum(row[column] for row in rows.values()) for column in (0, 1)]
    width = max(map(len, [*rows, "total"]))
    lines = [f"{'part':<{width}}  {'parameters':>13}  {'trainable':>13}"]
    lines += [f"{part:<{width}}  {count:>13,}  {trains:>13,}" for part, (count, trains) in rows.items()]
    share = 100 * total[1] / max(1, total[0])
    return "\n".join([*lines, f"{'total':<{width}}  {total[0]:>13,}  {total[1]:>13,}  ({share:.2f} %)"])


def _part(name: str) -> str:
    """`blocks.3` of `blocks.3.attn.qkv.weight`, whatever stands before it; else the module that holds the parameter."""
    words = name.split(".")
    if "blocks" in words[:-2]:
        return ".".join(words[: words.index("blocks") + 2])
    return ".".join(words[:-1]) or name
