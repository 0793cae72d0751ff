"""All that decides the numbers: made from what was asked for, kept in job.json, compared when a job goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..checkpoint import DTYPES, Checkpoint, open_checkpoint
from ..checkpoint.hub import locate
from ..checkpoint.layouts import tensors_of
from ..checkpoint.layouts.vit import storage_dtype
from ..image import ImageProcessor
from ..loading import Backbone, skeleton
from .commit import GRID
from .compute import OUTPUTS, STORES, weights_digest
from .decode import decoders
from .folder import FORMAT, Folder
from .plan import Plan, plan_digest, write_plan
from .sources import find_sources, is_url

GLOBAL_SHARD, DENSE_SHARD = 4096, 1024  # pictures; dense features are a hundred times as large
BATCH, NATIVE_BATCH = 64, 8  # pictures
NATIVE = "native"


@dataclass(frozen=True)
class Request:
    """What a user asks for: see `extract`."""

    inputs: tuple[str, ...]
    model: str | Backbone
    loading: dict[str, Any] = field(default_factory=dict)
    """How `locate` finds the model: subfolder, revision and so on."""
    processor: ImageProcessor | None = None
    outputs: tuple[str, ...] = ("cls_token",)
    blocks: tuple[int, ...] | None = None
    size: tuple[int, int] | str | None = None
    dtype: str | None = None
    store: str = "float16"
    batch_size: int | None = None
    shard_size: int | None = None
    resize: str = "float32"
    scaled_decoding: bool = False
    column: str | None = None
    tp: int = 1
    """How many processes share a model."""

    def __post_init__(self) -> None:
        if isinstance(self.model, Backbone):
            self._check_object(self.model)
        for name, known in (("outputs", OUTPUTS), ("store", STORES), ("resize", ("float32", "uint8"))):
            value = getattr(self, name)
            for choice in value if isinstance(value, tuple) else (value,):
                if choice not in known:
                    raise ValueError(
                        f"{name} {choice!r}: expected {'some' if name == 'outputs' else 'one'} of {', '.join(known)}"
                    )
        if not self.outputs or len(set(self.outputs)) < len(self.outputs):
            raise ValueError(f"outputs {self.outputs}: expected some of {', '.join(OUTPUTS)}, each once")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}, or none for the checkpoint's own"
            )
        for name in ("batch_size", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        if self.scaled_decoding and self.size == NATIVE:
            raise ValueError("scaled decoding makes pictures smaller, and their native size is asked for: choose one")

    def _check_object(self, model: Backbone) -> None:
        if model.training:
            raise ValueError("the model is in training mode, where features are random: call model.eval() first")
        if self.loading:
            raise ValueError(f"{', '.join(self.loading)}: of a model that is loaded already")
        if self.processor is None:
            raise ValueError(
                "the model is an object, which knows no preprocessing: give a processor, as "
                "dinov3_lite.ImageProcessor.from_pretrained(checkpoint)"
            )
        if self.dtype not in (None, found := _dtype(model)):
            raise ValueError(f"dtype {self.dtype!r}, and the model's is {found}: give model.to(torch.{self.dtype})")


def prepare(folder: Folder, request: Request) -> dict[str, Any]:
    """The job of this folder: made of the request, or found there, and then the same.

    Raises FileNotFoundError for a missing input or model, ValueError for a request that can't be met and for a folder
    that holds another job, naming each field that differs; OSError for a folder that can't be written.
    """
    wanted = describe(request)
    if not folder.has(folder.job):
        if folder.path.is_file():
            raise NotADirectoryError(f"{folder}: is a file: the output is a folder, name another")
        if not folder.plan.is_dir():
            sources = find_sources(list(request.inputs))  # before there is a folder, in case there are none
            folder.path.mkdir(parents=True, exist_ok=True)
            write_plan(
                folder, sources, wanted["shard_size"], request.column, wanted, cut=request.shard_size is not None
            )
        folder.hand_over(sorted(folder.plan.iterdir()), keep=True)
        folder.put(folder.job, (folder.plan / "job.json").read_bytes())
    job = folder.read_job()
    if not folder.plan_appears_whole:
        plan = Plan(folder)
        if plan_digest(plan.folder) != job["plan"]["sha256"]:
            raise ValueError(
                f"{folder}: its plan is not that of its job.json: two processes began at once, from inputs that "
                "differ: delete it, and begin anew"
            )
    if different := differences({k: v for k, v in job.items() if k != "plan"}, wanted):
        raise ValueError(
            f"{folder}: holds another job: {'; '.join(different)}: give another output folder, or ask for the same"
        )
    return job


def describe(request: Request) -> dict[str, Any]:
    """The job of a request, but for its plan."""
    if isinstance(request.model, Backbone):
        model, dtype = request.model, _dtype(request.model)
        weights = weights_digest(sorted(tensors_of(model.state_dict(), model.config).items()))
        processor = request.processor
    else:
        checkpoint = open_checkpoint(path := locate(request.model, **request.loading))
        model, dtype = skeleton(checkpoint.config), request.dtype or _dtype(checkpoint)
        weights = checkpoint_digest(checkpoint)
        processor = request.processor or ImageProcessor.from_pretrained(path)
    assert processor is not None
    if request.size == NATIVE:
        size = None
    else:
        size = request.size or processor.size
        if size is None:
            raise ValueError(f"the preprocessing does not resize: give a size, or {NATIVE!r}")
        model.grid_of(*size)
    blocks = _blocks(request.blocks, model.depth)
    _check_outputs(request.outputs, model, blocks)
    dense = "patch_tokens" in request.outputs
    return {
        "format": FORMAT,
        "inputs": _inputs(request.inputs),
        "column": request.column,
        "model": {
            "name": model.config.name,
            "weights": weights,
            "config": json.loads(json.dumps(asdict(model.config))),
        },
        "dtype": dtype,
        "preprocessing": {
            **json.loads(json.dumps(asdict(processor))),
            "size": NATIVE if size is None else list(size),
            "resize": request.resize,
            "scaled_decoding": request.scaled_decoding,
        },
        "decoder": decoders(),
        "outputs": _shapes(request.outputs, model, size, blocks),
        "blocks": blocks,
        "store": request.store,
        "batch_size": request.batch_size or (NATIVE_BATCH if size is None else BATCH),
        "shard_size": request.shard_size or (DENSE_SHARD if dense else GLOBAL_SHARD),
        **({"mesh": {"tp": request.tp}} if request.tp > 1 else {}),  # sums over processes round otherwise
    }


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """`weights_digest` of a checkpoint."""
    return weights_digest(
        (name, tensor.to(storage_dtype(name, tensor.dtype)))  # as a model of it holds them
        for name, tensor in ((name, checkpoint.tensor(name)) for name in sorted(checkpoint.names()))
    )


def _dtype(model: Backbone | Checkpoint) -> str:
    return str(model.dtype).removeprefix("torch.")


def _inputs(inputs: Sequence[str]) -> list[str]:
    paths = [path if is_url(path) else os.path.abspath(path) for path in inputs]
    if len(paths) <= 16:
        return paths
    digest = hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
    return [paths[0], f"and {len(paths) - 1} more, sha256 {digest}"]


def _blocks(blocks: tuple[int, ...] | None, depth: int) -> list[int] | None:
    if blocks is None:
        return None
    if not blocks or not all(-depth <= i < depth for i in blocks):
        raise ValueError(f"blocks {list(blocks)}: expected indices from {-depth} to {depth - 1}")
    return sorted({i % depth for i in blocks})


def _check_outputs(outputs: Sequence[str], model: Backbone, blocks: list[int] | None) -> None:
    """Raise ValueError for what a ConvNeXt does not have: stages of one shape, register tokens."""
    widths = [model.embed_dims[i] for i in blocks or ()]
    if len(set(widths)) > 1:
        raise ValueError(
            f"blocks {blocks}: are stages of {', '.join(map(str, widths))} channels, which make no one array: "
            "extract them one at a time"
        )
    if "register_tokens" in outputs and not model.n_storage_tokens:
        raise ValueError(f"outputs has register_tokens, and {model.config.name} has none: leave it out")


def _shapes(
    outputs: Sequence[str], model: Backbone, size: Any, blocks: list[int] | None
) -> dict[str, list[int | None]]:
    """The shape of one row of each output; None where it differs from picture to picture."""
    last = -1 if blocks is None else blocks[-1]
    C, s = model.embed_dims[last], model.strides[last]
    patches = None if size is None else (size[0] // s) * (size[1] // s)
    of_block: dict[str, list[int | None]] = {
        "cls_token": [C],
        "patch_mean": [C],
        "patch_tokens": [patches, C],
        "register_tokens": [model.n_storage_tokens, C],
    }
    several = [len(blocks)] if blocks is not None and len(blocks) > 1 else []
    shapes = {output: [*several, *of_block[output]] for output in outputs}
    return {**shapes, GRID: [2]} if size is None else shapes


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs, a clause a field."""
    clauses = []
    for name in sorted({*found, *wanted}):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            clauses += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            clauses.append(f"{prefix}{name} is {_short(a)} there and {_short(b)} here")
    return clauses


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:16]}..."
