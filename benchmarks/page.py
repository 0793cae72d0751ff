"""Write every table and chart that the pages show, from the committed results: one command, after any measurement.

    python benchmarks/page.py [--check]

A page holds pairs of marks, `<!-- table NAME -->` and `<!-- end -->`; what stands between them is made here, by the
function of that name in TABLES. Charts are drawn anew when what they show has been measured anew. `--check` writes
nothing, and exits with 1 if a page or a chart is not what the results say.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_ways
import bounds
import compare_tables
import conversion
import extract
import extract_bad_files
import extract_kills
import extract_memory
import extract_pixels
import features
import fit_speed
import golden_measures
import growth
import models
import parity
import prepared
import segmentation
import sharding
import soak
import startup
import steps
import training_memory
from environment import RESULTS, headline, processor

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Result = dict[str, Any]
Key = tuple[str, int, int, str]  # which row of a comparison: variant, pixels, batch, dtype
FRONT_ROW = ("vitb16", 224, 1, "float32")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is out of date")
    check = parser.parse_args().check
    stale = [page for page in pages() if filled(page) != page.read_text(encoding="utf-8")]
    stale_charts = [name for name in CHARTS if drawn_from(IMAGES / f"{name}.png") != digest(CHARTS[name])]
    for page in stale:
        print(page.relative_to(ROOT))
        if not check:
            page.write_text(filled(page), encoding="utf-8")
    for name in stale_charts:
        print((IMAGES / f"{name}.png").relative_to(ROOT))
        if not check:
            draw(name)
    return 1 if check and (stale or stale_charts) else 0


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: Path) -> str:
    """The page with every marked part made anew."""
    return MARKED.sub(lambda part: f"{part[1]}{TABLES[part[2]]()}\n{part[3]}", page.read_text(encoding="utf-8"))


def result(name: str) -> Result:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# ---- tables


def of(name: str, table: Callable[[Result], str]) -> Callable[[], str]:
    """A result's table with the line that says where it was measured."""

    def filling() -> str:
        if not (RESULTS / f"{name}.json").exists():
            return "Not measured yet."
        return f"{table(result(name))}\n\nMeasured on {headline(result(name))}."

    return filling


def front(words: dict[str, str]) -> str:
    """The front page's six rows: what somebody who has to choose wants to know, losses included."""
    lines = [f"| | dinov3-lite | {words['beside']} |", "|---|---|---|"]
    for dtype in ("float32", "bfloat16"):
        errors = [row for row in result("parity")["rows"] if (row["variant"], row["dtype"]) == ("vitb16", dtype)]
        ours, theirs = (max(row[who] for row in errors) for who in ("ours", "transformers"))
        lines.append(f"| {words['error'].format(dtype=dtype)} | {ours:.2e} | transformers: {theirs:.2e} |")
    runs = result("startup")["runs"]
    ours, theirs = (
        1e3 * statistics.median(r["total"] for r in runs[who]) for who in ("ours, converted file", "transformers")
    )
    lines.append(f"| {words['startup']} | {ours:.0f} ms | transformers: {theirs:.0f} ms |")
    layers = result("features")["layers"]["first half: blocks 2, 5"]
    cells = [
        f"{1e3 * statistics.median(layers[w]['seconds']):.0f} ms, {layers[w]['peak MiB']:.0f} MiB"
        for w in ("ours", "timm")
    ]
    lines.append(f"| {words['layers']} | {cells[0]} | timm: {cells[1]} |")
    for measured in processors():
        row = find(measured, FRONT_ROW)
        ms = compare_tables.medians(row)
        other = min(compare_tables.others(row), key=ms.__getitem__)
        label = words["forward"].format(processor=processor(measured))
        ours = words["prepared"].format(loaded=ms[compare_tables.OURS], prepared=ms[compare_tables.PREPARED])
        lines.append(f"| {label} | {ours} | {other}: {ms[other]:.0f} ms |")
    return "\n".join(lines)


def processors() -> list[Result]:
    """A result of compare.py for each kind of processor."""
    return [result("compare"), result("compare_amd")]


def find(measured: Result, key: Key) -> Result:
    return next(row for row in measured["rows"] if compare_tables.identity(row) == key)


ENGLISH = {
    "beside": "beside it",
    "error": "Worst error of a ViT-B's hidden states against float64, {dtype}",
    "startup": "From a new process to the first features of a ViT-B",
    "layers": "Maps of blocks 2 and 5 of a ViT-B, four images",
    "forward": "ViT-B, 224 px, one image, float32, {processor}",
    "prepared": "{prepared:.0f} ms prepared, {loaded:.0f} ms as loaded",
}
CHINESE = {
    "beside": "对照",
    "error": "ViT-B 各层 hidden state 相对 float64 的最大误差，{dtype}",
    "startup": "从新进程到得到 ViT-B 的第一份特征",
    "layers": "ViT-B 第 2、5 块的特征图，4 张图片",
    "forward": "ViT-B，224 px，单张图片，float32，{processor}",
    "prepared": "优化后 {prepared:.0f} ms，加载后直接运行 {loaded:.0f} ms",
}

