"""What is going to be written: the tensors of each output file in order, each with the stored pieces it is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dinov3_lite.config import VARIANTS
from dinov3_lite.files import Shape, StoredTensor
from dinov3_lite.hub import TIMM_SIZES
from dinov3_lite.image import ImageProcessor
from dinov3_lite.layouts import LITE, META, TIMM, TRANSFORMERS, Layout, kind, numel
from dinov3_lite.weights import CARRIED, LITE_VERSION, NOTE_KEY, Checkpoint, Piece, cast, recut, storage_dtype


@dataclass(frozen=True)
class Entry:
    """One tensor of the output: its bytes are those of its pieces, one after the other."""

    name: str
    dtype: torch.dtype
    shape: Shape
    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        return numel(self.shape) * self.dtype.itemsize

    def cast(self, piece: Piece) -> Tensor:
        """One of the pieces in the output's dtype, flat."""
        return cast(piece.load().reshape(-1), self.name, self.dtype)


def make_entries(opened: Checkpoint, layout: Layout, dtype: torch.dtype | None) -> list[Entry]:
    """The tensors of a checkpoint in another layout, in `dtype` or the source's own."""
    config, weights_dtype = opened.config, dtype or opened.dtype
    entries = []
    for equation in layout.equations(config):
        first = equation.ours[0][0]
        pieces = [piece for ours, shape in equation.ours for piece in opened.pieces.get(ours) or zeros(ours, shape)]
        runs = recut(pieces, [numel(shape) for _, shape in equation.theirs])
        # lite alone widens what float16 is too narrow for: readers of the others expect one dtype
        widened = layout is LITE or first == "rope_embed.periods"
        target = storage_dtype(first, weights_dtype) if widened else weights_dtype
        entries += [Entry(name, target, shape, run) for (name, shape), run in zip(equation.theirs, runs, strict=True)]
    for name, tensor in layout.masks(config).items():
        entries.append(Entry(name, weights_dtype, tuple(tensor.shape), in_memory(name, tensor)))
    carried = carried_tensors(opened, layout)
    for name, stored in carried.items():
        entries.append(Entry(name, dtype or stored.dtype, stored.shape, [Piece(stored, 0, numel(stored.shape))]))
    if layout is META and config.hidden_size == 4096:
        # Meta's 7B also norms local crops' CLS tokens apart, in pretraining only; its strict loader wants the tensors
        for part in ("weight", "bias"):
            if (name := f"local_cls_norm.{part}") not in carried:
                entries.append(Entry(name, weights_dtype, (config.hidden_size,), opened.pieces[f"norm.{part}"]))
    return entries


def carried_tensors(opened: Checkpoint, layout: Layout) -> dict[str, StoredTensor]:
    """What is not the model's and is written all the same: our own file keeps all of it, a layout what is its own."""
    if layout is LITE:
        return {CARRIED + name: stored for name, stored in opened.carried.items()}
    return {name: stored for name, stored in opened.carried.items() if name in layout.carried}


def zeros(name: str, shape: Shape) -> list[Piece]:
    """What stands for a bias that the config lacks."""
    return in_memory(name, torch.zeros(shape, device="cpu"))


def in_memory(name: str, tensor: Tensor) -> list[Piece]:
    """A tensor that no file holds."""
    stored = StoredTensor.in_memory(name, lambda: tensor, tuple(tensor.shape), tensor.dtype)
    return [Piece(stored, 0, tensor.numel())]


def losses(opened: Checkpoint, layout: Layout) -> list[str]:
    """What the layout can't hold of this checkpoint: values that its readers would take for others."""
    lost: dict[str, list[str]] = {}
    for name in opened.pieces:
        assumed = layout.assumed.get(kind(name))
        if assumed and not torch.equal(opened.tensor(name).float(), assumed.make(opened.config)):
            lost.setdefault(assumed.reason, []).append(name)
    return [
        f"{names[0]!r}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {reason}"
        for reason, names in lost.items()
    ]


def lite_metadata(opened: Checkpoint, dtype: torch.dtype | None) -> dict[str, str]:
    """What our own file says of itself."""
    source = opened.metadata  # of a file that was converted before
    metadata = {
        "format": "pt",
        "dinov3_lite": LITE_VERSION,
        "config": json.dumps(opened.config.to_dict()),
        "source_layout": source.get("source_layout", opened.layout.name),
        "source_digest": source.get("source_digest", opened.digest()),
        "digest": opened.digest(dtype or opened.dtype),
        "rope": opened.rope,
    }
    if opened.preprocessing is not None:
        metadata["preprocessing"] = json.dumps(opened.preprocessing)
    if opened.license:
        metadata["license"] = opened.license
    if opened.note:
        metadata["note"] = opened.note
    return metadata


def side_files(opened: Checkpoint, layout: Layout) -> dict[str, dict[str, Any]]:
    """The JSON files that a layout keeps beside its weights."""
    if layout is TRANSFORMERS:
        note = {NOTE_KEY: opened.note} if opened.note else {}
        files = {"config.json": {**opened.config.to_dict(), **note}}
        if opened.preprocessing is not None:
            files["preprocessor_config.json"] = opened.preprocessing
        return files
    if layout is TIMM:
        return {"config.json": timm_config(opened)}
    return {}


def timm_config(opened: Checkpoint) -> dict[str, Any]:
    """The config.json of timm: the name of its model, where it has one with these tensors, and its image statistics."""
    config = opened.config
    size = TIMM_SIZES.get(variant_ignoring_biases(opened))
    result: dict[str, Any] = {"num_classes": 0, "num_features": config.hidden_size}
    if size:
        result["architecture"] = f"vit_{size}_patch16_dinov3" + ("_qkvb" if config.query_bias and size != "7b" else "")
    try:
        images = ImageProcessor.from_dict(opened.preprocessing or {"size": None})
    except ValueError:
        return result  # no preprocessing, or none that this library can tell
    if images.size:
        result["pretrained_cfg"] = {
            "input_size": [config.num_channels, *images.size],
            "mean": list(images.mean),
            "std": list(images.std),
            "interpolation": "bilinear",
        }
    return result


def variant_ignoring_biases(opened: Checkpoint) -> str:
    """The released variant of these sizes, with or without query and value biases."""
    bias = opened.config.hidden_size != VARIANTS["vit7b16"].hidden_size
    return replace(opened.config, query_bias=bias, value_bias=bias, key_bias=False).name


# The name that Meta's hub code expects, up to the eight digits of its own file's hash: a ViT-L without them is refused.
_META_HASHES = {
    "vits16": "08c60483", "vits16plus": "4057cbaa", "vitb16": "73cec8be", "vitl16": "8aa4cbdd",
    "vitl16plus": "46503df0", "vith16plus": "7c1da9a5", "vit7b16": "a955f4ea",
}  # fmt: skip


def output_name(opened: Checkpoint, layout: Layout) -> str:
    """The file that a layout's readers look for."""
    if layout is LITE:
        return "dinov3_lite.safetensors"
    if layout is META:
        name = variant_ignoring_biases(opened)
        if name == "vitl16" and "local_cls_norm.weight" in opened.carried:
            return "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"  # the ViT-L that Meta's hub code gives that norm
        return f"dinov3_{name}_pretrain-{_META_HASHES[name]}.pth" if name in _META_HASHES else f"dinov3_{name}.pth"
    return "model.safetensors"
