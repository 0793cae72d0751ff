"""A dense head of about a million parameters, the network it makes with a backbone, and the file it is kept in."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoint.containers import CONTAINERS, OutputTensor
from ..checkpoint.files import whole_files
from ..finetune import freeze_but_last
from ..inference import optimize_for_inference
from ..loading import Backbone

FORMAT = "dinov3-lite head 1"


class DenseHead(nn.Module):
    """Feature maps of a backbone and the picture itself to logits (B, K, H/4, W/4).

    The maps say what is where, at the stride of the patches; a stem of three convolutions on the picture says where
    its edges are, at stride 4. Each map is projected to `width` channels, all are mixed at the stride of the first (a
    ViT's are of one stride, a ConvNeXt's of 4 to 32), and the result meets the stem's.

    channels: C of each map. classes: K, the number of logits per pixel.
    """

    def __init__(self, channels: Sequence[int], classes: int, width: int = 128) -> None:
        super().__init__()
        edges = width // 2
        self.project = nn.ModuleList(_unit(c, width, 1) for c in channels)
        self.mix = _unit(len(channels) * width, width, 3)
        self.stem = nn.Sequential(_unit(3, edges // 2, 3, stride=2), _unit(edges // 2, edges, 3, stride=2))
        self.stem.append(_unit(edges, edges, 3))
        self.refine = _unit(width + edges, edges, 3)
        self.predict = nn.Conv2d(edges, classes, 1)
        if classes == 1:  # begin with little foreground, as most pictures have: trains several times as fast
            nn.init.normal_(self.predict.weight, std=0.01)
            nn.init.constant_(self.predict.bias, -2.0)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> Tensor:
        projected = [project(m) for project, m in zip(self.project, maps, strict=True)]
        grid = projected[0].shape[2:]
        alike = [m if m.shape[2:] == grid else _resized(m, grid) for m in projected]
        x = self.mix(torch.cat(alike, dim=1))  # (B, width, h, w)
        edges = self.stem(pixel_values)  # (B, width / 2, H/4, W/4)
        x = _resized(x, edges.shape[2:])
        return self.predict(self.refine(torch.cat((x, edges), dim=1)))


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.GELU())


class NormedQuarters(nn.Module):
    """(B, 3, H, W) -> four maps (B, C, h, w): blocks at 1/4, 2/4, 3/4 and 4/4 of the depth, after the final norm.

    Of a ConvNeXt its four stages, of which the last alone has a norm. `channels`: of each map.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.blocks = backbone.block_indices("quarters")
        self.channels = tuple(backbone.embed_dims[i] for i in self.blocks)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        return list(self.backbone.get_intermediate_layers(pixel_values, n=self.blocks, reshape=True))


