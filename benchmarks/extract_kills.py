"""`extract` under SIGKILL: whatever step it comes at, going on ends in the same bytes.

    python benchmarks/extract_kills.py [--kills 200] [--ray-kills 20] [--engines local parts ray] [--seed 0] [--add]

A job of tiny pictures is begun and killed again and again, at each named step in turn and at random moments; when it is
complete, its files (but logs) are compared with those of an undisturbed run, and it is begun anew. `local` is one
process, `parts` two at once of which one is killed, `ray` two actors of a running Ray of which one is killed. Writes
benchmarks/results/extract_kills.json; `--add`, with another seed, adds to what that holds.
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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
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
    "rows half written": (writer, "_write_all", half_written),
    "rows appended": (commit.ShardFiles, "append", None),
    "before a rename": (os, "replace", None),
    "after a rename": (os, "replace", os.replace),
    "all renamed": (os, "fsync", None),
    "job or index": (folder.Folder, "put", None),
}


def kill_at(step: str, calls: int) -> None:
    """Have this process killed at that call of the step."""
    where, name, first = STEPS[step]
    original, left = getattr(where, name), [calls]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if first is not None:
                first(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(where, name, deadly)


def begin(root: Path, output: Path, step: str | None = None, calls: int = 1, part: str | None = None) -> int:
    """`extract` in a child of this process, to be killed at a step; its number."""
    child = os.fork()
    if child:
        return child
    try:
        if step:
            kill_at(step, calls)
        extract(root, output, part=part)
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
        child = begin(root, output, named, rng.choice((1, 1, 2, 5, 9)), f"0/{parts}" if parts > 1 else None)
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


def kill_ray(root: Path, kills: int, expected: str, rng: random.Random) -> dict[str, Any]:
    """Kill one of two actors at random moments, while the job runs, until there were as many kills."""
    import threading

    import psutil
    import ray

    seen, jobs, output = 0, 0, root / "ray"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    try:
        while seen < kills:
            failure: list[BaseException] = []

            def work(failure: list[BaseException] = failure) -> None:
                try:
                    extract(root, output, engine="ray", workers=2)
                except BaseException as error:
                    failure.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            killed = 0
            while thread.is_alive():
                time.sleep(rng.uniform(0.2, 1.5))
                at_work = [int(file.name.split(".")[1]) for file in (output / "attempts").glob("*")]
                alive = [pid for pid in at_work if psutil.pid_exists(pid)]
                if alive and seen + killed < kills and killed < 4:
                    os.kill(rng.choice(alive), signal.SIGKILL)
                    killed += 1
            if failure:
                raise failure[0]
            found = digest(output)
            assert found == expected, "the files differ"
            shutil.rmtree(output)
            seen, jobs = seen + killed, jobs + 1
            if not killed and jobs > kills + 5:
                break
    finally:
        ray.shutdown()
    return {"kills": {"an actor at work": seen}, "jobs_completed": jobs}


def add(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One result of two, of different seeds."""
    engines = {**other["engines"], **result["engines"]}
    for engine in result["engines"].keys() & other["engines"].keys():
        one, two = result["engines"][engine], other["engines"][engine]
        engines[engine] = {
            "kills": dict(sorted((Counter(one["kills"]) + Counter(two["kills"])).items())),
            "jobs_completed": one["jobs_completed"] + two["jobs_completed"],
            **{name: max(one[name], two[name]) for name in one if name.startswith("most")},
        }
    return {**result, "engines": {name: engines[name] for name in sorted(engines)}}


def table(result: dict[str, Any]) -> str:
    lines = ["| engine | kills | of them at a named step | jobs completed | shards redone a kill, at most |"]
    lines += ["|---|---|---|---|---|"]
    for engine, found in result["engines"].items():
        kills = sum(found["kills"].values())
        named = sum(count for step, count in found["kills"].items() if step in STEPS)
        redone = found.get("most_shards_redone_a_kill", "-")
        lines.append(f"| {engine} | {kills} | {named} | {found['jobs_completed']} | {redone} |")
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
