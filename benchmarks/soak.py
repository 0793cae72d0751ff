"""A server's days in minutes: threads, modes, sizes and processes on one model; what must stay equal, and flat.

    python benchmarks/soak.py [--minutes M] [--model vits16] [--backend auto|prepacked|inductor] [--save soak]

Prints a table: for each trial how many calls, how many gave other bits than the first of their kind, errors, and how
many MiB the process grew by. Writes benchmarks/results/soak.json, or what --save names. Exits with 1 if anything
differed, failed, or grew beyond `ALLOWED_MIB`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import urlopen

import torch
from environment import environment, headline, save
from torch import Tensor

from dinov3_lite import DINOv3ViT, DINOv3ViTBackbone, FeaturesOnly, optimize_for_inference, sliding_window_features

THREADS = 8
ALLOWED_MIB = 200.0
SIZES = [(48, 64), (64, 64), (96, 32), (112, 80)]
Calls = dict[str, Callable[[], Tensor]]


def kinds(model: DINOv3ViT) -> Calls:
    """Ten ways to call a model, each of a fixed input, each to one tensor."""
    images = [
        torch.randn(1 + i % 2, 3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(SIZES)
    ]
    first = images[0]
    mask = torch.zeros(len(first), first.shape[-2] * first.shape[-1] // model.patch_size**2, dtype=torch.bool)
    mask[:, ::2] = True
    backbone, features = DINOv3ViTBackbone(model, out_indices=[1, 2]), FeaturesOnly(model, [0, 1])
    return {
        "forward": lambda: model(first).last_hidden_state,
        "forward, another size": lambda: model(images[1]).last_hidden_state,
        "hidden states": lambda: torch.cat(model(images[2], output_hidden_states=True).hidden_states),
        "masks": lambda: model(first, bool_masked_pos=mask).last_hidden_state,
        "kept patches": lambda: model(first, keep_indices=torch.zeros(len(first), 2, dtype=torch.int64)).cls_token,
        "layers": lambda: torch.cat(model.get_intermediate_layers(images[3], n=2)),
        "pack": lambda: model.forward_packed([first[0], images[1][0]])[1].last_hidden_state,
        "attention maps": lambda: model.attention_maps(first),
        "windows": lambda: sliding_window_features(model, images[3], 48),
        "faces": lambda: torch.cat([backbone(first).feature_maps[0], features(first)[0]]),
    }


class Trial:
    """Counts calls whose result is not bit for bit the first of its kind, and errors."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        with torch.no_grad():
            self.expected = {name: call() for name, call in calls.items()}
        self.count = self.different = 0
        self.errors: list[str] = []
        self.lock = threading.Lock()

    @torch.no_grad()
    def call(self, i: int) -> None:
        """The i-th call."""
        name = list(self.calls)[i % len(self.calls)]
        try:
            equal = torch.equal(self.calls[name](), self.expected[name])
        except Exception as error:  # whatever it is, it belongs into the table
            with self.lock:
                self.errors.append(f"{name}: {type(error).__name__}: {error}")
            return
        with self.lock:
            self.count += 1
            self.different += not equal


def by_threads(trial: Trial, seconds: float) -> None:
    end = time.monotonic() + seconds

    def work(start: int) -> None:
        i = start
        while time.monotonic() < end:
            trial.call(i)
            i += 1

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def by_one_thread(trial: Trial, seconds: float) -> None:
    end = time.monotonic() + seconds
    i = 0
    while time.monotonic() < end:
        trial.call(i)
        i += 1


def by_asyncio(trial: Trial, seconds: float) -> None:
    async def serve() -> None:
        end = time.monotonic() + seconds
        i = 0
        while time.monotonic() < end:
            await asyncio.gather(*(asyncio.to_thread(trial.call, i + k) for k in range(THREADS)))
            i += THREADS

    asyncio.run(serve())


def by_http(trial: Trial, seconds: float) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            trial.call(int(self.path.strip("/")))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        end = time.monotonic() + seconds
        i = 0
        while time.monotonic() < end:
            urlopen(f"http://127.0.0.1:{server.server_port}/{i}").close()
            i += 1
        server.shutdown()


def by_processes(trial: Trial, seconds: float) -> None:
    """Forked children, which share the model's memory: each makes every call once."""
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("fork")
    while time.monotonic() < end:
        child = context.Process(target=_child, args=(trial,))
        child.start()
        child.join(120)
        if child.is_alive():
            child.kill()
        trial.count += len(trial.calls)
        if child.exitcode:
            trial.errors.append(f"a forked process ended with {child.exitcode}")


def _child(trial: Trial) -> None:
    torch.set_num_threads(1)
    trial.different = 0
    for i in range(len(trial.calls)):
        trial.call(i)
    sys.exit(1 if trial.different or trial.errors else 0)


def by_sizes(trial: Trial, seconds: float) -> None:
    """Images of every width, one after the other, as a server sees them."""
    end = time.monotonic() + seconds
    model, p, k = trial.model, trial.model.patch_size, 0  # type: ignore[attr-defined]
    while time.monotonic() < end:
        with torch.no_grad():
            output = model(torch.ones(1, 3, p, p * (1 + k % 300))).last_hidden_state
        trial.count += 1
        trial.different += not output.isfinite().all()
        k += 1


TRIALS: dict[str, Callable[[Trial, float], None]] = {
    "one thread": by_one_thread,
    f"{THREADS} threads": by_threads,
    "asyncio": by_asyncio,
    "http server": by_http,
    "forked processes": by_processes,
    "300 sizes": by_sizes,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of all trials together")
    parser.add_argument("--model", default="vits16")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--save", default="soak", metavar="NAME")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = DINOv3ViT.from_name(args.model, num_hidden_layers=args.layers).eval()
    models = {"eager": model, f"prepared, {args.backend}": optimize_for_inference(model, backend=args.backend)}
    seconds = 60 * args.minutes / (len(models) * len(TRIALS))
    result: dict[str, Any] = {
        "environment": environment(),
        "minutes": args.minutes,
        "model": f"{args.model}, {args.layers} blocks",
        "rows": [],
    }
    for name, tried in models.items():
        for trial, run in TRIALS.items():
            row = {"model": name, "trial": trial, **soak(tried, run, seconds)}
            print(row, flush=True)
            result["rows"].append(row)
    save(args.save, result)
    print(f"\n{table(result)}\n\n{headline(result)}")
    rows = result["rows"]
    return int(any(row["different"] or row["errors"] or row["grown MiB"] > ALLOWED_MIB for row in rows))


def soak(model: DINOv3ViT, run: Callable[[Trial, float], None], seconds: float) -> dict[str, Any]:
    """One trial of one model: what was counted. A second of it comes first, which may make what is kept for good."""
    trial = Trial(kinds(model))
    trial.model = model  # type: ignore[attr-defined]
    run(trial, min(seconds, 1.0))
    before = resident()
    run(trial, seconds)
    return {
        "calls": trial.count,
        "different": trial.different,
        "errors": len(trial.errors),
        "messages": sorted({error[:200] for error in trial.errors})[:3],
        "grown MiB": round(resident() - before),
    }


def table(result: dict[str, Any]) -> str:
    """A line a trial."""
    columns = ("model", "trial", "calls", "different", "errors", "grown MiB")
    lines = ["| model | trial | calls | other bits | errors | grew by, MiB |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in result["rows"]]
    return "\n".join(lines)


def resident() -> float:
    """MiB of this process that lie in memory."""
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
    sys.exit(main())
