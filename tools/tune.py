"""Find the fastest launch of every kernel on this GPU, and the thresholds between the strategies of attention.

    python tools/tune.py [--head-dims 64 128] [--minutes 5] [--write] [--json FILE]
    python tools/tune.py --dry-run [--arch 90]

Candidates, those nearest to the present launch first, are compiled by several processes, and timed in bfloat16, on as
many images as fill the GPU, by its own clock. The fastest that pass the gate of `kernel_builds`, and compute on this
GPU what plain torch computes, are taken. Prints the entry of kernels/measured.py, and with --write puts it there, with
where and when. Without a GPU, --dry-run compiles a few candidates for an architecture, and times nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from dinov3_lite.kernels import measured, rope_attention_launch, rotate, tuning
from dinov3_lite.kernels.measured import Measured, Tiles

GRID = {  # queries, keys, warps, stages
    "forward": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)),
    "backward_q": ((32, 64, 128), (32, 64), (4, 8), (1, 2, 3)),
    "backward_kv": ((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3)),
}
HEADS = {64: 16, 128: 32}
TOKENS = (201, 1029)  # what tiles are timed at
GATED = 6  # of the fastest, the best that passes is taken
LENGTHS = (37, 69, 133, 201, 325, 453, 581, 789, 1029, 1605)  # what thresholds lie between
CHANNELS = (384, 768, 1024, 1280, 4096)
HIDDEN = 5120
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # which is for rehearsals in the interpreter
FILL = ROWS = 64 * 201  # tokens that fill a GPU
KERNELS_FILE = Path(measured.__file__)


class Candidate(NamedTuple):
    """One launch of a kernel of attention."""

    kernel: str
    arch: int
    D: int
    tiles: Tiles


def candidates(kernel: str, arch: int, D: int) -> list[Candidate]:
    """The present launch, then those that change one of its numbers, then two, and so on.

    Left out is what can't be held in registers: more than 128 float32 a thread of scores or of an accumulator.
    """
    present = tuning.tiles(kernel, arch, D, itemsize=2)

    def fits(tiles: Tiles) -> bool:
        rows = tiles.block_n if kernel == "backward_kv" else tiles.block_m
        threads = 32 * tiles.num_warps
        return tiles.block_m * tiles.block_n <= 128 * threads and rows * D <= 128 * threads

    grid = [tiles for tiles in itertools.starmap(Tiles, itertools.product(*GRID[kernel])) if fits(tiles)]
    grid.sort(key=lambda tiles: sum(a != b for a, b in zip(tiles, present, strict=True)))
    return [Candidate(kernel, arch, D, tiles) for tiles in dict.fromkeys((present, *grid))]


@contextmanager
def launched_with(candidate: Candidate) -> Iterator[None]:
    """One kernel is launched with these tiles, the others as ever."""
    present = tuning.tiles

    def tiles(kernel: str, arch: int, D: int, itemsize: int) -> Tiles:
        return candidate.tiles if kernel == candidate.kernel else present(kernel, arch, D, itemsize)

    with patch.object(tuning, "tiles", tiles):
        yield


def problems(candidate: Candidate) -> list[str]:
    """What the gate says of a candidate's builds, and on a GPU what plain torch says of its results."""
    import kernel_builds
    from dinov3_lite.kernels import builds

    with launched_with(candidate):
        found = [
            problem
            for build in builds.attention_builds(candidate.arch, candidate.D, "bf16", only=candidate.kernel)
            for problem in kernel_builds.problems(kernel_builds.compile_build(build, candidate.arch))
        ]
        if found or not torch.cuda.is_available():
            return found
        q = torch.empty(1, 1, 1, candidate.D, dtype=torch.bfloat16, device=DEVICE)
        if candidate.kernel != "forward":
            return list(filter(None, [rope_attention_launch.backward.problem(rope_attention_launch.kind(q, False))]))
        uses = [(fused, training, False) for fused in (True, False) for training in (False, True)]
        checks = (rope_attention_launch.forward.problem(rope_attention_launch.kind(q, *use)) for use in uses)
        return list(filter(None, checks))


def unlaunchable(candidate: Candidate) -> str | None:
    """Why a candidate can't be launched here, or None; what it takes to compile is then done, and kept on disk."""
    try:
        with launched_with(candidate):
            for N in TOKENS:
                attention_calls(N, candidate.D)[candidate.kernel]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def processes() -> Executor:
    """As many as compile at once, started anew, since a forked one can't use a GPU."""
    count = os.cpu_count() or 1
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    wait([pool.submit(time.sleep, 0.1) for _ in range(count)])
    return pool


def without(
    fault: Callable[[Candidate], object], tried: list[Candidate], pool: Executor, seconds: float = 600
) -> list[Candidate]:
    """Those of which `fault` finds nothing, of as many as it can be asked of in that time."""
    futures = {pool.submit(fault, candidate): candidate for candidate in tried}
    done, late = wait(futures, seconds)
    for future in late:
        future.cancel()
    found = {candidate: future.result() for future, candidate in futures.items() if future in done}
    for candidate, words in found.items():
        print(f"{candidate.kernel}, D {candidate.D}, {tuple(candidate.tiles)}: {words or 'passes'}", flush=True)
    return [candidate for candidate, words in found.items() if not words]


