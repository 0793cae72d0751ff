"""The model and what is kept of its outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..image import ImageProcessor
from ..inference import optimize_for_inference
from ..model import DINOv3ViT

OUTPUTS = ("cls_token", "patch_mean", "patch_tokens", "register_tokens")
STORES = {"float16": torch.float16, "float32": torch.float32}


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A SHA-256 of every weight, in the model's order: the same in every layout, and of a model of them."""
    sha = hashlib.sha256()
    for name, tensor in weights:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def device_of(model: DINOv3ViT) -> torch.device:
    """Where its weights are."""
    return next(model.parameters()).device


class Network:
    """A prepared model on its device. On a GPU, copies to and from it overlap with the forward of another batch."""

    def __init__(
        self,
        vit: DINOv3ViT,
        outputs: Sequence[str],
        blocks: Sequence[int] | None,
        store: torch.dtype,
        pixels: ImageProcessor | None,
    ) -> None:
        """outputs: names in OUTPUTS. blocks: ascending indices. pixels: makes the model take uint8 images."""
        self.vit = optimize_for_inference(vit, pixels)
        self.outputs, self.store, self.device = tuple(outputs), store, device_of(vit)
        self.blocks = [vit.depth - 1] if blocks is None else list(blocks)
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def run(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, h, w) -> for each output (B, ..) or, of K > 1 blocks, (B, K, ..), in the dtype of the files."""
        tokens, _ = self.vit.embed(images)
        return self._pick(self.vit.run_blocks(tokens, self.blocks))

    @torch.no_grad()
    def run_packed(self, images: Sequence[Tensor]) -> list[list[Any]]:
        """Images (3, h, w) of different sizes as one sequence without padding: for each its outputs."""
        batches = [self.vit.embed(image.to(self.device)[None])[0] for image in images]
        states = self.vit.run_packed(batches, self.blocks)
        picked = (self._pick([of_block[i] for of_block in states]) for i in range(len(images)))
        return [[output[0].cpu().numpy() for output in of_image] for of_image in picked]

    @torch.no_grad()
    def _pick(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of the blocks' states (B, N, C)."""
        prefix = self.vit.num_prefix_tokens
        normed = [self.vit.norm(state) for state in states]
        pick = {
            "cls_token": lambda x: x[:, 0],
            "patch_mean": lambda x: x[:, prefix:].float().mean(dim=1),
            "patch_tokens": lambda x: x[:, prefix:],
            "register_tokens": lambda x: x[:, 1:prefix],
        }
        picked = ([pick[output](x) for x in normed] for output in self.outputs)
        return tuple((xs[0] if len(xs) == 1 else torch.stack(xs, dim=1)).to(self.store) for xs in picked)

    def submit(self, images: Tensor) -> Any:
        """Start on a batch (B, 3, h, w), in pinned memory for a GPU: a call that waits for the outputs."""
        if self.copies is None:
            outputs = [output.numpy() for output in self.run(images)]
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
