"""The backbone as transformers' and timm's users hold it: thin wrappers with their names over the one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import convnext_features
from .checkpoint import Checkpoint
from .checkpoint.json_files import read_json
from .checkpoint.words import short
from .checks import check_dtype
from .convnext import DINOv3ConvNeXt
from .features import patches_and_prefix
from .model import DINOv3ViT
from .pretrained import Opening, open_source

if TYPE_CHECKING:
    from typing_extensions import Self


class BackboneOutput(NamedTuple):
    """What a backbone returns: one entry for each stage asked for, in ascending order."""

    feature_maps: tuple[Tensor, ...]
    """(B, C, h, w) each, or (B, h*w, C) of a ViT without `reshape_hidden_states`."""
    cls_tokens: tuple[Tensor, ...] | None
    """(B, C) each, or None without `return_class_token`."""

    @property
    def hidden_states(self) -> None:
        """Always None: transformers' decoders read this field and pass it on. Ask for stages by `out_indices`."""

    @property
    def attentions(self) -> None:
        """Always None, as `hidden_states`."""


class _Backbone(nn.Module):
    """What both classes of transformers have in common: stages by index or by name, of a model."""

    model_class: ClassVar[Any]
    options: ClassVar[tuple[str, ...]]
    """The constructor's, which config.json may tell of."""

    def __init__(
        self,
        model: Any,
        stem_channels: int,
        out_indices: Sequence[int] | None,
        out_features: Sequence[str] | None,
    ) -> None:
        super().__init__()
        if not isinstance(model.config, self.model_class.config_class):
            raise ValueError(f"model is a {type(model).__name__}: expected a {self.model_class.__name__}")
        self.model = model
        self.config = model.config
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, model.depth + 1))]
        self.num_features = [stem_channels, *model.embed_dims]
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
        **options: Any,
    ) -> Self:
        """Load a checkpoint, in evaluation mode, with the arguments of the model's own `from_pretrained`.

        options: those, and the constructor's options; of the latter, those not given are what the checkpoint's
            config.json says, as transformers' backbones save it.

        Raises what the model's `from_pretrained` and the constructor do, and ValueError for a config.json whose
        options are of another type.
        """
        check_dtype(dtype)
        given = {name: options.pop(name) for name in cls.options if name in options}
        opening: Any = {name: options.pop(name) for name in Opening.__annotations__ if name in options}
        opened = open_source(source, **opening)
        model = cls.model_class.from_checkpoint(opened, dtype=dtype, device=device, **options)
        said = _options_said(opened, cls.options)
        if {"out_indices", "out_features"} & given.keys():
            said = {name: value for name, value in said.items() if name not in ("out_indices", "out_features")}
        return cls(model, **{**said, **given}).eval()

    def forward_with_filtered_kwargs(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, output_attentions: bool | None = None
    ) -> BackboneOutput:
        """`forward`, by the name that transformers' decoders call (UperNet's, say).

        Raises ValueError as `forward` does, and if hidden states or attentions are asked for.
        """
        if output_hidden_states or output_attentions:
            raise ValueError("a backbone returns feature maps alone: name the stages that are wanted in out_indices")
        return self(pixel_values)


class DINOv3ViTBackbone(_Backbone):
    """Feature maps of chosen stages: the options and attributes of transformers' class of the same name.

    Stage 0 ("stem") is the embeddings, stage i ("stage{i}") the output of block i - 1. The last stage is always normed,
    the others where `apply_layernorm` is true. Nothing runs after the last stage asked for.

    Attributes: `out_indices`, `out_features` (names), `stage_names`, `channels` of the maps, `num_features` of all
    stages, `model`, `config`.
    """

    model_class = DINOv3ViT
    options = ("out_indices", "out_features", "apply_layernorm", "reshape_hidden_states", "return_class_token")

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

        Raises ValueError for a stage that the model does not have, for indices and names that disagree, and for a
        model of the other architecture.
        """
        super().__init__(model, model.embed_dim, out_indices, out_features)
        self.apply_layernorm = apply_layernorm
        self.reshape_hidden_states = reshape_hidden_states
        self.return_class_token = return_class_token

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


class DINOv3ConvNextBackbone(_Backbone):
    """Feature maps of chosen stages: the options and attributes of transformers' class of the same name.

    Stage 0 ("stem") is the images as given, stage i ("stage{i}") the map of the i-th stage before the final LayerNorm.
    Nothing runs after the last stage asked for.

    Attributes: `out_indices`, `out_features` (names), `stage_names`, `channels` of the maps, `num_features` of all
    stages, `model`, `config`.
    """

    model_class = DINOv3ConvNeXt
    options = ("out_indices", "out_features")

    def __init__(
        self,
        model: DINOv3ConvNeXt,
        *,
        out_indices: Sequence[int] | None = None,
        out_features: Sequence[str] | None = None,
    ) -> None:
        """Of the stages whose indices (negative: from the end) or names are given; without either, of the last.

        Raises ValueError for a stage that the model does not have, for indices and names that disagree, and for a
        model of the other architecture.
        """
        super().__init__(model, model.num_channels, out_indices, out_features)

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
    by_index = None if indices is None else sorted({_stage(i, count) for i in indices})
    by_name = sorted({stage_names.index(name) for name in names}) if names is not None else None
    if by_index is not None and by_name is not None and by_index != by_name:
        raise ValueError(f"out_indices are {indices} and out_features {names}: expected the same stages, or only one")
    stages = by_index if by_index is not None else by_name
    if not stages:
        raise ValueError("out_indices and out_features name no stage: expected at least one")
    return stages


def _stage(i: Any, count: int) -> int:
    try:
        return range(count)[i]
    except (IndexError, TypeError):
        raise ValueError(f"out_indices has {i!r}: expected stages from {-count} to {count - 1}, 0 the stem") from None


# Of which type each option is that a config.json says of a backbone.
TYPES = {
    "out_indices": list,
    "out_features": list,
    "apply_layernorm": bool,
    "reshape_hidden_states": bool,
    "return_class_token": bool,
}


def _options_said(opened: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
    """Those of the options that the config.json of a checkpoint's folder tells. Raises ValueError if one is no such."""
    file = opened.path / "config.json"
    content = read_json(file) if file.is_file() else {}
    if content.get("model_type") != opened.table.family.model_type:
        return {}
    said = {name: content[name] for name in names if content.get(name) is not None}
    for name, value in said.items():
        of = int if name == "out_indices" else str
        if not isinstance(value, TYPES[name]) or (isinstance(value, list) and not all(type(v) is of for v in value)):
            kind = f"a list of {of.__name__}" if TYPES[name] is list else "true or false"
            raise ValueError(f"{file}: {name} is {short(value)}: expected {kind}")
    return said


class FeatureInfo(list[dict[str, Any]]):
    """What timm's decoders ask of `feature_info`: a list of dictionaries, one for each map that the features hold."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [entry["num_chs"] for entry in self]

    def reduction(self) -> list[int]:
        """Stride of each map: a ViT's patch size."""
        return [entry["reduction"] for entry in self]

    def module_name(self) -> list[str]:
        """The block, or the ConvNeXt's stage, that gives each map."""
        return [entry["module"] for entry in self]


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
        self.out_indices = model.block_indices(out_indices, "out_indices")
        self.norm = norm
        self.feature_info = FeatureInfo([model.feature_info[i] for i in self.out_indices])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of the blocks asked for, of normalised images (B, 3, H, W). Raises ValueError as the model does."""
        return self.model.forward_intermediates(x, self.out_indices, norm=self.norm, intermediates_only=True)
