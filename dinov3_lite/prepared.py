"""What `optimize_for_inference` makes of a model: its own class, with stand-ins for its blocks and first layer."""

from __future__ import annotations

import itertools
import operator
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import resolve_attention
from .checks import BATCH, check_count
from .choices import Answer, Choices
from .convnext import ConvNeXtBlock, DINOv3ConvNeXt, Downsample, Stem, run_units
from .folding import fold, for_pixels
from .graphs import Graphs, Tensors
from .image import ImageProcessor
from .layers import Block, PatchEmbed, untouched
from .lent import Lent
from .model import DINOv3ViT, attention_of, run_stack
from .packing import Tokens
from .prepacked import available
from .stand_ins import FastBlock, PreparedAttention, stand_in
from .tracing import modes_watch, traced
from .twin import Twin


def become(module: nn.Module, mixin: type[Prepared]) -> None:
    """Change a module's class, in place, to a subclass of it whose methods are looked up in `mixin` first."""
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
        inside = next(module for module in self.modules() if isinstance(module, PreparedBackbone))
        dtype = None if inside._processor is None else torch.uint8
        check_count("batch", batch)
        start = time.perf_counter()
        for count in (1, batch if batch > 1 or not inside._dynamic else 2):
            self(torch.zeros(count, inside.num_channels, height, width, dtype=dtype, device=inside.device))
        return time.perf_counter() - start

    @property
    def choices(self) -> dict[str, str]:
        """Which way of computing was chosen for each product and each attention that ran so far.

        `optimize_for_inference(model, choices=...)` takes it, on another machine too: the same choices give the same
        bits on the same processor.
        """
        return {question: answer.way for question, answer in self._all_choices().items()}

    def explain(self) -> str:
        """What was chosen, a line each, with the milliseconds of every way that was measured. Empty before a run."""
        return "\n".join(f"{question}: {answer}" for question, answer in self._all_choices().items())

    def _all_choices(self) -> dict[str, Answer]:
        inside = (module for module in self.modules() if isinstance(module, PreparedBackbone))
        return {question: answer for module in inside for question, answer in dict(module._choices.answers).items()}

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, type(self).__bases__, self.__getstate__()  # its class is made here, by no name


