"""What compare.py measured, as text: a line a peer while it measures, a line a row for the pages."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from environment import processor
from peers import OPENVINO_BY_ITSELF
from timing import median_ratio, spread, uneven

Row = dict[str, Any]
Size = tuple[int, int]  # pixels, batch
OURS, PREPARED = "ours", "ours, prepacked"
FEW = 3  # calls; a median of fewer is marked
NOTES = (
    "† a quartile lies more than 15 % from the median: the machine was not quiet. ‡ fewer than "
    f"{FEW} calls, each of them long."
)


def identity(row: Row) -> tuple[str, int, int, str]:
    return row["variant"], row["pixels"], row["batch"], row["dtype"]


def label(row: Row) -> str:
    return f"{row['variant']}, {row['pixels']} px, batch {row['batch']}, {row['dtype']}"


def medians(row: Row) -> dict[str, float]:
    """Milliseconds of each peer."""
    return {name: 1e3 * statistics.median(seconds) for name, seconds in row.get("seconds", {}).items()}


def others(row: Row) -> list[str]:
    """The peers that are not ours and compute in the row's dtype."""
    return [name for name in row.get("seconds", {}) if not name.startswith(OURS) and name != OPENVINO_BY_ITSELF]


# ---- while it is measured


def table(result: dict[str, Any]) -> str:
    """A line a row and peer."""
    head = ["", "ms (quartiles)", "time, ratio to ours", "error", "of the matrix-product peak", "peak MiB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        seconds, found = row.get("seconds", {}), medians(row)
        for name in dict.fromkeys([*seconds, *row.get("peak MiB", {})]):
            cells = ["", "", "", ""]
            if name in seconds:
                ratio = f"{median_ratio(seconds[name], seconds[OURS]):.2f}" if OURS in seconds else ""
                share = f"{1e3 * row['gflop'] / found[name] / row['peak GFLOP/s']:.0%}"
                cells = [spread(seconds[name]), ratio, error_of([row], name), share]
            lines.append(f"| {label(row)}: {name} | {' | '.join([*cells, peak_of(row, name)])} |")
    return "\n".join(lines)


def absent(rows: Iterable[Row]) -> str:
    """A line for each row's peer that could not be run, with the reason: for whoever measures, not for the page."""
    return "\n".join(f"{label(row)}: {name}: {why}" for row in rows for name, why in row["missing"].items())


def warnings(rows: Iterable[Row]) -> str:
    """A line for each row in which a quartile lies far from the median."""
    lines = []
    for row in rows:
        names = [name for name, seconds in row.get("seconds", {}).items() if uneven(seconds)]
        if names:
            lines.append(f"warning: {label(row)}: a quartile is far from the median, measure again: {'; '.join(names)}")
    return "\n".join(lines)


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The time of each row and peer that both results have, new to old."""
    lines = ["| | old ms | new ms | new / old |", "|---" * 4 + "|"]
    rows = {identity(row): medians(row) for row in old["rows"]}
    for row in new["rows"]:
        before = rows.get(identity(row), {})
        for name, ms in medians(row).items():
            if name in before:
                lines.append(f"| {label(row)}: {name} | {before[name]:.1f} | {ms:.1f} | {ms / before[name]:.2f} |")
    return "\n".join(lines)


# ---- on a page


def time_table(result: dict[str, Any]) -> str:
    """A line a variant, dtype and peer, a column a size: milliseconds and their ratio to ours; and the worst error."""
    rows, sizes = result["rows"], sizes_of(result)
    lines = [
        f"| | {' | '.join(f'{pixels} px, batch {batch}: ms (ratio)' for pixels, batch in sizes)} | error |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for variant, dtype, found in by_model(rows):
        for name in dict.fromkeys(name for row in found.values() for name in row.get("seconds", {})):
            cells = [time_of(found[size], name) if size in found else "" for size in sizes]
            cells.append(error_of(found.values(), name))
            lines.append(f"| {variant}, {dtype}: {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{NOTES}"


def memory_table(result: dict[str, Any]) -> str:
    """A line a variant, dtype and peer, a column a size: the peak in MiB."""
    rows, sizes = [row for row in result["rows"] if row.get("peak MiB")], sizes_of(result)
    lines = [
        f"| | {' | '.join(f'{pixels} px, batch {batch}' for pixels, batch in sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for variant, dtype, found in by_model(rows):
        for name in dict.fromkeys(name for row in found.values() for name in row["peak MiB"]):
            cells = [peak_of(found[size], name) if size in found else "" for size in sizes]
            lines.append(f"| {variant}, {dtype}: {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sides_table(results: list[dict[str, Any]]) -> str:
    """A line a row, processors side by side: ours as loaded and prepared, and the fastest of the others."""
    heads = [f"{processor(result)}: ours as loaded, prepared | fastest other" for result in results]
    lines = [f"| ms | {' | '.join(heads)} |", "|---" * (2 * len(results) + 1) + "|"]
    rows = [{identity(row): row for row in result["rows"]} for result in results]
    for key in sorted({key for found in rows for key in found}, key=order):
        cells = []
        for found in rows:
            ms = medians(found.get(key, {}))
            mine = [f"{ms[name]:.0f}" for name in (OURS, PREPARED) if name in ms]
            best = min(others(found.get(key, {})), key=ms.__getitem__, default=None)
            cells += [", ".join(mine), f"{ms[best]:.0f} {best}" if best else ""]
        variant, pixels, batch, dtype = key
        lines.append(f"| {variant}, {dtype}, {pixels} px, batch {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def standing_table(results: list[dict[str, Any]]) -> str:
    """How many times as fast as each contender ours is, from the worst row to the best."""
    names = ("transformers, sdpa", "transformers, compiled", "timm", "onnxruntime", "OpenVINO")
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for result in results:
        for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
            for ours, way in ((OURS, "as loaded"), (PREPARED, "prepared")):
                cells = []
                for other in names:
                    rows = [row["seconds"] for row in result["rows"] if row["dtype"] == dtype and "seconds" in row]
                    ratios = sorted(median_ratio(r[other], r[ours]) for r in rows if {ours, other} <= r.keys())
                    cells.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else "")
                lines.append(f"| {processor(result)}, {dtype}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_model(rows: list[Row]) -> Iterator[tuple[str, str, dict[Size, Row]]]:
    """Variant, dtype, and their rows by size."""
    for model in dict.fromkeys((row["variant"], row["dtype"]) for row in rows):
        same = [row for row in rows if (row["variant"], row["dtype"]) == model]
        yield *model, {(row["pixels"], row["batch"]): row for row in same}


def sizes_of(result: dict[str, Any]) -> list[Size]:
    return list(dict.fromkeys((row["pixels"], row["batch"]) for row in result["rows"]))


def order(key: tuple[str, int, int, str]) -> tuple[str, str, int, int]:
    """By dtype, float32 first, then by variant as the family grows, then by the work of a row."""
    variant, pixels, batch, dtype = key
    grown = ["vits16", "vits16plus", "vitb16", "vitl16", "vitl16plus", "vith16plus", "vit7b16"]
    place = f"{grown.index(variant):02}" if variant in grown else variant
    return "" if dtype == "float32" else dtype, place, pixels**2 * batch, pixels


def time_of(row: Row, name: str) -> str:
    """Milliseconds, and what is to be known of them: `287 (0.95) †`."""
    seconds = row.get("seconds", {}).get(name)
    if not seconds:
        return ""
    mine = row["seconds"].get(OURS)
    ms = medians(row)[name]
    text = f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}"
    text += f" ({median_ratio(seconds, mine):.2f})" if mine else ""
    return text + (" †" if uneven(seconds) else "") + (" ‡" if len(seconds) < FEW else "")


def error_of(rows: Iterable[Row], name: str) -> str:
    """The worst error in these rows, relative to float64's features."""
    errors = [row["error"][name] for row in rows if name in row.get("error", {})]
    return f"{max(errors):.1e}" if errors else ""


def peak_of(row: Row, name: str) -> str:
    return f"{row['peak MiB'][name]:.0f}" if name in row.get("peak MiB", {}) else ""
