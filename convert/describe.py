"""What is said of checkpoints and plans, as values that --json prints and as text for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dinov3_lite.checkpoint import Checkpoint
from dinov3_lite.checkpoint.words import short
from dinov3_lite.image import satellite_warning
from dinov3_lite.rope import rope_periods

from .plan import Plan


def describe(plan: Plan) -> dict[str, Any]:
    """`--inspect`: all that can be said of the plan's source without running it, and what `--to` would lose of it."""
    opened = plan.source
    processing = opened.card.preprocessing or {}
    warnings = []
    mean = processing.get("image_mean")
    if warning := satellite_warning(opened.path, mean or ()):
        warnings.append(warning)
    not_finite = [
        name for name, spans in opened.spans.items() if not all(span.load().isfinite().all() for span in spans)
    ]
    if not_finite:
        warnings.append(f"NaN or infinity in {len(not_finite)} tensors, first {not_finite[0]!r}")
    return {
        "path": str(opened.path),
        "layout": opened.layout.name,
        "source_layout": opened.card.source_layout or opened.layout.name,
        "variant": opened.config.name,
        "weights": opened.weights_id,
        **describe_size(opened),
        "rope": rope(opened),
        "image_size": processing.get("size"),
        "image_mean": processing.get("image_mean"),
        "image_std": processing.get("image_std"),
        "license": opened.card.license or None,
        "left_out": grouped(opened.left_out),
        "to": plan.layout.name,
        "lost": list(plan.lost.values()),
        "warnings": warnings,
        "config": opened.config.to_dict(),
    }


def describe_as_text(description: dict[str, Any]) -> str:
    """The description of a source for people."""
    files = description["files"]
    shown = {
        "variant": description["variant"],
        "layout": description["layout"],
        "weights": description["weights"],
        "parameters": f"{description['parameters']:,}",
        "dtype": description["dtype"],
        "size": f"{description['bytes'] / 1e6:.1f} MB in {files} file{'s' * (files != 1)}",
        "RoPE": description["rope"] or "none: no attention",
        "images": f"size {description['image_size']}, mean {description['image_mean']}, std {description['image_std']}"
        if description["image_mean"]
        else "no preprocessing with it",
        "licence": description["license"] or "not said",
    }
    if description["source_layout"] != description["layout"]:
        shown["made from"] = description["source_layout"]
    lines = [description["path"]] + [f"  {key:<11}{value}" for key, value in shown.items()]
    lines += [f"  left out   {item}" for item in description["left_out"]]
    lines += [f"  --to {description['to']} loses {item}" for item in description["lost"]]
    lines += [f"  WARNING    {item}" for item in description["warnings"]]
    return "\n".join(lines)


def describe_plan(plan: Plan) -> dict[str, Any]:
    """`--dry-run`: what would be written where, and what of the source would not be in it."""
    return {
        "source": str(plan.source.path),
        "weights": plan.source.weights_id,
        "to": plan.layout.name,
        "dtype": str(plan.dtype or plan.source.dtype).removeprefix("torch."),
        "path": str(plan.path),
        "bytes": plan.nbytes,
        "files": [
            {"path": str(plan.folder / name), "bytes": plan.weights[path].nbytes if path in plan.weights else None}
            for name in plan.files
            for path in [plan.folder / name]
        ]
        + [{"path": str(target), "bytes": file.stat().st_size} for file, target in plan.licenses.items()],
        "removed": [str(path) for path in plan.obsolete],
        "lost": list(plan.lost.values()),
        "left_out": grouped(plan.left_out),
    }


def plan_as_text(plan: dict[str, Any]) -> str:
    """The description of a plan for people."""
    lines = [f"{plan['weights']} -> {plan['to']} {plan['dtype']}  {plan['bytes'] / 1e6:.1f} MB of tensors"]
    for file in plan["files"]:
        size = "" if file["bytes"] is None else f"  {file['bytes'] / 1e6:.1f} MB"
        lines.append(f"  would write {file['path']}{size}")
    lines += [f"  would remove {path}" for path in plan["removed"]]
    lines += [f"  would lose {item}" for item in plan["lost"]]
    lines += [f"  would leave out {item}" for item in plan["left_out"]]
    return "\n".join(lines)


def summary(plan: Plan, written: Checkpoint, seconds: float) -> dict[str, Any]:
    """What a conversion did."""
    return {
        "variant": written.config.name,
        **describe_size(written),
        "seconds": round(seconds, 3),
        "source": str(plan.source.path),
        "source_weights": plan.source.weights_id,
        "weights": written.weights_id,
        "path": str(written.path),
        "lost": list(plan.lost.values()),
        "left_out": grouped(plan.left_out),
    }


def summary_as_text(done: dict[str, Any]) -> str:
    """One line: variant, parameters, dtype, bytes, seconds, what became what, and where; then what was left out."""
    line = (
        f"{done['variant']}  {done['parameters'] / 1e6:.1f} M parameters  {done['dtype']}  "
        f"{done['bytes'] / 1e6:.1f} MB  {done['seconds']:.2f} s  "
        f"{done['source_weights']} -> {done['weights']}  {done['path']}"
    )
    verified = f"  {done['verified']}" if "verified" in done else ""
    return "\n".join([line + verified, *(f"  left out {item}" for item in done["left_out"])])


def grouped(left_out: dict[str, str]) -> list[str]:
    """What was left out: a line for each beginning of names, with the reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in left_out.items():
        first, dot, _ = name.partition(".")
        groups.setdefault((first + dot, reason), []).append(name)
    return [
        f"{short(names[0])} ({reason})" if len(names) == 1 else f"{len(names)} tensors of {short(first)} ({reason})"
        for (first, reason), names in groups.items()
    ]


def rope(opened: Checkpoint) -> str | None:
    """Whether the RoPE periods are those the config gives, those rounded to bfloat16 as Meta's files are, or others."""
    if not opened.rope:
        return None
    periods, computed = opened.tensor("rope_embed.periods").float(), rope_periods(opened.config)
    if torch.allclose(periods, computed, rtol=1e-6, atol=0):
        return "computed from the config" if opened.rope == "computed" else "stored, equal to the computed ones"
    if torch.equal(periods, computed.bfloat16().float()):
        return "stored, rounded to bfloat16"
    return "stored, others than the config gives"


def describe_size(opened: Checkpoint) -> dict[str, Any]:
    """Parameters, dtype, bytes and files."""
    files = {span.stored.file for spans in opened.spans.values() for span in spans} - {Path()}
    sizes = {name: sum(span.size for span in spans) for name, spans in opened.spans.items()}
    dtypes = dict.fromkeys(stored.dtype for stored in (opened.first, *opened.of_other_dtypes()))
    return {
        "parameters": sum(size for name, size in sizes.items() if name != "rope_embed.periods"),
        "dtype": ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
    }