TABLES: dict[str, Callable[[], str]] = {
    "front": lambda: front(ENGLISH),
    "front-zh": lambda: front(CHINESE),
    "parity": of("parity", lambda found: parity.table(found["rows"])),
    "faces": of("parity", lambda found: parity.faces_table(found["faces"])),
    "standing": lambda: compare_tables.standing_table(processors()),
    "sides": lambda: compare_tables.sides_table(processors()),
    "compare": of("compare", compare_tables.time_table),
    "compare-memory": of("compare", compare_tables.memory_table),
    "compare-amd": of("compare_amd", compare_tables.time_table),
    "compare-amd-memory": of("compare_amd", compare_tables.memory_table),
    "compare-amd-mkl": of("compare_amd_mkl", compare_tables.time_table),
    "compare-convnext": of("compare_convnext", compare_tables.time_table),
    "compare-convnext-memory": of("compare_convnext", compare_tables.memory_table),
    "extract": of("extract", extract.table),
    "extract-bfloat16": of("extract_bfloat16", extract.table),
    "extract-workers": of("extract_workers", extract.workers_table),
    "extract-kills": of("extract_kills", extract_kills.table),
    "extract-bad-files": of("extract_bad_files", extract_bad_files.table),
    "extract-memory": of("extract_memory", extract_memory.table),
    "extract-pixels": of("extract_pixels", extract_pixels.table),
    "segmentation": of("segmentation", segmentation.table),
    "fit-speed": of("fit_speed", fit_speed.table),
    "golden-measures": of("golden_measures", golden_measures.table),
    "layers": of("features", lambda found: features.tables(found)["layers"]),
    "packed": of("features", lambda found: features.tables(found)["packed"]),
    "windows": of("features", lambda found: features.tables(found)["windows"]),
    "growth": of("growth", growth.table),
    "startup": of("startup", startup.table),
    "startup-reference": of("startup_reference", startup.compared),
    "conversion": of("conversion", conversion.table),
    "training-memory": of("training_memory", training_memory.table),
    "sharding": of("sharding", sharding.table),
    "sharding-sparse": of("sharding", sharding.sparse_table),
    "steps": of("steps", steps.table),
    "prepared": of("prepared", prepared.table),
    "prepared-amd": of("prepared_amd", prepared.table),
    "bounds": of("bounds", bounds.table),
    "bounds-amd": of("bounds_amd", bounds.table),
    "attention-ways-amd": of("attention_ways_amd", attention_ways.table),
    "soak": of("soak", soak.table),
    "soak-inductor": of("soak_inductor", soak.table),
    "models-variants": models.variants_table,
    "models-convnexts": models.convnexts_table,
    "models-forward": of("models", models.forward_table),
    "models-training": of("models", models.training_table),
    "models-choice": lambda: models.choice_table(result("models")),
}

# ---- charts

IMAGES = ROOT / "docs" / "images"
Panel = tuple[str, Key]  # a result, and which of its rows
FLOAT32_ROWS = [("vitb16", pixels, batch, "float32") for pixels, batch in ((224, 1), (512, 1), (224, 8))]
CHARTS: dict[str, list[list[Panel]]] = {
    "results": [[("compare", FRONT_ROW), ("compare_amd", FRONT_ROW)]],
    "compare": [[(name, row) for row in FLOAT32_ROWS] for name in ("compare", "compare_amd")],
    "compare-bfloat16": [
        [(name, ("vitb16", pixels, 1, "bfloat16")) for pixels in (224, 512)] for name in ("compare", "compare_amd")
    ],
}


def digest(panels: list[list[Panel]]) -> str:
    """Of what a chart shows: which rows, and all that was measured in them."""
    rows = [[(result(name), key) for name, key in line] for line in panels]
    shown = [[(found["environment"]["machine"], find(found, key)) for found, key in line] for line in rows]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def drawn_from(file: Path) -> str | None:
    """The digest of what a chart was drawn from, which its file holds."""
    found = re.search(rb"Results\0([0-9a-f]{64})", file.read_bytes()) if file.exists() else None
    return found[1].decode() if found else None


def draw(name: str) -> None:
    """Bars of median times, ours in red."""
    import matplotlib.pyplot as plt

    panels = CHARTS[name]
    shape, bars = (len(panels), len(panels[0])), max(len(find(result(of), key)["seconds"]) for of, key in panels[0])
    size = (4.1 * shape[1], (0.3 * bars + 1.1) * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for line, places in zip(panels, axes, strict=True):
        for (of, key), axis in zip(line, places, strict=True):
            row = find(result(of), key)
            medians = compare_tables.medians(row)
            shown = list(medians)[::-1]
            colours = ["#c44e52" if who.startswith("ours") else "#8c8c8c" for who in shown]
            axis.barh(shown, [medians[who] for who in shown], color=colours)
            axis.bar_label(axis.containers[0], fmt="%.0f", padding=3)
            axis.set_title(f"{compare_tables.label(row)}\n{processor(result(of))}", fontsize=10)
            axis.set_xlabel("ms, median: shorter is better")
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
            if shown == [label.get_text() for label in places[0].get_yticklabels()] and axis is not places[0]:
                axis.set_yticklabels([])
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=100, metadata={"Results": digest(panels)})


if __name__ == "__main__":
    sys.exit(main())
