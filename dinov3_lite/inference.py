"""A model prepared for repeated inference, by either of two backends.

On a CPU blocks run in fewer passes, in the ways that are fastest there (see `stand_ins` and `choices`), and nothing is
compiled. Elsewhere constant factors are folded into the weights, and inductor compiles the blocks (see `graphs`).

A prepared model keeps its modules as they were. Each block has a stand-in beside it, which runs in its place for
as long as the block is ours, plain and unobserved (`layers.untouched`), and is made anew when its weights change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .choices import Choices
from .convnext import DINOv3ConvNeXt
from .image import ImageProcessor
from .model import DINOv3ViT
from .prepared import Prepared, PreparedBackbone, PreparedConvNeXt, PreparedViT, become
from .pretrained import sharded_parameters

BACKBONES = (DINOv3ViT, DINOv3ConvNeXt)
BACKENDS = ("auto", "prepacked", "inductor")


def optimize_for_inference(
    model: nn.Module,
    processor: ImageProcessor | None = None,
    *,
    backend: str = "auto",
    dynamic: bool = True,
    choices: Mapping[str, str] | None = None,
) -> Any:
    """Return a copy of `model` that gives the same outputs faster: of the same class, with every method and attribute.

    model: a DINOv3ViT or DINOv3ConvNeXt, or a module around one or more of them (a backbone, an encoder, a head on
        top), in evaluation mode. It stays as it is. The copy shares its weights, runs without gradients, stays in
        evaluation mode whatever its parent does, and follows when the weights change (but not through `.data`, which
        PyTorch does not report).
    processor: the images are then uint8 pixels (B, 3, H, W) of any size that the model takes, and the processor's
        rescaling and normalisation are part of the patch embedding, in float32 whatever the model's dtype. Its
        resizing is not done.
    backend: "prepacked" compiles nothing: at its first run the model measures which way of computing each product and
        attention is fastest on this machine, and packs the blocks' weights so. "inductor" is torch.compile, at the
        first call of a kind or in `warm_up`; torch keeps what it compiled on disk for later processes. "auto" is
        prepacked on a CPU where oneDNN takes the model's dtype, otherwise inductor.
    dynamic: True prepares for all sizes and batches at once: one layout a product; or two graphs of inductor's, for one
        image and for several. False is faster where shapes seldom change: ways are chosen, and weights packed, for the
        number of tokens in a batch, anew whenever that changes (a second or so for a ViT-B); or a graph is compiled for
        each new shape, the first `graphs.MAX_GRAPHS` of them.
    choices: ways that need not be measured, as in a prepared model's `choices`; it measures what is not among them. The
        same choices give the same bits, whatever ran before. `explain()` tells what was chosen, and by how much.

    The first run packs the weights one by one and lets go of the plain ones, unless somebody else holds them, such as
    `model`. Who asks the copy for a weight gets it plain. What somebody replaced, wrapped or put a hook on, before or
    after, runs as it would in the model itself. Answers are kept in a file in the user's cache folder. oneDNN keeps
    plans of products in memory: where many sizes are seen, up to half a GiB a thread in half precision; the environment
    variables LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY (1024 each) lower that.

    Raises ValueError for a model in training mode, for one that is sharded over a mesh, for one without a backbone, for
    an unknown backend, for a processor whose statistics are not as many as the model's channels, and for "prepacked"
    where oneDNN does not take the model; at the first run, for a choice that there is not.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    inside = [module for module in model.modules() if isinstance(module, BACKBONES)]
    if not inside:
        raise ValueError(
            f"model is a {type(model).__name__} without a DINOv3ViT inside: there is nothing to prepare, and no "
            "DINOv3ConvNeXt either"
        )
    if parts := sharded_parameters(model):
        raise ValueError(
            f"the model is sharded, {parts[0]!r} lies in parts on several devices: expected a whole one; compile the "
            "sharded one's blocks by torch.compile"
        )
    if model.training or any(backbone.training for backbone in inside):
        raise ValueError("the model is in training mode, where features are random: call model.eval() first")
    for backbone in inside:
        if processor is not None and not len(processor.mean) == len(processor.std) == backbone.num_channels:
            raise ValueError(
                f"the processor has {len(processor.mean)} means and {len(processor.std)} stds and the model takes "
                f"{backbone.num_channels} channels: expected one of each for every channel"
            )
    kept = Choices(choices)
    prepared = copy.deepcopy(model, _frozen_aliases(model))
    for module in prepared.modules():
        if isinstance(module, BACKBONES):
            become(module, PreparedViT if isinstance(module, DINOv3ViT) else PreparedConvNeXt)
            assert isinstance(module, PreparedBackbone)
            module._prepare(processor, backend, dynamic, kept)
    if not isinstance(prepared, BACKBONES):
        become(prepared, Prepared)
    return prepared


def _frozen_aliases(model: nn.Module) -> dict[int, Any]:
    """A memo for copying: parameters that share storage with the model's and need no gradient; the model's buffers; and
    what autograd computed and a module keeps, as pruning does, which PyTorch does not copy.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    kept = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    memo |= {id(value): value.detach() for value in kept if not value.is_leaf}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return memo
