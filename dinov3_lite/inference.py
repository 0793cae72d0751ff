"""A model prepared for repeated inference: constant factors folded into the weights, then either of two backends.

On a CPU the blocks' weights are put into the layout of the library that multiplies by them (see `prepacked`), and
nothing is compiled. Elsewhere inductor compiles the blocks (see `graphs`).

A prepared model keeps its modules as they were. Each block has a folded stand-in beside it, which runs in its place for
as long as the block is ours, plain and unobserved (`layers.untouched`), and is made anew when its weights change.
"""

from __future__ import annotations

import copy
import operator
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import BATCH, check_count, check_images
from .finetune import vits_inside
from .folding import PixelPatchEmbed, fold, prepack_projections
from .graphs import Graphs
from .image import ImageProcessor
from .layers import Block, PatchEmbed, untouched
from .model import DINOv3ViT, run_stack
from .packing import Tokens
from .prepacked import available

BACKENDS = ("auto", "prepacked", "inductor")


def optimize_for_inference(
    model: nn.Module, processor: ImageProcessor | None = None, *, backend: str = "auto", dynamic: bool = True
) -> Any:
    """Return a copy of `model` that gives the same outputs faster: still a DINOv3ViT, with every method and attribute.

    model: a DINOv3ViT, or a module around one or more of them (a backbone, an encoder, a head on top), in evaluation
        mode. It stays as it is. The copy shares its weights, runs without gradients, stays in evaluation mode whatever
        its parent does, and follows when the weights change (but not through `.data`, which PyTorch does not report).
    processor: the images are then uint8 pixels (B, 3, H, W) of any size that the model takes, and the processor's
        rescaling and normalisation are part of the patch embedding, in float32 whatever the model's dtype. Its
        resizing is not done.
    backend: "prepacked" holds the blocks' weights once more, in the layout of oneDNN or MKL, and compiles nothing.
        "inductor" is torch.compile, at the first call of a kind or in `warm_up`; torch keeps what it compiled on disk
        for later processes. "auto" is prepacked on a CPU where oneDNN takes the model's dtype, otherwise inductor.
    dynamic: True prepares for all sizes and batches at once: one layout, oneDNN's; or two graphs of inductor's, for one
        image and for several. False is faster where shapes seldom change: float32 weights are packed by MKL, anew
        whenever the number of tokens in a batch changes (0.1 s for a ViT-B; half precision stays oneDNN's); or a graph
        is compiled for each new shape, the first `graphs.MAX_GRAPHS` of them.

    What somebody replaced, wrapped or put a hook on, before or after, runs as it would in the model itself. oneDNN
    keeps plans of products in memory: where many sizes are seen, up to half a GiB a thread in half precision; the
    environment variables LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY (1024 each) lower that.

    Raises ValueError for a model in training mode, for one without a DINOv3ViT, for an unknown backend, for a processor
    whose statistics are not as many as the model's channels, and for "prepacked" where oneDNN does not take the model.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    inside = vits_inside(model)
    if model.training or any(vit.training for vit in inside):
        raise ValueError("the model is in training mode, where RoPE coordinates are random: call model.eval() first")
    for vit in inside:
        if processor is not None and not len(processor.mean) == len(processor.std) == vit.num_channels:
            raise ValueError(
                f"the processor has {len(processor.mean)} means and {len(processor.std)} stds and the model takes "
                f"{vit.num_channels} channels: expected one of each for every channel"
            )
    prepared = copy.deepcopy(model, _frozen_aliases(model))
    for module in prepared.modules():
        if isinstance(module, DINOv3ViT):
            _become(module, PreparedViT)
            assert isinstance(module, PreparedViT)
            module._prepare(processor, backend, dynamic)
    if not isinstance(prepared, DINOv3ViT):
        _become(prepared, Prepared)
    return prepared


def _frozen_aliases(model: nn.Module) -> dict[int, Any]:
    """A memo for copying: parameters that share storage with the model's and need no gradient; the model's buffers."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return memo


def _become(module: nn.Module, mixin: type[Prepared]) -> None:
    if not isinstance(module, mixin):
        module.__class__ = _prepared_class(mixin, type(module))


