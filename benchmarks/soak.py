"""A server's days in minutes: threads, modes, sizes and processes on one model; what must stay equal, and flat.

    python benchmarks/soak.py [--minutes M] [--model vits16] [--backend auto|prepacked|inductor] [--save soak]

Prints a table: for each trial how many calls, how many gave other bits than the first of their kind, errors, and how
many MiB the process grew by. Writes benchmarks/results/soak.json, or what --save names. Exits with 1 if anything
differed or failed, if a process grew by more than `ALLOWED_MIB`, or if the first images of many sizes cost more memory
than they cost a model of the same sizes that is made of PyTorch's own layers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import urlopen

import torch
from environment import environment, headline, save
from torch import Tensor, nn

from dinov3_lite import (
    DINOv3Config,
    DINOv3ViT,
    DINOv3ViTBackbone,
    FeaturesOnly,
    optimize_for_inference,
    sliding_window_features,
)

THREADS = 8
ALLOWED_MIB = 30.0
WIDTHS = 300
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


def by_sizes(model: nn.Module, patch_size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Images of every width, as a server sees them: each once, widest last, and then again and again.

    The first time the C library's heap grows by holes that a wider image's activations do not fit into, and PyTorch's
    libraries keep plans; after that nothing new may come.
    """
    images = [torch.ones(1, 3, patch_size, patch_size * (1 + k)) for k in range(WIDTHS)]
    end = time.monotonic() + seconds
    with torch.no_grad():
        means = tokens_of(model(images[0])).mean(1).repeat(WIDTHS, 1)  # all at once: nothing is kept between two calls
        for trial in (f"{WIDTHS} sizes, first", f"{WIDTHS} sizes, again"):
            before, count, different = resident(), 0, 0
            while count < WIDTHS or ("again" in trial and time.monotonic() < end):
                mean = tokens_of(model(images[count % WIDTHS])).mean(1)
                if "first" in trial:
                    means[count] = mean[0]
                different += not torch.equal(means[count % WIDTHS], mean[0])
                count += 1
            yield {
                "trial": trial, "calls": count, "different": different, "errors": 0, "messages": [],
                "grown MiB": round(resident() - before),
            }  # fmt: skip


def tokens_of(output: Any) -> Tensor:
    """(B, N, C) of any of the models."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


class OwnLayers(nn.Module):
    """PyTorch's own transformer of a model's sizes, without anything of ours: images (B, 3, H, W) to (B, N, C).

    Its layers run one by one, as those of eager models do, and not as one operator a block, which DINOv3 has not.
    """

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        C, heads, hidden = config.hidden_size, config.num_attention_heads, config.intermediate_size
        self.prefix = nn.Parameter(torch.zeros(1, 1 + config.num_register_tokens, C))
        self.patches = nn.Conv2d(config.num_channels, C, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(C, heads, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(C)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).mT
        x = torch.cat((self.prefix.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def sizes_in_a_process(config: DINOv3Config, backend: str | None, seconds: float) -> list[dict[str, Any]]:
    """`by_sizes` of a model that nothing ran in the process before: `backend` "own layers", None for eager, or others.

    The process has one thread, as a server's worker has.
    """
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    model: nn.Module = OwnLayers(config) if backend == "own layers" else DINOv3ViT(config)
    model.eval()
    if backend not in (None, "own layers"):
        model = optimize_for_inference(model, backend=backend)
    return list(by_sizes(model, config.patch_size, seconds))


TRIALS: dict[str, Callable[[Trial, float], None]] = {
    "one thread": by_one_thread,
    f"{THREADS} threads": by_threads,
    "asyncio": by_asyncio,
    "http server": by_http,
    "forked processes": by_processes,
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
    backends = {"PyTorch's own layers": "own layers", "eager": None, f"prepared, {args.backend}": args.backend}
    seconds = 60 * args.minutes / (len(models) * len(TRIALS) + len(backends))
    result: dict[str, Any] = {
        "environment": environment(),
        "minutes": args.minutes,
        "model": f"{args.model}, {args.layers} blocks",
        "rows": [],
    }
    for name, tried in models.items():
        for trial, run in TRIALS.items():
            result["rows"].append({"model": name, "trial": trial, **soak(tried, run, seconds)})
            print(result["rows"][-1], flush=True)
    for name, backend in backends.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows = pool.submit(sizes_in_a_process, model.config, backend, seconds).result()
        result["rows"] += [{"model": name, **row} for row in rows]
        print(*result["rows"][-2:], sep="\n", flush=True)
    save(args.save, result)
    print(f"\n{table(result)}\n\n{headline(result)}")
    return int(
        any(row["different"] or row["errors"] or row["grown MiB"] > allowed(row, result) for row in result["rows"])
    )


def allowed(row: dict[str, Any], result: dict[str, Any]) -> float:
    """How many MiB the process may grow by in a trial: where sizes are new, by as many as with PyTorch's own layers."""
    firsts = [other["grown MiB"] for other in result["rows"] if other["trial"] == row["trial"]]
    return max(ALLOWED_MIB, firsts[0]) if row["trial"].endswith("first") else ALLOWED_MIB


def soak(model: DINOv3ViT, run: Callable[[Trial, float], None], seconds: float) -> dict[str, Any]:
    """One trial of one model: what was counted. A second of it comes first, which may make what is kept for good."""
    trial = Trial(kinds(model))
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