class PreparedBackbone(Prepared):
    """A backbone whose blocks have stand-ins, and whose first layer has one for pixels."""

    num_channels: int
    device: torch.device
    _processor: ImageProcessor | None
    _backend: str
    _dynamic: bool

    def _blocks(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, (Block, ConvNeXtBlock))]

    def _new_graphs(self) -> Graphs:
        raise NotImplementedError

    def _prepare(self, processor: ImageProcessor | None, backend: str, dynamic: bool, choices: Choices) -> None:
        self._processor, self._backend, self._dynamic, self._choices = processor, backend, dynamic, choices
        self._forget()

    def _forget(self) -> None:
        """Choose the backend for the weights as they are; stand-ins are made when they are needed."""
        weight = next(itertools.chain(*(block.parameters() for block in self._blocks()), self.parameters()))
        takes = available(weight)
        if self._backend == "prepacked" and not takes:
            raise ValueError(
                f"backend is 'prepacked' and the model is {weight.dtype} on {weight.device}, which oneDNN does "
                "not take on this machine: expected float32, bfloat16 or float16 on a CPU that it supports; use "
                "'inductor'"
            )
        for module in itertools.chain(*(block.modules() for block in self._blocks())):
            Lent.undo(module)
        self._graphs = self._new_graphs() if self._backend == "inductor" or not takes else None
        self._twins: weakref.WeakKeyDictionary[nn.Module, Twin] = weakref.WeakKeyDictionary()
        self._packed_for: int | None = 0  # rows; None: any
        self._lock = threading.RLock()

    def check_images(
        self, images: Tensor, name: str = "pixel_values", dims: tuple[str, ...] = BATCH, pixels: bool = False
    ) -> tuple[int, int]:
        grid = super().check_images(images, name, dims, pixels or self._processor is not None)  # type: ignore[misc]
        if self._processor is not None and images.dtype != torch.uint8:
            raise ValueError(
                f"{name} is {images.dtype}: expected torch.uint8 pixels, which the processor given to "
                "optimize_for_inference() normalises"
            )
        return grid

    def _runs_as_loaded(self) -> bool:
        """Whether the modules themselves run: what runs is recorded or transformed, or there are no numbers."""
        return traced() or self.device.type == "meta"

    @torch.no_grad()
    def _embedded(self, embed: nn.Module, pixel_values: Tensor, as_loaded: Callable[[Tensor], Tensor]) -> Tensor:
        """What `embed` gives for images, or for pixels where a processor was folded in."""
        elsewhere = pixel_values.device != self.device  # of which torch's own convolution says so
        stand_in = embed if elsewhere or self._runs_as_loaded() else self._stand_in(embed)
        if stand_in is not embed:
            return stand_in(pixel_values)
        if self._processor is None:
            return as_loaded(pixel_values)
        mean, std = (
            pixel_values.new_tensor(v, dtype=torch.float32) for v in (self._processor.mean, self._processor.std)
        )
        pixels = pixel_values * self._processor.rescale_factor
        return as_loaded((pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))

    def _stand_in(self, module: nn.Module) -> nn.Module:
        """What computes the same as this block or first layer, faster; the module itself where there is none."""
        twin = self._twins.get(module)
        if twin is None or not twin.holds(module):
            if not untouched(*module.modules()):
                self._let_go(module)
                return module
            with self._lock, torch.inference_mode(False), torch.no_grad():
                twin = self._twins.get(module)
                if twin is None or not twin.holds(module):
                    twin = self._twins[module] = Twin.of(module, self._make_stand_in(module, twin))
                    self._packed_for = 0
        keeps_dtype = self._graphs is None or isinstance(module, (PatchEmbed, Stem))
        autocast = torch.is_autocast_enabled(self.device.type)
        return module if twin.stand_in is None or (autocast and keeps_dtype) else twin.stand_in

    def _let_go(self, module: nn.Module) -> None:
        """Drop what is packed of a module that now runs itself, unless it is only watched by a mode, which passes."""
        if not modes_watch() and self._twins.pop(module, None) is not None:
            for part in module.modules():
                Lent.undo(part)

    def _make_stand_in(self, module: nn.Module, before: Twin | None) -> nn.Module:
        if is_first := isinstance(module, (PatchEmbed, Stem)):
            module = module if self._processor is None else for_pixels(module, self._processor)
        if self._graphs is None:
            # of each layer, since one may be of another dtype; what is lent stays away
            held = (weight for part in module.modules() for weight in dict.values(part._parameters))
            takes = all(available(weight) for weight in held if weight is not None)
            return stand_in(module, self._choices, self._dynamic) if takes else module
        if is_first:
            return module
        assert isinstance(module, (Block, ConvNeXtBlock))
        folded = fold(module)
        return folded if before is None else before.refilled(module, folded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_graphs", "_twins", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


class PreparedViT(PreparedBackbone, DINOv3ViT):
    """A prepared DINOv3ViT."""

    def _new_graphs(self) -> Graphs:
        return Graphs(_run_tokens, _example_tokens, self._dynamic)

    @torch.no_grad()
    def embed(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, keep_indices: Tensor | None = None
    ) -> tuple[Tokens, tuple[int, int]]:
        return super().embed(pixel_values, bool_masked_pos, keep_indices)

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        return self._embedded(self.patch_embed, pixel_values, super().embed_patches)

    @torch.no_grad()
    def run_blocks(self, tokens: Tokens, taps: Sequence[int]) -> list[Tensor]:
        if self._runs_as_loaded():
            return super().run_blocks(tokens, taps)
        blocks = tuple(self._stand_in(block) for block in self.blocks)
        if any(isinstance(block, FastBlock) for block in blocks):
            attention = PreparedAttention(tokens, self.attention, self._choices, self._dynamic)
            self._pack(blocks, attention)
            return run_stack(blocks, tokens, taps, attention)
        if self._graphs is None or tokens.shapes is not None or any(map(operator.is_, blocks, self.blocks)):
            return run_stack(blocks, tokens, taps, attention_of(tokens, self.attention))
        return self._graphs(blocks, tokens[:3], tuple(taps), self.attention)

    @torch.no_grad()
    def run_prefix(self, tokens: Tokens, taps: Sequence[int]) -> list[Tensor]:
        if self._runs_as_loaded() or tokens.shapes is not None or self.attention not in ("auto", "sdpa"):
            return super().run_prefix(tokens, taps)
        block = self._stand_in(self.blocks[taps[-1]])
        if not isinstance(block, FastBlock):
            return super().run_prefix(tokens, taps)
        before = self.run_blocks(tokens, sorted({*taps[:-1], taps[-1] - 1} - {-1}))
        x = before[-1] if taps[-1] else tokens.x
        attention = PreparedAttention(tokens, self.attention, self._choices, self._dynamic)
        states = [*before[: len(taps) - 1], block(x, tokens.cos, tokens.sin, attention, self.num_prefix_tokens)]
        return [state[:, : self.num_prefix_tokens] for state in states]

    def _pack(self, blocks: Sequence[nn.Module], attention: PreparedAttention) -> None:
        """Pack all weights before the first activation: between them they would leave holes that fit nothing else."""
        rows = attention.batch * attention.tokens
        wanted = None if self._dynamic else rows
        if rows and wanted != self._packed_for:
            for block in blocks:
                if isinstance(block, FastBlock):
                    block.pack(attention)
            self._packed_for = wanted

    def run_packed(self, batches: Sequence[Tokens], taps: Sequence[int]) -> list[list[Tensor]]:
        if self._graphs is None:
            return super().run_packed(batches, taps)
        return [list(states) for states in zip(*(self.run_blocks(tokens, taps) for tokens in batches), strict=True)]


def _run_tokens(blocks: Sequence[nn.Module], tensors: Tensors, taps: Sequence[int], attention: str) -> list[Tensor]:
    x, cos, sin = tensors
    return run_stack(blocks, Tokens(x, cos, sin), taps, resolve_attention(attention))


def _example_tokens(tensors: Tensors, dynamic: bool) -> Tensors:
    x, cos, _ = tensors
    B, N, C = x.shape
    if dynamic:
        B, N = (1 if B == 1 else 3), 229  # like no width, near the usual 201
    generator = torch.Generator().manual_seed(0)
    table = (B, N, cos.shape[-1])[3 - cos.ndim :]
    angles = _normal(table, generator).to(cos)
    return _normal((B, N, C), generator).to(x), angles.cos(), angles.sin()


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """In float32 on the CPU, whatever the caller's defaults are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


class PreparedConvNeXt(PreparedBackbone, DINOv3ConvNeXt):
    """A prepared DINOv3ConvNeXt."""

    def _new_graphs(self) -> Graphs:
        return Graphs(_run_map, _example_map, self._dynamic)

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        return super().embed(pixel_values)

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        return self._embedded(self.stem, pixel_values, super().embed_patches)

    @torch.no_grad()
    def run_stages(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        if self._runs_as_loaded() or not untouched(*self.stages):
            return super().run_stages(x, taps)
        units: list[nn.Module] = []
        ends, stands_in = [], True
        stages: Any = self.stages
        for stage in stages:
            blocks = [self._stand_in(block) for block in stage.blocks]
            stands_in = stands_in and not any(map(operator.is_, blocks, stage.blocks))
            stands_in = stands_in and untouched(*stage.downsample.modules())
            is_prepacked = self._graphs is None and isinstance(stage.downsample, Downsample)
            units += [self._stand_in(stage.downsample) if is_prepacked else stage.downsample, *blocks]
            ends.append(len(units) - 1)
        unit_taps = tuple(ends[i] for i in taps)
        if self._graphs is None or not stands_in:
            return run_units(units, x, unit_taps)
        return self._graphs(tuple(units), (x,), unit_taps)


def _run_map(units: Sequence[nn.Module], tensors: Tensors, taps: Sequence[int], _: str) -> list[Tensor]:
    return run_units(units, tensors[0], taps)


def _example_map(tensors: Tensors, dynamic: bool) -> Tensors:
    B, h, w, C = tensors[0].shape
    if dynamic:
        B, h, w = (1 if B == 1 else 3), 50, 70  # unequal sides, like no width, near the usual 56
    return (_normal((B, h, w, C), torch.Generator().manual_seed(0)).to(tensors[0]),)
