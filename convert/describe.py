"""`--inspect`: what is this file? For people, and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dinov3_lite.image import IMAGENET_MEAN
from dinov3_lite.rope import rope_periods
from dinov3_lite.weights import Checkpoint


def describe(opened: Checkpoint) -> dict[str, Any]:
    """All that can be said of a checkpoint without running it."""
    processing = opened.preprocessing or {}
    warnings = []
    mean = processing.get("image_mean")
    if "sat493m" in str(opened.path.resolve()) and mean in (IMAGENET_MEAN, list(IMAGENET_MEAN)):
        warnings.append("a satellite model with ImageNet's image statistics: expected mean 0.430, 0.411, 0.296")
    not_finite = [
        name for name, pieces in opened.pieces.items() if not all(piece.load().isfinite().all() for piece in pieces)
    ]
    if not_finite:
        warnings.append(f"NaN or infinity in {len(not_finite)} tensors, first {not_finite[0]!r}")
    return {
        "path": str(opened.path),
        "layout": opened.layout.name,
        "source_layout": opened.metadata.get("source_layout", opened.layout.name),
        "variant": opened.config.name,
        "weights": opened.weights_id,
        **describe_size(opened),
        "rope": rope(opened),
        "image_size": processing.get("size"),
        "image_mean": processing.get("image_mean"),
        "image_std": processing.get("image_std"),
        "license": opened.license or None,
        "left_out": opened.left_out,
        "warnings": warnings,
        "config": opened.config.to_dict(),
    }


def rope(opened: Checkpoint) -> str:
    """Whether the RoPE periods are those the config gives, those rounded to bfloat16 as Meta's files are, or others."""
    periods, computed = opened.tensor("rope_embed.periods").float(), rope_periods(opened.config)
    if torch.allclose(periods, computed, rtol=1e-6, atol=0):
        return "computed from the config" if opened.rope == "computed" else "stored, equal to the computed ones"
    if torch.equal(periods, computed.bfloat16().float()):
        return "stored, rounded to bfloat16"
    return "stored, others than the config gives"


def as_text(description: dict[str, Any]) -> str:
    """The description for people."""
    shown = {
        "variant": description["variant"],
        "layout": description["layout"],
        "weights": description["weights"],
        "parameters": f"{description['parameters']:,}",
        "dtype": description["dtype"],
        "size": f"{description['bytes'] / 1e6:.1f} MB in {description['files']} file(s)",
        "RoPE": description["rope"],
        "images": f"size {description['image_size']}, mean {description['image_mean']}, std {description['image_std']}"
        if description["image_mean"]
        else "no preprocessing with it",
        "licence": description["license"] or "not said",
    }
    if description["source_layout"] != description["layout"]:
        shown["made from"] = description["source_layout"]
    lines = [description["path"]] + [f"  {key:<11}{value}" for key, value in shown.items()]
    lines += [f"  left out   {item}" for item in description["left_out"]]
    lines += [f"  WARNING    {item}" for item in description["warnings"]]
    return "\n".join(lines)


def summary(source: Checkpoint, written: Checkpoint, seconds: float) -> str:
    """One line on a conversion: variant, parameters, dtype, bytes, seconds, what became what, and where."""
    d = describe_size(written)
    return (
        f"{written.config.name}  {d['parameters'] / 1e6:.1f} M parameters  {d['dtype']}  {d['bytes'] / 1e6:.1f} MB  "
        f"{seconds:.2f} s  {source.weights_id} -> {written.weights_id}  {written.path}"
    )


def describe_size(opened: Checkpoint) -> dict[str, Any]:
    """Parameters, dtype, bytes and files."""
    files = {piece.stored.file for pieces in opened.pieces.values() for piece in pieces} - {Path()}
    sizes = {name: sum(piece.stop - piece.start for piece in pieces) for name, pieces in opened.pieces.items()}
    return {
        "parameters": sum(size for name, size in sizes.items() if name != "rope_embed.periods"),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
    }
