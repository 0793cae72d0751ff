"""`extract` under SIGKILL: whatever step it comes at, going on ends in the same bytes.

    python benchmarks/extract_kills.py [--kills 200] [--ray-kills 20] [--engines local parts ray] [--seed 0] [--add]

A job of tiny pictures is begun and killed again and again, at each named step in turn and at random moments; when it is
complete, its files (but logs) are compared with those of an undisturbed run, and it is begun anew. `local` is one
process, `parts` two at once of which one is killed, `ray` two actors of a cluster that stays, of which one is killed
or, every fifth time, the process that has them. Writes benchmarks/results/extract_kills.json; `--add`, with another
seed, adds to what that holds.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import RESULTS, environment, save
from PIL import Image
from safetensors.torch import save_file

import dinov3_lite.extraction.engines
from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.checkpoint.layouts import TRANSFORMERS, rename
from dinov3_lite.extraction import commit, compute, folder, pipeline, plan, reading, shard, writer

SHARD, BATCH = 6, 4


def write_input(root: Path, pictures: int, damaged: int = 10) -> None:
    """A model of two blocks and small pictures, of which one of `damaged` is damaged; 0: none."""
    config = DINOv3Config(
        patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = DINOv3ViT(config)
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps(config.to_dict()))
    (root / "model" / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    weights = {name: t.contiguous() for name, t in rename(model.state_dict(), TRANSFORMERS, config).items()}
    save_file(weights, root / "model" / "model.safetensors")
    (root / "in").mkdir()
    noise = np.random.default_rng(0)
    for i in range(pictures):
        file = root / "in" / f"{i:04d}.jpg"
        Image.fromarray(noise.integers(0, 256, (40, 50, 3), np.uint8)).save(file)
        if damaged and i % damaged == 3:
            file.write_bytes(file.read_bytes()[:700])


def digest(path: Path) -> str:
    """A SHA-256 of all files, names and contents, but logs."""
    sha = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.parent.name != "log":
            sha.update(f"{file.relative_to(path)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return sha.hexdigest()


def half_written(file: Any, data: Any) -> None:
    file.write(memoryview(data)[: len(data) // 2])


# Step: where it is called, by what name, and what is done of it before the kill.
STEPS: dict[str, tuple[Any, str, Callable[..., object] | None]] = {
    "planning": (plan._Counted, "write", lambda self, data: half_written(self.file, data)),
    "plan renamed": (folder.Folder, "hand_over", None),
    "shard begun": (shard, "_write_shard", None),
    "reading": (reading, "_read_local", None),
    "decoding": (pipeline, "decode", None),
    "forward": (compute.Network, "submit", None),
    "rows half written": (writer.Hashed, "write", lambda self, data: half_written(self.file, data)),
    "rows appended": (commit.ShardFiles, "append", None),
    "before a rename": (os, "replace", None),
    "after a rename": (os, "replace", os.replace),
    "all renamed": (os, "fsync", None),
    "job or index": (folder.Folder, "put", None),
}


IN_ACTORS = [step for step in STEPS if step not in ("planning", "plan renamed", "job or index")]  # of Ray's
MOST_WARRANTS = 5  # for actors of Ray's in one run


def die(note: Callable[[], object] = int) -> None:
    note()
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(step: str, calls: int, note: Callable[[], object] = int) -> None:
    """Have this process killed at that call of the step, right after `note`."""
    where, name, first = STEPS[step]
    original, left = getattr(where, name), [calls]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if first is not None:
                first(*args, **kwargs)
            die(note)
        return original(*args, **kwargs)

    setattr(where, name, deadly)


def begin(root: Path, output: Path, step: str | None = None, calls: int = 1, **options: Any) -> int:
    """`extract` in a child of this process, to be killed at a step; its number."""
    child = os.fork()
    if child:
        return child
    try:
        if step:
            kill_at(step, calls)
        extract(root, output, **options)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def extract(root: Path, output: Path, **options: Any) -> None:
    dinov3_lite.extraction.engines.extract(
        root / "in", root / "model", output, outputs=["cls_token", "patch_tokens"], batch_size=BATCH, shard_size=SHARD,
        decode_threads=2, device="cpu", progress=False, **options,
    )  # fmt: skip


def end(child: int) -> int:
    """The signal that a child died of, or 0. Raises RuntimeError if it failed by itself."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"extract ended with status {os.WEXITSTATUS(status)}")
    return 0


