"""The unit of work: `extract_shard` reads one shard of the plan and writes its files, whole or not at all, marker last.

Everything else, resuming, several machines, retries of an engine, is calling it for the shards that have no marker. Two
processes that do the same shard write the same bytes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..checkpoint import open_checkpoint
from ..checkpoint.hub import locate
from ..image import ImageProcessor
from ..loading import Backbone, load
from .commit import GRID, ShardFailed, ShardFiles
from .compute import STORES, Network
from .decode import Preparation
from .folder import Folder, to_json
from .job import NATIVE, checkpoint_digest
from .mesh import Team
from .pipeline import Batch, Pipeline, ReadFailed, Seconds
from .plan import Plan
from .reading import PAUSES, read_items
from .remote import folder_at

Features = dict[str, Sequence[np.ndarray]]
DEATHS = 3  # of processes at work on one shard, before it is tried in a process of its own
PACK = 1024  # patches of a pack for each picture of a batch: those of 512 x 512 pixels


@dataclass(frozen=True)
class Setup:
    """What a process needs to know beside job.json: nothing of it decides a number."""

    folder: str
    model: str
    device: str
    decode_threads: int
    max_rejects: str = "50%"
    loading: dict[str, Any] = field(default_factory=dict)
    """Of the model: subfolder, revision, cache_dir, local_files_only."""


class Worker:
    """A process's model and threads, for any number of shards of one job."""

    def __init__(
        self,
        setup: Setup,
        digest: str | None = None,
        on_pictures: Callable[[int], object] = int,
        model: Backbone | None = None,
        team: Team | None = None,
    ) -> None:
        """digest: of the model's weights, where it is known. on_pictures: told how many more pictures are through.
        model: in place of the one that setup names. team: the mesh that this process is the first of.

        Raises ValueError if the model here is another than the job's.
        """
        self.setup, self.folder, self.on_pictures = setup, folder_at(setup.folder), on_pictures
        self.is_alone = model is None and team is None
        self.job = job = self.folder.read_job()
        self.folder.make(job["outputs"])
        self.plan = Plan(self.folder)
        path = None if model is not None else locate(setup.model, **setup.loading)
        if path is not None and (digest or checkpoint_digest(open_checkpoint(path))) != job["model"]["weights"]:
            raise ValueError(
                f"{setup.model}: other weights than those of the job in {setup.folder}: name the same model"
            )
        preprocessing = job["preprocessing"]
        size = None if preprocessing["size"] == NATIVE else tuple(preprocessing["size"])
        processor = ImageProcessor(size, *(preprocessing[name] for name in ("mean", "std", "rescale_factor", "exif")))
        rounded = preprocessing["resize"] == "uint8"
        names = [name for name in job["outputs"] if name != GRID]
        batch = None if size is None else (job["batch_size"], *size)
        options = (names, job["blocks"], STORES[job["store"]], processor if rounded else None, batch)
        dtype = getattr(torch, job["dtype"])
        if team is not None:
            self.network = team.network(setup.model, setup.loading, dtype, *options)
        else:
            self.network = Network(
                model or load(path, dtype=dtype, device=setup.device),  # type: ignore[arg-type]
                *options,
            )
        self.pipeline = Pipeline(
            setup.decode_threads,
            job["batch_size"],
            Preparation(processor, self.network.model.stride, rounded),
            scaled=preprocessing["scaled_decoding"],
            pin=self.network.device.type == "cuda",
        )

    def submit(self, batch: Batch) -> Callable[[], Features]:
        """Start on a batch; return a function that waits for its features."""
        names = [name for name in self.job["outputs"] if name != GRID]
        if batch.images is not None:
            wait = self.network.submit(batch.images)
            return lambda: dict(zip(names, wait(), strict=True))
        return self._submit_several(batch, names)

    def _submit_several(self, batch: Batch, names: list[str]) -> Callable[[], Features]:
        """The pictures of a batch, which have sizes of their own, in packs of bearable length."""
        p, most = self.network.model.strides[self.network.blocks[-1]], PACK * self.job["batch_size"]
        grids = [None if o.pixels is None else (o.pixels.shape[1] // p, o.pixels.shape[2] // p) for o in batch.outcomes]
        packs: list[list[int]] = []
        tokens = most
        for i, grid in enumerate(grids):
            if grid is not None:
                if tokens + grid[0] * grid[1] > most:
                    packs.append([])
                    tokens = 0
                packs[-1].append(i)
                tokens += grid[0] * grid[1]
        found: dict[int, list[np.ndarray]] = {}
        for pack in packs:
            images = [pixels for i in pack if (pixels := batch.outcomes[i].pixels) is not None]
            found.update(zip(pack, self.network.run_several(images), strict=True))
        nothing = [np.empty(0)] * len(names)
        rows = [found.get(i, nothing) for i in range(len(grids))]
        features: Features = {name: [row[k] for row in rows] for k, name in enumerate(names)}
        if "patch_tokens" in features:  # of several blocks, patches before blocks
            features["patch_tokens"] = [np.moveaxis(x, -2, 0) if x.size else x for x in features["patch_tokens"]]
        features[GRID] = list(np.array([grid or (0, 0) for grid in grids], np.int32))
        return lambda: features

    def close(self) -> None:
        self.pipeline.close()


def extract_shard(worker: Worker, shard: int) -> str | None:
    """Do a shard of the plan, unless it is done: None, or why it could not be.

    A shard at which three processes died is tried once more in a process of its own: if that dies too, the shard is set
    aside for good. Raises OSError if the output can't be written.
    """
    folder = worker.folder
    if folder.has(folder.marker(shard)):
        return None
    dead = folder.deaths().get(shard, [])
    if len(dead) >= DEATHS:
        reason = _set_aside(folder, shard) or _in_a_child(worker, shard, len(dead))
    else:
        reason = _attempt(worker, shard)
    if reason is None:
        for file in (folder.failure(shard), *dead):
            folder.remove(file)
    return reason


def _set_aside(folder: Folder, shard: int) -> str | None:
    """Why the shard is not tried again, if it is not."""
    return folder.failures().get(shard) if folder.has(folder.failure(shard)) else None


def _in_a_child(worker: Worker, shard: int, deaths: int) -> str | None:
    """Do a shard in a process of its own: why it failed, or None."""
    if not worker.is_alone:
        return f"{deaths} processes ended at it: only of a checkpoint, without a mesh, is it tried in one of its own"
    words = [sys.executable, "-m", "dinov3_lite.extraction.shard", json.dumps(asdict(worker.setup)), str(shard)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as child:  # which ends when this end of the pipe does
        status = child.wait()
    folder = worker.folder
    if folder.has(folder.marker(shard)):
        return None
    for file in folder.deaths().get(shard, [])[deaths:]:
        folder.remove(file)
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    file = folder.failure(shard)
    again = f"to have it tried again, delete {folder.where(file)}"
    reason = f"it ended its process {deaths + 1} times, at last by {how}: {again}"
    folder.put(file, to_json({"shard": shard, "reason": reason}))
    return reason


def _attempt(worker: Worker, shard: int) -> str | None:
    folder = worker.folder
    with folder.attempt(shard):
        for pause in (*PAUSES, None):
            try:
                _write_shard(worker, shard)
                return None
            except ReadFailed as error:  # files were tried three times each: an archive is, from its start
                reason = f"reading failed: {error}"
                if pause is None or worker.plan[shard]["kind"] == "files":
                    break
                time.sleep(pause)
            except (ShardFailed, ValueError) as error:
                reason = str(error)
                break
            except OSError as error:
                raise OSError(
                    error.errno, f"can't write shard {shard} ({error.strerror}): the same command goes on from there",
                    error.filename or str(folder),
                ) from error  # fmt: skip
        folder.put(folder.failure(shard), to_json({"shard": shard, "reason": reason}))
        return reason


def _write_shard(worker: Worker, shard: int) -> None:
    start, planned, seconds = time.perf_counter(), worker.plan[shard], Seconds()
    with ShardFiles(worker.folder, worker.job, shard, planned["count"]) as files:
        under_way: deque[tuple[Batch, Callable[[], Features]]] = deque()
        for batch in worker.pipeline.batches(read_items(worker.plan, planned)):
            seconds.add(*(outcome.seconds for outcome in batch.outcomes))
            with seconds.of("forward"):
                under_way.append((batch, worker.submit(batch)))
            if len(under_way) > 1:
                _keep(files, seconds, *under_way.popleft())
            worker.on_pictures(len(batch.keys))
        for batch, features in under_way:
            _keep(files, seconds, batch, features)
        again = planned.get("doubled", ()) if planned["kind"] == "files" else ()  # in a tar they may be other pictures
        files.check(worker.setup.max_rejects, set(again))
        with seconds.of("write"):
            marker = files.publish()
    _log(worker, marker, seconds, time.perf_counter() - start)


def _keep(files: ShardFiles, seconds: Seconds, batch: Batch, features: Callable[[], Features]) -> None:
    with seconds.of("forward"):
        rows = features()
    with seconds.of("write"):
        files.append(batch, rows)


def _log(worker: Worker, marker: dict[str, Any], seconds: Seconds, whole: float) -> None:
    line = {
        "shard": marker["shard"],
        "pictures": marker["pictures"],
        "rejects": len(marker["rejects"]),
        "seconds": {"whole": round(whole, 3), **{name: round(value, 3) for name, value in asdict(seconds).items()}},
        "device": str(worker.network.device),
        "torch": torch.__version__,
        "at": round(time.time(), 3),  # seconds since 1970, at its end
    }
    log = worker.folder.log / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
    worker.folder.hand_over([log], keep=True)


def main(setup: str, shard: str) -> None:
    """What `_in_a_child` runs."""

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    worker = Worker(Setup(**json.loads(setup)))
    _attempt(worker, int(shard))
    worker.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
