"""The model and what is kept of its outputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import unpack
from ..image import ImageProcessor
from ..inference import compile as optimize_for_inference
from ..model import DINOv3ViT
from ..packing import pack
from ..weights import Checkpoint

OUTPUTS = ("cls_token", "patch_mean", "patch_tokens", "register_tokens")
STORES = {"float16": torch.float16, "float32": torch.float32}


def weights_digest(checkpoint: Checkpoint) -> str:
    """A SHA-256 of every weight, in the model's order: the same in whichever layout they lie."""
    sha = hashlib.sha256()
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name).contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Features(nn.Module):
    """Images to the outputs that are stored: a tuple of tensors, one an output, in the dtype of the files."""

    def __init__(self, vit: DINOv3ViT, outputs: Sequence[str], blocks: Sequence[int] | None, store: torch.dtype):
        super().__init__()
        self.vit = vit
        self.outputs = tuple(outputs)
        self.blocks = [vit.depth - 1] if blocks is None else list(blocks)
        self.store = store

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> for each output (B, ..) or, of K > 1 blocks, (B, K, ..)."""
        tokens, _ = self.vit.embed(images)
        return self._pick(self.vit.run_blocks(tokens, self.blocks))

    def packed(self, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Images of different sizes as one sequence without padding: for each what `forward` gives for it alone."""
        batches = [self.vit.embed(image.unsqueeze(0))[0] for image in images]
        tokens = pack(batches)
        assert tokens.shapes is not None
        states = [unpack(state.squeeze(0), tokens.shapes) for state in self.vit.run_blocks(tokens, self.blocks)]
        return [self._pick([of_block[i] for of_block in states]) for i in range(len(images))]

    def _pick(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
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


class Network:
    """The prepared model on its device. On a GPU, copies to and from it overlap with the forward of another batch."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        device: torch.device,
        dtype: torch.dtype | None,
        outputs: Sequence[str],
        blocks: Sequence[int] | None,
        store: torch.dtype,
        pixels: ImageProcessor | None,
    ) -> None:
        """pixels: the processor whose normalisation the model does itself, on uint8 images."""
        vit = DINOv3ViT.from_pretrained(source, dtype=dtype, device=device)
        self.patch_size = vit.patch_size
        self.run = optimize_for_inference(Features(vit, outputs, blocks, store).eval(), pixels)
        self._packed: Any = self.run.folded.packed
        self.device = device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

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

    def run_packed(self, images: Sequence[Tensor]) -> list[list[Any]]:
        """For each of some (3, h, w) images of different sizes its outputs."""
        with torch.no_grad():
            outputs = self._packed([image.to(self.device).float() for image in images])
        return [[output[0].cpu().numpy() for output in of_image] for of_image in outputs]
