"""Does memory stay flat: the peak of an `extract` over 1,000 to 100,000 small pictures, and of a plan of 10^7 paths.

    python benchmarks/extract_memory.py [--counts 1000 10000 100000] [--paths 10000000]

A model of two blocks on pictures of 32 px, CLS tokens alone and with patch tokens, each count in a process of its own.
The paths are made up: a list is planned and nothing is read. Writes benchmarks/results/extract_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import environment, headline, save
from extract_kills import write_input
from timing import in_a_child, process_mib

OUTPUTS = {"cls_token": ["cls_token"], "patch_tokens": ["cls_token", "patch_tokens"]}
DISTINCT = 100  # files; the others are links to them


def extract_peak(root: Path, count: int, outputs: list[str]) -> dict[str, float]:
    """MiB at the end of loading, and the peak after `count` pictures."""
    from dinov3_lite.extraction.engines import extract

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        store = extract(
            root / str(count), root / "model", output, outputs=outputs, decode_threads=1, device="cpu", progress=False
        )
        return {"rows": len(store), "peak_mib": process_mib("VmHWM"), "seconds": time.perf_counter() - start}


def plan_peak(count: int) -> dict[str, float]:
    """Peak MiB, and seconds, of planning so many paths."""
    from dinov3_lite.extraction.folder import Folder
    from dinov3_lite.extraction.plan import Plan, write_plan
    from dinov3_lite.extraction.sources import Source

    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/list.txt", "w") as file:
            for i in range(count):
                file.write(f"/data/pictures/{i // 1000:06d}/photograph_{i:010d}.jpg\n")
        before, start = process_mib("VmHWM"), time.perf_counter()
        write_plan(Folder(folder), [Source("list", f"{folder}/list.txt", "")], 4096, None, {})
        seconds, plan = time.perf_counter() - start, Plan(Folder(folder))
        last = list(plan.items(plan[len(plan) - 1]))
        assert last[-1].endswith(f"{count - 1:010d}.jpg")
        return {"seconds": seconds, "mib_before": before, "peak_mib": process_mib("VmHWM"), "shards": len(plan)}


def write_links(root: Path, count: int) -> None:
    files = sorted((root / "in").iterdir())
    for i in range(count):
        link = root / str(count) / f"{i // 1000:04d}" / f"{i:07d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[i % len(files)], link)


def table(result: dict[str, Any]) -> str:
    counts = [str(count) for count in result["counts"]]
    lines = ["| peak MiB, pictures | " + " | ".join(f"{int(count):,}" for count in counts) + " | bytes a picture |"]
    lines += ["|---" * (len(counts) + 2) + "|"]
    for name, peaks in result["extract"].items():
        found = [peaks[count]["peak_mib"] for count in counts]
        slope = (found[-1] - found[0]) * 2**20 / (int(counts[-1]) - int(counts[0]))
        lines.append(f"| {name} | " + " | ".join(f"{peak:.0f}" for peak in found) + f" | {slope:.0f} |")
    plan = result["plan"]
    lines.append("")
    lines.append(
        f"A list of {result['paths']:,} made-up paths is planned in {plan['seconds']:.0f} s; its peak lies "
        f"{plan['peak_mib'] - plan['mib_before']:.0f} MiB above what the process had before."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--paths", type=int, default=10**7)
    parser.add_argument("--dry", action="store_true", help="print only, write no results")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run and args.run[0] == "plan":
        print(json.dumps(plan_peak(int(args.run[1]))))
        return
    if args.run:
        print(json.dumps(extract_peak(Path(args.run[0]), int(args.run[1]), OUTPUTS[args.run[2]])))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_input(root, DISTINCT)
        for count in args.counts:
            write_links(root, count)
        result: dict[str, Any] = {"environment": environment(), "counts": args.counts, "paths": args.paths}
        result["extract"] = {
            name: {str(n): json.loads(in_a_child(__file__, "--run", root, n, name)) for n in args.counts}
            for name in OUTPUTS
        }
        result["plan"] = json.loads(in_a_child(__file__, "--run", "plan", args.paths))
    if not args.dry:
        save("extract_memory", result)
    print(headline(result), table(result), sep="\n\n")


if __name__ == "__main__":
    main()
