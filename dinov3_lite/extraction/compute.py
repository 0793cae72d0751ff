"""The model and what is kept of its outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..features import patches_and_prefix
from ..image import ImageProcessor
from ..inference import optimize_for_inference
from ..loading import Backbone
from ..model import DINOv3ViT

OUTPUTS = ("cls_token", "patch_mean", "patch_tokens", "register_tokens")
STORES = {"float16": torch.float16, "float32": torch.float32}
AT_ONCE = 1 << 19
"""Pixels of a forward on a CPU: 8 images of 224 px. Of 32 at once, what a block makes no longer fits the caches, and a
ViT-S or ViT-B took a fifth to a third more time an image."""


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A SHA-256 of every weight, in the order of their names: the same in every layout, and of a model of them."""
    sha = hashlib.sha256()
    for name, tensor in weights:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def device_of(model: Backbone) -> torch.device:
    """Where its weights are."""
    return next(model.parameters()).device


def images_at_once(height: int, width: int) -> int:
    """How many images of this size a CPU runs as one batch: a power of two, which divides what people ask for."""
    return 1 << (max(1, AT_ONCE // (height * width)).bit_length() - 1)


class Network:
    """A prepared model on its device. On a GPU, copies to and from it overlap with the forward of another batch."""

    def __init__(
        self,
        model: Backbone,
        outputs: Sequence[str],
        blocks: Sequence[int] | None,
        store: torch.dtype,
        pixels: ImageProcessor | None,
        batch: tuple[int, int, int] | None = None,
    ) -> None:
        """outputs: names in OUTPUTS. blocks: ascending indices. pixels: makes the model take uint8 images.
        batch: images, height and width of a batch; None where they have sizes of their own.
        """
        self.outputs, self.store, self.device = tuple(outputs), store, device_of(model)
        self.at_once = 0  # images of a forward: always as many where they have one size, which is faster
        if batch is not None:
            self.at_once = min(batch[0], images_at_once(*batch[1:])) if self.device.type == "cpu" else batch[0]
        self.model: Any = self.prepared(model, pixels)
        self.blocks = [model.depth - 1] if blocks is None else list(blocks)
        self.prefix_only = isinstance(model, DINOv3ViT) and {"cls_token", "register_tokens"}.issuperset(outputs)
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def prepared(self, model: Backbone, pixels: ImageProcessor | None) -> Backbone:
        """The model that runs."""
        return optimize_for_inference(model, pixels, dynamic=not self.at_once or self.device.type == "cuda")

    def run(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, h, w) -> for each output (B, ..) or, of K > 1 blocks, (B, K, ..), in the dtype of the files."""
        if self.prefix_only:
            tokens, _ = self.model.embed(images)
            prefixes = map(self.model.norm, self.model.run_prefix(tokens, self.blocks))
            return self._pick([(prefix[:, :0], prefix[:, 0], prefix[:, 1:]) for prefix in prefixes])
        every = {"return_class_token": True, "return_extra_tokens": True}
        return self._pick(self.model.get_intermediate_layers(images, self.blocks, **every))

    @torch.no_grad()
    def run_several(self, images: Sequence[Tensor]) -> list[list[Any]]:
        """Images (3, h, w) of different sizes: for each its outputs. As one sequence without padding, where the model
        can.
        """
        images = [image.to(self.device)[None] for image in images]
        picked = self._run_packed(images) if self.model.packs else map(self.run, images)
        return [[output[0].cpu().numpy() for output in of_image] for of_image in picked]

    def _run_packed(self, images: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        batches, grids = zip(*map(self.model.embed, images), strict=True)
        for states, grid in zip(zip(*self.model.run_packed(batches, self.blocks), strict=True), grids, strict=True):
            parts = (patches_and_prefix(self.model, state, grid, norm=True, reshape=False) for state in states)
            yield self._pick([(patches, prefix[:, 0], prefix[:, 1:]) for patches, prefix in parts])

    @torch.no_grad()
    def _pick(self, layers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """The outputs, of each block's patch tokens (B, h*w, C), CLS token (B, C) and register tokens (B, R, C)."""
        pick = {
            "cls_token": lambda patches, cls_token, registers: cls_token,
            "patch_mean": lambda patches, cls_token, registers: patches.float().mean(dim=1),
            "patch_tokens": lambda patches, cls_token, registers: patches,
            "register_tokens": lambda patches, cls_token, registers: registers,
        }
        picked = ([pick[output](*layer) for layer in layers] for output in self.outputs)
        return tuple((xs[0] if len(xs) == 1 else torch.stack(xs, dim=1)).to(self.store) for xs in picked)

    def submit(self, images: Tensor) -> Any:
        """Start on a batch (B, 3, h, w), in pinned memory for a GPU; return a function that waits for the outputs."""
        if self.copies is None:
            filled = torch.cat((images, images.new_zeros(-len(images) % self.at_once, *images.shape[1:])))
            some = map(self.run, filled.split(self.at_once))
            outputs = [torch.cat(parts)[: len(images)].numpy() for parts in zip(*some, strict=True)]
            return lambda: outputs
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copies):
            on_device = images.to(self.device, non_blocking=True)
        compute.wait_stream(self.copies)
        on_device.record_stream(compute)
        hosts = []
        for output in self.run(on_device):
            host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            hosts.append(host.copy_(output, non_blocking=True))
        ready = torch.cuda.Event()
        ready.record(compute)

        def wait() -> list[Any]:
            ready.synchronize()
            return [host.numpy() for host in hosts]

        return wait