def milliseconds(call: Callable[[], object], rounds: int = 7, calls: int = 10) -> float:
    """The median of the rounds, by the GPU's clock. They are replayed: launched one by one, they wait for the host."""
    times, graph = [], torch.cuda.CUDAGraph()
    call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def attention_calls(N: int, D: int) -> dict[str, Callable[[], object]]:
    """Each kernel of attention by itself, and the strategies of a forward, on as many images as make FILL tokens."""
    B, heads = max(1, FILL // N), HEADS[D]
    qkv = torch.randn(B, N, 3, heads, D, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(2)
    angles = 6 * torch.rand(N - 5, D // 2, device=DEVICE)
    cos, sin, scale = angles.cos(), angles.sin(), D**-0.5
    launch = rope_attention_launch._launch_forward
    turned = rotate.rotated(q, k, cos, sin).unbind()
    statistics_ = launch(*turned, v, cos, sin, None, None, scale, True, False)
    dout = torch.randn_like(statistics_[0])

    def forward(fused: bool) -> object:
        pair = (q, k) if fused else rotate.rotated(q, k, cos, sin).unbind()
        return launch(*pair, v, cos, sin, None, None, scale, False, fused)

    def sdpa() -> object:
        pair = (x.transpose(1, 2) for x in rotate.rotated(q, k, cos, sin).unbind())
        return torch.nn.functional.scaled_dot_product_attention(*pair, v.transpose(1, 2), scale=scale)

    def backward() -> object:
        return rope_attention_launch._launch_backward(dout, *turned, v, cos, sin, None, None, scale, *statistics_)

    calls = {"fused": lambda: forward(True), "separate": lambda: forward(False), "sdpa": sdpa}
    return {**calls, "forward": calls["fused"], "backward_q": backward, "backward_kv": backward}


def timed(launched: list[Candidate], deadline: float) -> list[dict[str, Any]]:
    """Every time of every candidate, the present launch's first."""
    rows, calls = [], {N: attention_calls(N, launched[0].D) for N in TOKENS}
    for candidate in launched:
        if rows and time.monotonic() > deadline:
            break
        with launched_with(candidate):
            times = {N: milliseconds(calls[N][candidate.kernel]) for N in TOKENS}
        rows.append({"kernel": candidate.kernel, "D": candidate.D, "tiles": candidate.tiles, "ms": times})
    return rows


def ranked(rows: list[dict[str, Any]]) -> list[Tiles]:
    """Tiles by their time over all lengths, relative to the present ones', which are the first row's."""
    present = rows[0]["ms"]
    return [row["tiles"] for row in sorted(rows, key=lambda row: sum(row["ms"][N] / present[N] for N in present))]


def threshold(lengths: list[int], wins: list[bool], least: int = 0) -> int:
    """The last length up to which one way always wins."""
    last = least
    for length, won in zip(lengths, wins, strict=True):
        if not won:
            break
        last = length
    return last


def rows_times(C: int) -> Callable[[], object]:
    """A forward and backward of add_layer_norm, bfloat16 on a float32 stream."""
    from dinov3_lite.kernels import layer_norm

    x = torch.randn(ROWS, C, device=DEVICE)
    branch, grad = (torch.randn(ROWS, C, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    vectors = [torch.rand(C, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]

    def call() -> None:
        x_new, _ = layer_norm._launch_forward(x, branch, *vectors, 1e-5)
        layer_norm._launch_backward(x_new, branch, *vectors[:2], x, grad, 1e-5)

    return call


def swiglu_times() -> Callable[[], object]:
    import importlib

    module = importlib.import_module("dinov3_lite.kernels.swiglu")
    gate_value = torch.randn(ROWS, 2 * HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(ROWS, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    return lambda: (module._launch_forward(gate_value), module._launch_backward(gate_value, grad))


def tune_rows() -> tuple[dict[int, int], tuple[int, int], list[dict[str, Any]]]:
    """Warps by channels for add_layer_norm; channels and warps of a program for swiglu; every time."""
    rows: list[dict[str, Any]] = []
    layer_norm_launch, swiglu_launch, warps_of = tuning.layer_norm_launch, tuning.swiglu_launch, {}
    for C in CHANNELS:
        call, block = rows_times(C), 1 << (C - 1).bit_length()
        for warps in (w for w in (1, 2, 4, 8, 16) if 4 * 32 * w <= block <= 32 * 32 * w):
            launch = {**layer_norm_launch(90, C), "num_warps": warps}
            with patch.object(tuning, "layer_norm_launch", lambda arch, C, launch=launch: launch):
                rows.append({"kernel": "add_layer_norm", "C": C, "num_warps": warps, "ms": milliseconds(call)})
        warps_of[C] = min((row for row in rows if row["C"] == C), key=lambda row: row["ms"])["num_warps"]
    call, found = swiglu_times(), []
    for block, warps in itertools.product((512, 1024, 2048), (2, 4, 8)):
        launch = {**swiglu_launch(90, HIDDEN), "BLOCK_F": block, "num_warps": warps}
        with patch.object(tuning, "swiglu_launch", lambda arch, F, launch=launch: launch):
            found.append({"kernel": "swiglu", "launch": (block, warps), "ms": milliseconds(call)})
    return warps_of, min(found, key=lambda row: row["ms"])["launch"], rows + found


def render(entries: dict[int, Measured]) -> str:
    """The source of kernels/measured.py with these entries."""
    source = KERNELS_FILE.read_text()
    head = source[: source.index("MEASURED: dict")].replace("\nNo GPU has been measured yet.\n", "")
    lines = ["MEASURED: dict[int, Measured] = {"]
    for arch, entry in sorted(entries.items()):
        lines.append(f"    {arch}: Measured(")
        for name, value in entry._asdict().items():
            if name != "tiles":
                lines.append(f"        {name}={json.dumps(value) if isinstance(value, str) else value},")
                continue
            lines.append("        tiles={")
            for kernel, by_width in value.items():
                widths = ", ".join(f"{D}: Tiles({', '.join(map(str, tiles))})" for D, tiles in by_width.items())
                lines.append(f'            "{kernel}": {{{widths}}},')
            lines.append("        },")
        lines.append("    ),")
    return head + "\n".join([*lines, "}"]) + "\n"


def sweep(head_dims: list[int], minutes: float, pool: Executor) -> tuple[Measured, list[dict[str, Any]]]:
    """The entry for this GPU, and every time that was taken."""
    arch, rows = tuning.capability(torch.device(DEVICE)), []
    share = 60 * minutes / (3 * len(head_dims) + 1)  # a kernel and head dim; the thresholds and rows take the last
    tiles: dict[str, dict[int, Tiles]] = {kernel: {} for kernel in GRID}
    sdpa_beyond, fused_up_to = {}, 10**9
    for D in head_dims:
        for kernel in GRID:
            start, tried = time.monotonic(), candidates(kernel, arch, D)
            launched = without(unlaunchable, tried, pool, 0.5 * share)
            if tried[0] not in launched:
                raise RuntimeError(f"the present launch of {kernel} at head dim {D} fails on sm_{arch}: see above")
            found = timed(launched, start + 0.7 * share)
            best = [Candidate(kernel, arch, D, chosen) for chosen in ranked(found)[:GATED]]
            passed = without(problems, list(dict.fromkeys((*best, tried[0]))), pool)
            if not passed:
                raise RuntimeError(f"no launch of {kernel} at head dim {D} passes on sm_{arch}: see above")
            tiles[kernel][D] = passed[0].tiles
            rows += found
    with patch.object(tuning, "tiles", lambda kernel, arch, D, itemsize: tiles[kernel][D]):
        for D in head_dims:
            ms = {N: {name: milliseconds(call) for name, call in attention_calls(N, D).items()} for N in LENGTHS}
            rows.append({"strategies at D": D, "ms": ms})
            fused = [ms[N]["fused"] <= ms[N]["separate"] for N in LENGTHS]
            own = [min(ms[N]["fused"], ms[N]["separate"]) <= ms[N]["sdpa"] for N in LENGTHS]
            fused_up_to = min(fused_up_to, threshold(LENGTHS, fused))
            sdpa_beyond[D] = threshold(LENGTHS, own)
    warps, swiglu, found = tune_rows()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    where, when = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE, str(date.today())
    entry = Measured(where, when, *versions.values(), tiles, fused_up_to, sdpa_beyond, warps, swiglu)
    return entry, rows + found


def dry_run(arch: int, head_dims: list[int], limit: int) -> int:
    """The first candidates of each kernel through the gate; nothing is timed."""
    tried = [c for D in head_dims for kernel in GRID for c in candidates(kernel, arch, D)[:limit]]
    with processes() as pool:
        passed = without(problems, tried, pool)
    print(f"{len(passed)} of {len(tried)} candidates pass on sm_{arch}; no GPU: nothing is timed")
    return int(not passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128], choices=[64, 128])
    parser.add_argument("--minutes", type=float, default=6.0, help="how long to search")
    parser.add_argument("--write", action="store_true", help="put the entry into kernels/measured.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time there")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: compile a few candidates")
    parser.add_argument("--arch", type=int, default=90, choices=tuning.ARCHITECTURES, help="of the dry run")
    parser.add_argument("--candidates", type=int, default=2, metavar="N", help="of each kernel in a dry run")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # triton, which nothing has imported yet, is to compile
    if args.dry_run:
        return dry_run(args.arch, args.head_dims, args.candidates)
    if not torch.cuda.is_available():
        parser.error("there is no GPU: expected one, or --dry-run")
    with processes() as pool:
        entry, rows = sweep(args.head_dims, args.minutes, pool)
    source = render({**measured.MEASURED, tuning.capability(torch.device(DEVICE)): entry})
    print(source[source.index("MEASURED: dict") :])
    if args.json is not None:
        args.json.write_text(json.dumps({"entry": entry._asdict(), "times": rows}, indent=1, default=str) + "\n")
    if args.write:
        KERNELS_FILE.write_text(source)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
