"""A part that several processes do together, each with its share of one model: tensor parallelism along "tp".

The first process of a mesh does what a process alone would: it reads, decodes and writes. Before every forward it hands
its batch to the others, which run the same forward with their share of the heads and forget the outputs. They read
nothing but their weights, and write nothing.

A process that fails takes its mesh along, within the timeout of the process group at the latest (30 minutes by gloo, 10
by NCCL, which a single batch may not take to be read); the same command goes on with the shard at hand.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..image import ImageProcessor
from ..loading import Backbone
from ..model import DINOv3ViT
from .compute import Network
from .parts import Part, local_device


def parse_mesh(text: str) -> int:
    """N of `tp=N`, how many processes share a model."""
    if not (match := re.fullmatch(r"tp=([1-9]\d*)", text)):
        raise ValueError(
            f"mesh {text!r}: expected tp=N, N processes with one model between them (gathering weights for each batch, "
            "as FSDP does, is slower than whole models side by side)"
        )
    return int(match[1])


class Team:
    """The processes of one mesh: of torchrun's, in order, as many as share a model. A context manager."""

    def __init__(self, tp: int, device: str | None = None, env: Mapping[str, str] = os.environ) -> None:
        """Raises ValueError if torchrun did not start this process, or not a multiple of tp."""
        if not {"RANK", "WORLD_SIZE"} <= env.keys():
            raise ValueError(
                f"mesh 'tp={tp}' is for processes that torchrun starts, and this one has no RANK and WORLD_SIZE: "
                f"torchrun --nproc-per-node {tp} -m dinov3_lite extract ..."
            )
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        if world % tp:
            raise ValueError(f"mesh 'tp={tp}' and torchrun started {world} processes: expected a multiple of {tp}")
        self.size, self.meshes, self.leads = tp, world // tp, rank % tp == 0
        self.device = torch.device(device or local_device(env))
        self._waits = True  # the others do, for words of the first

    def __enter__(self) -> Team:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():  # it is kept to the end: torchrun's processes can't make it a second time
            atexit.register(self._leave)
        whole = init_device_mesh(self.device.type, (self.meshes, self.size), mesh_dim_names=("part", "tp"))
        self.mesh = whole["tp"]
        self.group = self.mesh.get_group()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Let the others go. Where they are not waiting, they find out by the end of the group, or of this process."""
        if not self._waits:
            self._leave()
        elif self.leads:
            with suppress(RuntimeError):  # they have ended by themselves
                self._tell("end", None if error is None else f"the first process of the mesh ended: {error}")

    def _leave(self) -> None:
        if dist.is_initialized() and (self._waits or self.device.type == "cpu"):  # NCCL waits for what is under way
            dist.destroy_process_group()

    def part(self, told: Part, *, given: bool) -> Part:
        """The mesh's part of the shards, of what a launcher told each process; given: by the user, to all alike."""
        if given and self.meshes > 1:
            raise ValueError(
                f"part {told.index}/{told.count} is given to {self.meshes} meshes at once: leave it out, or start one"
            )
        return told if given else Part(told.index // self.size, told.count // self.size, told.told_by)

    def network(self, source: str, loading: dict[str, Any], dtype: torch.dtype, *options: Any) -> Network:
        """A network whose forwards all processes of the mesh run. options: as of `Network`."""
        self._tell("load", (source, loading, dtype, options))
        return _Leading(self, self._load(source, loading, dtype), *options)

    def _load(self, source: str, loading: dict[str, Any], dtype: torch.dtype) -> DINOv3ViT:
        """The model, in all processes of the mesh, or an error in all."""
        self._waits = False
        vit, error = None, ""
        try:
            vit = DINOv3ViT.from_pretrained(source, dtype=dtype, mesh=self.mesh, **loading)
        except Exception as reason:
            error, raised = str(reason), reason
        errors = [""] * self.size
        dist.all_gather_object(errors, error, self.group)
        if vit is None:
            raise raised
        if failed := [error for error in errors if error]:
            raise RuntimeError(f"another process of the mesh can't load the model: {failed[0]}")
        self._waits = True
        return vit

    def follow(self) -> None:
        """Run what the first process runs, until it is done. Raises RuntimeError with its words if it failed."""
        network = None
        while True:
            what, content = self._told()
            if what == "load":
                source, loading, dtype, options = content
                network = Shared(self._load(source, loading, dtype), *options)
            elif what == "end":
                if content is not None:
                    raise RuntimeError(content)
                return
            else:
                assert network is not None
                self._waits = False
                images = self._exchange([torch.empty(shape, dtype=dtype) for shape, dtype in content])
                network.run(*images) if what == "run" else network.run_several(images)
                self._waits = True

    def lead(self, what: str, compute: Callable[[list[Tensor]], Any], images: Sequence[Tensor]) -> Any:
        """Have the others run `what` of their networks ("run", "run_several") while this one computes: its result."""
        self._waits = False
        try:
            self._tell(what, [(image.shape, image.dtype) for image in images])
            result = compute(self._exchange(images))
        except RuntimeError as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RuntimeError(f"a process of the mesh failed or ended ({first}): the same command goes on") from error
        self._waits = True
        return result

    def _exchange(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The images of the first process, in all of them."""
        images = [image.to(self.device).contiguous() for image in images]
        for image in images:
            dist.broadcast(image, dist.get_global_rank(self.group, 0), self.group)
        return images

    def _tell(self, what: str, content: Any) -> None:
        dist.broadcast_object_list([what, content], dist.get_rank(), self.group, self.device)

    def _told(self) -> tuple[str, Any]:
        told: list[Any] = [None, None]
        dist.broadcast_object_list(told, dist.get_global_rank(self.group, 0), self.group, self.device)
        return told[0], told[1]


class Shared(Network):
    """A network of a model in parts, which runs as it is: none of the stand-ins for whole blocks fits."""

    def prepared(self, model: Backbone, pixels: ImageProcessor | None) -> Backbone:
        """The model itself."""
        self.pixels = pixels
        return model

    def _normalised(self, images: Tensor) -> Tensor:
        if self.pixels is None:
            return images
        mean, std = (
            torch.tensor(n, dtype=torch.float32, device=images.device).view(-1, 1, 1)
            for n in (self.pixels.mean, self.pixels.std)
        )
        return (images * self.pixels.rescale_factor - mean) / std

    @torch.no_grad()
    def run(self, images: Tensor) -> tuple[Tensor, ...]:
        """As of a whole model."""
        return super().run(self._normalised(images))

    def run_several(self, images: Sequence[Tensor]) -> list[list[Any]]:
        """As of a whole model."""
        return super().run_several([self._normalised(image) for image in images])


class _Leading(Shared):
    """That of a mesh's first process."""

    def __init__(self, team: Team, vit: DINOv3ViT, *options: Any) -> None:
        super().__init__(vit, *options)
        self.team = team

    def run(self, images: Tensor) -> tuple[Tensor, ...]:
        """As of a whole model."""
        return self.team.lead("run", lambda whole: super(_Leading, self).run(*whole), [images])

    def run_several(self, images: Sequence[Tensor]) -> list[list[Any]]:
        """As of a whole model."""
        return self.team.lead("run_several", super().run_several, images)