class Segmenter(nn.Module):
    """A backbone and a head: normalised pictures (B, 3, H, W) to logits (B, K, H/4, W/4).

    unfreeze: how many of the last blocks train, together with the final norm; 0 freezes the backbone, which then runs
    without gradients and, on a CPU, prepared by `optimize_for_inference`. The backbone stays in evaluation mode in any
    case: training mode would rescale its RoPE coordinates, and so change its features at each call.
    """

    def __init__(self, backbone: Backbone, head: DenseHead, unfreeze: int = 0) -> None:
        super().__init__()
        freeze_but_last(backbone, unfreeze)
        self.maps = NormedQuarters(backbone.eval())
        self.head = head.to(backbone.device)
        self.head.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # trains 1.2 times as fast so
        self._prepared: list[nn.Module] = []  # in a list, lest its weights count as further ones of this module

    @property
    def backbone(self) -> Backbone:
        return self.maps.backbone

    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = self.head.predict.weight.dtype
        maps = [m.to(dtype) for m in self._maps(pixel_values)]
        return self.head(maps, pixel_values.to(dtype, memory_format=torch.channels_last))

    def _maps(self, pixel_values: Tensor) -> list[Tensor]:
        if any(parameter.requires_grad for parameter in self.maps.parameters()):
            self._prepared.clear()
            return self.maps(pixel_values)
        if self.backbone.device.type != "cpu":  # elsewhere it would be compiled, for a minute
            with torch.no_grad():
                return self.maps(pixel_values)
        if not self._prepared:
            self._prepared.append(optimize_for_inference(self.maps))
        return self._prepared[0](pixel_values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Segmenter:
        self._prepared.clear()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        self.maps.eval()
        return self


@dataclass(frozen=True)
class HeadSettings:
    """What a head's file stores beside the weights: how pictures are prepared, which backbone it belongs to."""

    classes: int
    """1 for one foreground."""
    size: tuple[int, int]
    """(height, width) in pixels that pictures had in training."""
    channels: tuple[int, ...]
    unfreeze: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: str
    """The variant's name."""
    fingerprint: str
    """Of the backbone's weights, as they were before fitting."""


def fingerprint(backbone: Backbone) -> str:
    """Eight hex digits that name a backbone's weights: its checkpoint's digest, equal for every layout, or else one of
    samples of its parameters.
    """
    found = re.search(r"\b[0-9a-f]{8}\b", backbone.weights_id)
    if found:
        return found[0]
    sha = hashlib.sha256()
    for parameter in backbone.parameters():
        sha.update(sample(parameter))
    return sha.hexdigest()[:8]


def sample(parameter: Tensor) -> bytes:
    """Some sixteen numbers of a parameter, for a digest."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // 16)].double().cpu().numpy().tobytes()


def save_head(network: Segmenter, settings: HeadSettings, path: Path, entry: dict[str, float]) -> None:
    """Write what was trained, its settings and its epoch's loss and measures, as one safetensors file: the same bytes
    for the same head, which safetensors' own `save` does not give (it shuffles the metadata).
    """
    trained = {name: p.detach().cpu().contiguous() for name, p in network.named_parameters() if p.requires_grad}
    tensors = [OutputTensor.of(name, tensor) for name, tensor in trained.items()]
    metadata = {"format": FORMAT, "settings": json.dumps(asdict(settings)), "epoch": json.dumps(entry)}
    with whole_files() as out, out.create(path) as file:
        CONTAINERS[".safetensors"].write(file, tensors, metadata, lambda count: None)


def load_head(path: str | os.PathLike[str], backbone: Backbone) -> tuple[Segmenter, HeadSettings]:
    """Load a head onto the backbone that it was fitted to: a Segmenter in evaluation mode.

    If blocks of the backbone were fitted too, their weights replace those in `backbone`.

    Raises FileNotFoundError, and ValueError for a file that is no head or damaged, and for another backbone.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: expected a head that `fit` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no whole safetensors file ({error}): expected a head that `fit` wrote") from error
    kind = metadata.get("format", "")
    if kind != FORMAT:
        found = f"is {kind}" if kind.startswith("dinov3-lite head") else "holds other tensors than a head's"
        raise ValueError(f"{path}: {found}: expected {FORMAT}, which `fit` writes")
    try:
        content = json.loads(metadata["settings"])
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        settings = HeadSettings(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its settings are damaged ({error}): fit the head again") from error
    ours = fingerprint(backbone)
    if settings.fingerprint != ours:
        raise ValueError(
            f"{path}: was fitted to the backbone {settings.backbone} with weights {settings.fingerprint}, and this is "
            f"{backbone.config.name} with weights {ours}: give the checkpoint that it was fitted to"
        )
    network = Segmenter(backbone, DenseHead(settings.channels, settings.classes), settings.unfreeze)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in parameters.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"{path}: its tensors are not those that its settings tell of: fit the head again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    if settings.unfreeze:
        backbone.weights_id = "fitted"  # other weights than those the fingerprint names
    return network.requires_grad_(False).eval(), settings