def markers(output: Path) -> set[str]:
    return {file.name for file in (output / "shards").glob("*.json")}


def kill_local(root: Path, kills: int, expected: str, rng: random.Random, parts: int = 1) -> dict[str, Any]:
    """Kill at named steps and random moments in turn, until there were as many kills; what was seen."""
    output, seen, jobs, redone = root / "killed", Counter(), 0, 0
    start = time.perf_counter()
    end(begin(root, root / "timed"))
    whole = time.perf_counter() - start
    shutil.rmtree(root / "timed")
    steps = itertools.cycle(step for named in STEPS for step in (named, "a random moment"))
    while sum(seen.values()) < kills or output.exists():
        kill = sum(seen.values()) < kills
        step = next(steps) if kill else ""
        before, dead = markers(output), len(folder.Folder(output).deaths())
        named = step if step in STEPS else None
        child = begin(root, output, named, rng.choice((1, 1, 2, 5, 9)), part=f"0/{parts}" if parts > 1 else None)
        others = [begin(root, output, part=f"{i}/{parts}") for i in range(1, parts)]
        if step == "a random moment":
            time.sleep(rng.uniform(0, whole))
            os.kill(child, signal.SIGKILL)
        killed = end(child) == signal.SIGKILL
        for other in others:
            end(other)
        if killed:
            seen[step] += 1
            assert before <= markers(output), "a shard that was done is lost"
            redone = max(redone, len(folder.Folder(output).deaths()) - dead)
        elif len(markers(output)) == len(plan.Plan(folder.Folder(output))):
            commit.complete(folder.Folder(output), len(plan.Plan(folder.Folder(output))))
            found = digest(output)
            if found != expected:
                names = {str(file.relative_to(output)) for file in output.rglob("*")}
                others = {str(file.relative_to(root / "undisturbed")) for file in (root / "undisturbed").rglob("*")}
                raise AssertionError(f"after {dict(seen)} the files differ: {sorted(names ^ others)}")
            shutil.rmtree(output)
            jobs += 1
    return {"kills": dict(sorted(seen.items())), "jobs_completed": jobs, "most_shards_redone_a_kill": redone}


