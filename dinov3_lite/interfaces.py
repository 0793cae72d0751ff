"""The backbone as transformers' and timm's users hold it: thin wrappers with their names over the one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import convnext_features
from .checkpoint.files import short
from .checkpoint.hub import locate
from .checkpoint.json_files import read_json
from .config import MODEL_TYPE
from .convnext import DINOv3ConvNeXt
from .features import patches_and_prefix
from .model import DINOv3ViT


class BackboneOutput(NamedTuple):
    """What a backbone returns: one entry for each stage asked for, in ascending order."""

    feature_maps: tuple[Tensor, ...]
    """(B, C, h, w) each, or (B, h*w, C) of a ViT without `reshape_hidden_states`."""
    cls_tokens: tuple[Tensor, ...] | None
    """(B, C) each, or None without `return_class_token`."""


class DINOv3ViTBackbone(nn.Module):
    """Feature maps of chosen stages: the options and attributes of transformers' class of the same name.

    Stage 0 ("stem") is the embeddings, stage i ("stage{i}") the output of block i - 1. The last stage is always normed,
    the others where `apply_layernorm` is true. Nothing runs after the last stage asked for.

    Attributes: `out_indices`, `out_features` (names), `stage_names`, `channels` of the maps, `num_features` of all
    stages, `model`, `config`.
    """

    def __init__(
        self,
        model: DINOv3ViT,
        *,
        out_indices: Sequence[int] | None = None,
        out_features: Sequence[str] | None = None,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        return_class_token: bool = False,
    ) -> None:
        """Of the stages whose indices (negative: from the end) or names are given; without either, of the last.

        Raises ValueError for a stage that the model does not have, or if both are given and disagree.
        """
        super().__init__()
        self.model = model
        self.config = model.config
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, model.depth + 1))]
        self.num_features = [model.embed_dim] * len(self.stage_names)
        self.out_indices = stages_of(self.stage_names, out_indices, out_features)
        self.out_features = [self.stage_names[i] for i in self.out_indices]
        self.channels = [self.num_features[i] for i in self.out_indices]
        self.apply_layernorm = apply_layernorm
        self.reshape_hidden_states = reshape_hidden_states
        self.return_class_token = return_class_token

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: str = "auto",
        prefix: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **stages: Any,
    ) -> DINOv3ViTBackbone:
        """Load as `DINOv3ViT.from_pretrained` does, whose arguments these are. In evaluation mode.

        stages: the constructor's options; those not given are what the checkpoint's config.json says, as transformers'
            backbones save it.
        """
        path = locate(
            source, subfolder=subfolder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
        model = DINOv3ViT.from_pretrained(path, dtype=dtype, device=device, attention=attention, prefix=prefix)
        said = _stages_of(path)
        if {"out_indices", "out_features"} & stages.keys():
            said = {name: value for name, value in said.items() if name not in ("out_indices", "out_features")}
        return cls(model, **{**said, **stages}).eval()

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Maps of the chosen stages, of normalised images (B, 3, H, W). Raises ValueError as the model does."""
        model = self.model
        tokens, grid = model.embed(pixel_values)
        states = {0: tokens.x}
        blocks = [i - 1 for i in self.out_indices if i]
        states |= zip((b + 1 for b in blocks), model.run_blocks(tokens, blocks), strict=True)
        maps, cls_tokens = [], []
        for i in self.out_indices:
            normed = self.apply_layernorm or i == model.depth
            patches, prefix = patches_and_prefix(model, states[i], grid, normed, self.reshape_hidden_states)
            maps.append(patches)
            cls_tokens.append(prefix[:, 0])
        return BackboneOutput(tuple(maps), tuple(cls_tokens) if self.return_class_token else None)


