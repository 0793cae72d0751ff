"""`extract`: which process does which shard. This process, the parts that a launcher tells of, or Ray's actors."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from ..console import sentence
from ..extras import needed
from ..image import ImageProcessor
from ..loading import Backbone
from .commit import complete
from .compute import device_of
from .folder import Folder
from .job import Request, prepare
from .mesh import Team, parse_mesh
from .parts import Part, local_device, local_threads, parse_part, part_from_environment
from .plan import Plan
from .progress import Bar
from .remote import folder_at
from .shard import Setup, Worker, extract_shard
from .store import FeatureStore, open_features

ENGINES = ("local", "ray")


class ShardsFailed(RuntimeError):
    """Some shards could not be done. `failures`: the reason of each. All others are there: `open_features`."""

    def __init__(self, folder: str, failures: dict[int, str], total: int) -> None:
        self.failures = failures
        first, reason = next(iter(failures.items()))
        super().__init__(f"{folder}: {len(failures)} of {total} shards failed; shard {first}: {reason}")


class Stopped(RuntimeError):
    """SIGTERM came: what was begun is finished, and the same call goes on from there."""


def extract(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] | Backbone,
    output: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = ("cls_token",),
    blocks: Sequence[int] | int | None = None,
    size: int | tuple[int, int] | str | None = None,
    dtype: Any = None,
    store: str = "float16",
    batch_size: int | None = None,
    shard_size: int | None = None,
    resize: str = "float32",
    scaled_decoding: bool = False,
    column: str | None = None,
    device: str | None = None,
    decode_threads: int | None = None,
    max_rejects: str | int = "50%",
    part: str | None = None,
    mesh: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    progress: bool | None = None,
    processor: ImageProcessor | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> FeatureStore:
    """Compute the features of all pictures in `inputs` into a folder of numpy files; called again, it resumes.

    inputs: one or several of: a folder (recursively), a list of paths (.txt, one a line, relative to it), a picture;
        tar files (as webdataset's) or parquet files, patterns of them (`*`, `{000..099}`); URLs of all those.
    model: a checkpoint folder, a converted file or a hub id; or a model in evaluation mode, say one that you have
        trained. Of that the weights are compared when a job goes on; hooks and replaced modules can't be.
    output: the folder, made if need be, or a URL in an object store (s3://, gs://, az://, ...).
    outputs: of "cls_token" (C,), "patch_mean" (C,), "patch_tokens" (h*w, C) and "register_tokens" (R, C), each after
        the final LayerNorm. blocks: indices of the blocks they are taken from; several put an axis of blocks first in
        each row. None is the last block. A ConvNeXt's blocks are its stages, one at a time, as their channels differ;
        before the last they have no norm.
    size: pixels a side, (height, width), None for the checkpoint's, or "native": each picture in its own size,
        rounded to whole patches, and run as one sequence with others, without padding (a ConvNeXt: one by one).
    dtype: of the weights, "float32", "bfloat16" or "float16"; None is the checkpoint's own. store: of the files,
        "float16" or "float32".
    batch_size: pictures a forward: 64, native 8. shard_size: pictures a shard: 4096, with patch tokens 1024. A tar is
        one shard, whatever its length.
    resize: "float32" as `ImageProcessor`; "uint8" rounds resized pixels to whole numbers, as torchvision's transforms
        do: faster, and a quarter of the bytes to a GPU. scaled_decoding: let JPEGs of more than four times the
        wanted size be decoded at a half, a quarter or an eighth of theirs. docs/extract.md has what both change.
    column: the one that holds the pictures in parquet files; needed where several hold bytes.
    device: "cpu", "cuda", "cuda:1"; None is a GPU if there is one. decode_threads: None is one a core.
    max_rejects: how many pictures of a shard may be rejected, a number or "P%" (which always allows ten).
    part: "I/N", as N processes at once share the shards; None reads what torchrun, SLURM or Kubernetes say.
    mesh: "tp=N": under torchrun, N processes share one model and do a part together, by tensor parallelism. The first
        of each N writes; in the others this returns, or raises, when that is done. The job keeps N (last bits).
    engine: "local" is this process; "ray" is `workers` actors, on the cluster of RAY_ADDRESS or on this machine.
    progress: a bar; None shows one on a terminal.
    processor: None is the checkpoint's own; a model that is an object needs one. `size` overrides its size.
    subfolder: of the checkpoint. revision, cache_dir, local_files_only: as in huggingface_hub, for a hub id.

    Raises FileNotFoundError, TypeError and ValueError for what can't be begun, ShardsFailed when all but some shards
    are done, Stopped after SIGTERM, and OSError if the output can't be written.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
    if not re.fullmatch(r"\d+%?|\d+\.\d+%", str(max_rejects)):
        raise ValueError(f"max_rejects {max_rejects!r}: expected a number of pictures, or a share of a shard as '5%'")
    for name, count in (("decode_threads", decode_threads), ("workers", workers)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}: expected at least 1")
    if workers is not None and engine != "ray":
        raise ValueError(f"workers is {workers}, and engine {engine!r} is this process: ask for engine 'ray'")
    _check_device(device, engine)
    _check_model(model, engine, device)
    source: str | Backbone = model if isinstance(model, Backbone) else os.fspath(model)
    if mesh and (engine != "local" or not isinstance(source, str)):
        raise ValueError(f"mesh {mesh!r} loads a checkpoint in every process of torchrun's: give one, and no engine")
    hub = {"subfolder": subfolder, "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = folder_at(output)
    request = Request(
        inputs=tuple(os.fspath(path) for path in ([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs)),
        model=source,
        loading={name: str(value) if name == "cache_dir" else value for name, value in hub.items() if value},
        processor=processor,
        outputs=(outputs,) if isinstance(outputs, str) else tuple(outputs),
        blocks=None if blocks is None else (blocks,) if isinstance(blocks, int) else tuple(blocks),
        size=(size, size) if isinstance(size, int) else size,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        store=store,
        batch_size=batch_size,
        shard_size=shard_size,
        resize=resize,
        scaled_decoding=scaled_decoding,
        column=column,
        tp=parse_mesh(mesh) if mesh else 1,
    )
    mine = parse_part(part) if part else part_from_environment()
    with Team(request.tp, device) if mesh else nullcontext() as team:
        if team is not None and not team.leads:
            with _ends_after_the_shard():  # of the first process, which says when it is done
                team.follow()
            return open_features(output)
        if team is not None:
            mine = team.part(mine, given=bool(part))
        job = prepare(folder, request)
        setup = Setup(
            folder=folder.address,
            model=_anywhere(source) if isinstance(source, str) else "",
            loading=request.loading,
            device=device or local_device(),
            decode_threads=decode_threads or local_threads() * request.tp,
            max_rejects=str(max_rejects),
        )
        total = len(Plan(folder))
        with Bar(folder, job["plan"], progress) as bar:
            shards = _missing(folder, mine, total)
            if not shards:
                failures = {}
            elif engine == "ray":
                failures = run_ray(setup, shards, bar, workers)
            else:
                given = None if isinstance(source, str) else source
                failures = run_local(Worker(setup, job["model"]["weights"], bar.add, given, team), shards, bar)
    complete(folder, total)
    if failures:
        raise ShardsFailed(setup.folder, failures, total)
    return open_features(output)


def _anywhere(source: str) -> str:
    """A path that other working directories know too; a hub id as it is."""
    return os.path.abspath(source) if os.path.exists(source) else source


def _check_device(device: str | None, engine: str) -> None:
    """Raises ValueError for a device that PyTorch does not know, and for a GPU where this process has none."""
    try:
        kind = None if device is None else torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: expected 'cpu', 'cuda' or, of several GPUs, 'cuda:1'") from error
    if kind == "cuda" and engine == "local" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: PyTorch finds no GPU here: leave it out, or give 'cpu'")


def _check_model(model: Any, engine: str, device: str | None) -> None:
    """Raises TypeError or ValueError for an object that is no model, or can't be run as is asked."""
    if isinstance(model, (str, os.PathLike)):
        return
    if not isinstance(model, Backbone):
        raise TypeError(f"model is a {type(model).__name__}: expected a checkpoint or a DINOv3ViT or DINOv3ConvNeXt")
    if engine != "local":
        raise ValueError(f"engine {engine!r} loads the model in other processes: save it, and give the checkpoint")
    if device is not None and torch.device(device) != (found := device_of(model)):
        raise ValueError(f"device {device!r}, and the model is on {found}: move it, model.to({device!r})")


def _missing(folder: Folder, part: Part, total: int) -> list[int]:
    """What is to be done, in order; what processes died at comes last."""
    done, deaths = set(folder.done()), folder.deaths()
    return sorted((i for i in range(total) if i in part and i not in done), key=lambda i: (len(deaths.get(i, ())), i))


def run_local(worker: Worker, shards: list[int], bar: Bar) -> dict[int, str]:
    """Do the shards one after the other in this process; return the reason of each that failed."""
    failures = {}
    try:
        with _ends_after_the_shard() as stopped:
            for shard in shards:
                if (reason := extract_shard(worker, shard)) is not None:
                    failures[shard] = reason
                bar.count()
                if stopped():
                    raise Stopped(f"{worker.folder}: stopped by SIGTERM after shard {shard}: the same command goes on")
    finally:
        worker.close()
    return failures


@contextmanager
def _ends_after_the_shard() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, which then no longer ends the process by itself."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where signals can't be handled
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


class RayWorker:
    """A Worker in an actor of Ray Data: a row in is a shard's number, a row out what became of it.

    Errors that end the job are told, not raised: Ray would bury their sentence in pages of its own.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self.setup = Setup(**setup)
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (shard,) = batch["shard"]
        reason, error = None, ""
        try:
            self.worker = self.worker or Worker(self.setup)  # which compares the weights: they may be others by now
            reason = extract_shard(self.worker, int(shard))
        except Exception as raised:
            error = sentence(raised)
        return {"shard": [shard], "reason": [reason or ""], "error": [error]}


def run_ray(setup: Setup, shards: list[int], bar: Bar, workers: int | None) -> dict[int, str]:
    """Do the shards in a pool of Ray's actors. Neither pictures nor features pass through its object store.

    Ray replaces actors that die and gives their shards to others; what a shard's files hold it does not know.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with needed("engine 'ray'", "Ray Data", "'dinov3-lite[ray]'"):
        import ray
        import ray.data
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return {i: reason for i, reason in _ray_outcomes(ray, setup, shards, workers, bar) if reason}
    finally:
        if started_here:
            ray.shutdown()


def _ray_outcomes(
    ray: Any, setup: Setup, shards: list[int], workers: int | None, bar: Bar
) -> Iterable[tuple[int, str]]:
    resources = ray.cluster_resources()
    gpu = setup.device.startswith("cuda")
    workers = min(len(shards), workers or int(resources.get("GPU" if gpu else "CPU", 1)))
    cores = max(1, int(resources.get("CPU", 1)) // workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    numbers = ray.data.from_items([{"shard": i} for i in shards], override_num_blocks=len(shards))
    done = numbers.map_batches(
        RayWorker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        fn_constructor_kwargs={
            "setup": {**asdict(setup), "device": "cuda" if gpu else setup.device},  # Ray shows an actor its GPU alone
        },
        num_cpus=cores if gpu else 1,
        num_gpus=1 if gpu else 0,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise RuntimeError(row["error"])
        bar.count()
        yield int(row["shard"]), row["reason"]