class Doomed(dinov3_lite.extraction.engines.RayWorker):
    """An actor of Ray's that takes a warrant, if one lies there, and notes each shard that it begins."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.root = Path(setup["folder"]).parent
        taken = self.root / f"warrant.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.rename(self.root / "warrant", taken)
            warrant = json.loads(taken.read_text())
            note = partial(os.link, taken, f"{taken}.dead")
            if warrant["step"] in STEPS:
                kill_at(warrant["step"], warrant["calls"], note)
            else:
                threading.Timer(warrant["after"], die, (note,)).start()
        super().__init__(setup)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        output = folder.Folder(self.setup.folder)
        missing = sum(not output.has(output.marker(int(i))) for i in batch["shard"])
        with (self.root / "begun").open("a") as begun:
            begun.write(f"{os.getpid()}\n" * missing)
        return super().__call__(batch)


CLUSTER = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def kill_ray(root: Path, kills: int, expected: str, rng: random.Random) -> dict[str, Any]:
    """Kill actors, and now and then the process that has them, on a cluster that lives on; what was seen."""
    dinov3_lite.extraction.engines.RayWorker = Doomed
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    steps = itertools.cycle(step for named in IN_ACTORS for step in (named, "a random moment"))
    in_driver = itertools.cycle(step for named in STEPS if named not in IN_ACTORS for step in (named, "in the middle"))
    output, jobs, redone, whole = root / "ray", 0, 0, 30.0
    seen, drivers = Counter[str](), Counter[str]()
    words = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        os.environ["RAY_ADDRESS"] = cluster.stdout.readline().strip()
        while seen.total() + drivers.total() < kills or output.exists():
            left = kills - seen.total() - drivers.total()
            step = next(in_driver) if left > 0 and rng.random() < 0.2 else ""
            child = begin(root, output, step if step in STEPS else None, engine="ray", workers=2)
            start, moment = time.perf_counter(), rng.uniform(0, whole)
            warrants = [next(steps) for _ in range(0 if step else min(left, MOST_WARRANTS))]
            while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if warrants and not (root / "warrant").exists():
                    warrant = {"step": warrants.pop(), "calls": rng.choice((1, 1, 2, 5)), "after": rng.uniform(0, 2)}
                    writer.write_whole(root / "warrant", json.dumps(warrant).encode())
                if step == "in the middle" and time.perf_counter() - start > moment:
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.05)
            dead = [json.loads(file.read_text())["step"] for file in root.glob("warrant.*.dead")]
            for file in root.glob("warrant*"):
                file.unlink()
            seen.update(dead)
            if end(child) == signal.SIGKILL:
                drivers[step] += 1
                continue
            whole = min(whole, time.perf_counter() - start)
            assert digest(output) == expected, "the files differ"
            begun = Counter((root / "begun").read_text().split())
            logged = Counter(file.stem.split("-")[-1] for file in (output / "log").iterdir() for _ in file.open())
            redone = max([redone, *(begun - logged).values()])
            (root / "begun").unlink()
            shutil.rmtree(output)
            jobs += 1
        cluster.communicate()  # its end of the pipe closes, and it ends
    return {
        "kills": dict(sorted(seen.items())),
        "kills_of_the_driver": dict(sorted(drivers.items())),
        "jobs_completed": jobs,
        "most_shards_redone_a_kill": redone,
    }


def add(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One result of two, of different seeds."""
    engines = {**other["engines"], **result["engines"]}
    for engine in result["engines"].keys() & other["engines"].keys():
        one, two = result["engines"][engine], other["engines"][engine]
        engines[engine] = {
            **{
                name: dict(sorted((Counter(one[name]) + Counter(two[name])).items()))
                for name in ("kills", "kills_of_the_driver")
                if name in one
            },
            "jobs_completed": one["jobs_completed"] + two["jobs_completed"],
            "most_shards_redone_a_kill": max(one["most_shards_redone_a_kill"], two["most_shards_redone_a_kill"]),
        }
    return {**result, "engines": {name: engines[name] for name in sorted(engines)}}


def table(result: dict[str, Any]) -> str:
    lines = ["| engine | kills | of them at a named step | jobs completed | shards redone a kill, at most |"]
    lines += ["|---|---|---|---|---|"]
    for engine, found in result["engines"].items():
        kills = Counter(found["kills"]) + Counter(found.get("kills_of_the_driver"))
        named = sum(count for step, count in kills.items() if step in STEPS)
        redone = found["most_shards_redone_a_kill"]
        lines.append(f"| {engine} | {kills.total()} | {named} | {found['jobs_completed']} | {redone} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--engines", nargs="+", default=["local", "parts", "ray"], choices=["local", "parts", "ray"])
    parser.add_argument("--ray-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="add to the results that are there")
    parser.add_argument("--dry", action="store_true", help="print only, write no results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_input(root, args.pictures)
        end(begin(root, root / "undisturbed"))
        expected = digest(root / "undisturbed")
        run = {
            "local": lambda: kill_local(root, args.kills, expected, rng),
            "parts": lambda: kill_local(root, args.kills, expected, rng, parts=2),
            "ray": lambda: kill_ray(root, args.ray_kills, expected, rng),
        }
        result = {"environment": environment(), "pictures": args.pictures, "shard_size": SHARD}
        result["engines"] = {engine: run[engine]() for engine in args.engines}
    print(json.dumps(result, indent=1))
    if args.add and (before := RESULTS / "extract_kills.json").exists():
        result = add(result, json.loads(before.read_text()))
    if not args.dry:
        save("extract_kills", result)


if __name__ == "__main__":
    main()