def _prepared_class(mixin: type[Prepared], base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the methods of `mixin` before its own."""
    if (mixin, base) not in _CLASSES:
        names = {"__module__": __name__, "__doc__": base.__doc__}
        _CLASSES[mixin, base] = type(f"Prepared{base.__name__}", (mixin, base), names)
    return _CLASSES[mixin, base]


_CLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def _blank(mixin: type[Prepared], base: type[nn.Module]) -> nn.Module:
    cls = _prepared_class(mixin, base)
    return cls.__new__(cls)


class Prepared(nn.Module):
    """What `optimize_for_inference` adds to the class of a model, or of the module around one."""

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Raise ValueError for True: a prepared model does not train."""
        if requires_grad:
            raise ValueError("a prepared model does not train: train the model it was made of, which it follows")
        return super().requires_grad_(False)

    def warm_up(self, batch: int, height: int, width: int) -> float:
        """Run on images of this size, alone and `batch` of them (or two), and return the seconds that it took.

        Whatever `forward` has to compile for any number of images is then compiled. Raises ValueError as it does.
        """
        vit = next(module for module in self.modules() if isinstance(module, PreparedViT))
        dtype = None if vit._processor is None else torch.uint8
        check_count("batch", batch)
        start = time.perf_counter()
        for count in (1, batch if batch > 1 or not vit._dynamic else 2):
            self(torch.zeros(count, vit.num_channels, height, width, dtype=dtype, device=vit.device))
        return time.perf_counter() - start

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, type(self).__bases__, self.__getstate__()  # its class is made here, by no name


class Twin(NamedTuple):
    """What stands in for a module, and what that was made of: for as long as it is, both compute the same."""

    module: nn.Module
    modules: tuple[nn.Module, ...]
    weights: tuple[tuple[Tensor, int], ...]
    stand_in: nn.Module

    @classmethod
    def of(cls, module: nn.Module, stand_in: nn.Module) -> Twin:
        """Remember what the module is made of."""
        weights = tuple((parameter, _version(parameter)) for parameter in module.parameters())
        return cls(module, tuple(module.modules()), weights, stand_in)

    def holds(self) -> bool:
        """Whether the module has the same modules and weights, none replaced or written to, and nobody looks inside."""
        modules, weights = tuple(self.module.modules()), tuple(self.module.parameters())
        return (
            modules == self.modules
            and len(weights) == len(self.weights)
            and all(p is q and _version(p) == v for p, (q, v) in zip(weights, self.weights, strict=True))
            and untouched(*modules)
        )


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


class PreparedViT(Prepared, DINOv3ViT):
    """A DINOv3ViT whose blocks have stand-ins, and whose patch embedding has one for pixels."""

    _processor: ImageProcessor | None
    _backend: str
    _dynamic: bool

    def _prepare(self, processor: ImageProcessor | None, backend: str, dynamic: bool) -> None:
        self._processor, self._backend, self._dynamic = processor, backend, dynamic
        self._forget()
        for block in self.blocks:
            self._stand_in(block)

    def _forget(self) -> None:
        """Choose the backend for the weights as they are; stand-ins are made when they are needed."""
        weight = next(self.blocks.parameters(), self.cls_token)
        takes = available(weight)
        if self._backend == "prepacked" and not takes:
            raise ValueError(
                f"backend is 'prepacked' and the model is {weight.dtype} on {weight.device}, which oneDNN does "
                "not take on this machine: expected float32, bfloat16 or float16 on a CPU that it supports; use "
                "'inductor'"
            )
        compiled = self._backend == "inductor" or not takes
        self._graphs = Graphs(run_stack, self._dynamic) if compiled else None
        self._twins: dict[int, Twin] = {}
        self._lock = threading.RLock()

    @torch.no_grad()
    def embed(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, keep_indices: Tensor | None = None
    ) -> tuple[Tokens, tuple[int, int]]:
        return super().embed(pixel_values, bool_masked_pos, keep_indices)

    def check_images(
        self, images: Tensor, name: str = "pixel_values", dims: tuple[str, ...] = BATCH
    ) -> tuple[int, int]:
        if self._processor is None:
            return super().check_images(images, name, dims)
        if images.dtype != torch.uint8:
            raise ValueError(
                f"{name} is {images.dtype}: expected torch.uint8 pixels, which the processor given to "
                "optimize_for_inference() normalises"
            )
        return check_images(images, self.num_channels, self.patch_size, name, dims, pixels=True)

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        if self._processor is None:
            return super().embed_patches(pixel_values)
        embed = self._stand_in(self.patch_embed)
        if embed is not self.patch_embed:
            return embed(pixel_values)
        mean, std = (
            pixel_values.new_tensor(v, dtype=torch.float32) for v in (self._processor.mean, self._processor.std)
        )
        pixels = pixel_values * self._processor.rescale_factor
        return super().embed_patches((pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))

    @torch.no_grad()
    def run_blocks(self, tokens: Tokens, taps: Sequence[int]) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return super().run_blocks(tokens, taps)
        blocks = tuple(self._stand_in(block) for block in self.blocks)
        if self._graphs is None or any(map(operator.is_, blocks, self.blocks)):
            return run_stack(blocks, tokens, taps, self.attention)
        return self._graphs(blocks, tokens, tuple(taps), self.attention)

    def run_packed(self, batches: Sequence[Tokens], taps: Sequence[int]) -> list[list[Tensor]]:
        if self._graphs is None:
            return super().run_packed(batches, taps)
        return [list(states) for states in zip(*(self.run_blocks(tokens, taps) for tokens in batches), strict=True)]

    def _stand_in(self, module: nn.Module) -> nn.Module:
        """What computes the same as this block or patch embedding, faster; the module itself where there is none."""
        twin = self._twins.get(id(module))
        if twin is None or not twin.holds():
            if not untouched(*module.modules()):
                return module
            with self._lock, torch.inference_mode(False), torch.no_grad():
                twin = self._twins.get(id(module))
                if twin is None or not twin.holds():
                    twin = self._twins[id(module)] = Twin.of(module, self._make_stand_in(module, twin))
        keeps_dtype = self._graphs is None or isinstance(module, PatchEmbed)
        autocast = torch.is_autocast_enabled(self.device.type)
        return module if autocast and keeps_dtype else twin.stand_in

    def _make_stand_in(self, module: nn.Module, before: Twin | None) -> nn.Module:
        if isinstance(module, PatchEmbed):
            assert self._processor is not None
            return PixelPatchEmbed(module, self._processor) if PixelPatchEmbed.fits(module) else module
        assert isinstance(module, Block)
        folded = fold(module)
        if self._graphs is None:
            prepack_projections(folded, self._dynamic)
        elif before is not None and before.modules == tuple(module.modules()):  # what was compiled keeps its tensors
            for old, new in zip(before.stand_in.parameters(), folded.parameters(), strict=True):
                old.data = new.data
            return before.stand_in
        return folded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_graphs", "_twins", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