class DINOv3ConvNextBackbone(nn.Module):
    """Feature maps of chosen stages: the options and attributes of transformers' class of the same name.

    Stage 0 ("stem") is the images as given, stage i ("stage{i}") the map of the i-th stage before the final LayerNorm.
    Nothing runs after the last stage asked for.

    Attributes: `out_indices`, `out_features` (names), `stage_names`, `channels` of the maps, `num_features` of all
    stages, `model`, `config`.
    """

    def __init__(
        self,
        model: DINOv3ConvNeXt,
        *,
        out_indices: Sequence[int] | None = None,
        out_features: Sequence[str] | None = None,
    ) -> None:
        """Of the stages whose indices (negative: from the end) or names are given; without either, of the last.

        Raises ValueError for a stage that the model does not have, or if both are given and disagree.
        """
        super().__init__()
        self.model = model
        self.config = model.config
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, model.depth + 1))]
        self.num_features = [model.config.num_channels, *model.embed_dims]
        self.out_indices = stages_of(self.stage_names, out_indices, out_features)
        self.out_features = [self.stage_names[i] for i in self.out_indices]
        self.channels = [self.num_features[i] for i in self.out_indices]

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **stages: Any,
    ) -> DINOv3ConvNextBackbone:
        """Load as `DINOv3ConvNeXt.from_pretrained` does; `stages` are the constructor's options. In evaluation mode."""
        return cls(DINOv3ConvNeXt.from_pretrained(source, dtype=dtype, device=device), **stages).eval()

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Maps of the chosen stages, of normalised images (B, 3, H, W). Raises ValueError as the model does."""
        stages = [i - 1 for i in self.out_indices if i]
        maps = [
            convnext_features.to_map(self.model, state)
            for state in self.model.run_stages(self.model.embed(pixel_values), stages)
        ]
        if self.out_indices[0] == 0:
            maps.insert(0, pixel_values)
        return BackboneOutput(tuple(maps), None)


def stages_of(stage_names: Sequence[str], indices: Sequence[int] | None, names: Sequence[str] | None) -> list[int]:
    """Ascending indices of the stages asked for by index or by name; without either, of the last."""
    count = len(stage_names)
    if indices is None and names is None:
        return [count - 1]
    for name in names or ():
        if name not in stage_names:
            raise ValueError(f"out_features has {name!r}: expected stem or stage1 to {stage_names[-1]}")
    for i in indices if indices is not None else ():
        if not -count <= i < count:
            raise ValueError(f"out_indices has {i}: expected stages from {-count} to {count - 1}, 0 the stem")
    by_index = sorted({int(i) % count for i in indices}) if indices is not None else None
    by_name = sorted({stage_names.index(name) for name in names}) if names is not None else None
    if by_index is not None and by_name is not None and by_index != by_name:
        raise ValueError(f"out_indices are {indices} and out_features {names}: expected the same stages, or only one")
    stages = by_index if by_index is not None else by_name
    if not stages:
        raise ValueError("out_indices and out_features name no stage: expected at least one")
    return stages


# What a config.json says of a backbone, and of which type each must be.
STAGES = {
    "out_indices": list,
    "out_features": list,
    "apply_layernorm": bool,
    "reshape_hidden_states": bool,
    "return_class_token": bool,
}


def _stages_of(path: Path) -> dict[str, Any]:
    """The constructor's options in the config.json of a checkpoint's folder. Raises ValueError if one is no such."""
    file = path / "config.json"
    content = read_json(file) if path.is_dir() and file.is_file() else {}
    if content.get("model_type") != MODEL_TYPE:
        return {}
    said = {name: content[name] for name in STAGES if content.get(name) is not None}
    for name, value in said.items():
        of = int if name == "out_indices" else str
        if not isinstance(value, STAGES[name]) or (isinstance(value, list) and not all(type(v) is of for v in value)):
            kind = f"a list of {of.__name__}" if STAGES[name] is list else "true or false"
            raise ValueError(f"{file}: {name} is {short(value)}: expected {kind}")
    return said


class FeatureInfo(NamedTuple):
    """What timm's decoders ask of `feature_info`: a list over the maps that the features hold."""

    entries: list[dict[str, Any]]

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [entry["num_chs"] for entry in self.entries]

    def reduction(self) -> list[int]:
        """Stride of each map: a ViT's patch size."""
        return [entry["reduction"] for entry in self.entries]

    def module_name(self) -> list[str]:
        """The block, or the ConvNeXt's stage, that gives each map."""
        return [entry["module"] for entry in self.entries]


class FeaturesOnly(nn.Module):
    """What timm's `create_model(..., features_only=True)` gives: (B, 3, H, W) -> a list of maps (B, C, h, w).

    model: a DINOv3ViT or a DINOv3ConvNeXt.
    out_indices: blocks (stages of a ConvNeXt), as n of `get_intermediate_layers`.
    norm: apply the final LayerNorm to a ViT's maps; timm's default is not to. A ConvNeXt's maps never get it.

    `feature_info` has `channels()`, `reduction()` and `module_name()`.
    """

    def __init__(
        self, model: DINOv3ViT | DINOv3ConvNeXt, out_indices: int | str | Sequence[int] = "quarters", norm: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.out_indices = model.block_indices(out_indices)
        self.norm = norm
        self.feature_info = FeatureInfo([model.feature_info[i] for i in self.out_indices])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of the blocks asked for, of normalised images (B, 3, H, W). Raises ValueError as the model does."""
        return self.model.forward_intermediates(x, self.out_indices, norm=self.norm, intermediates_only=True)
