"""Write a plan as a safetensors file, piece by piece, under its name only once it is whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from dinov3_lite.weights import DTYPES

from .plan import Plan

ALIGNMENT = 64  # bytes; the data starts on a cache line, as matrix kernels like it
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path: Path, plan: Plan, on_bytes: Callable[[int], Any]) -> None:
    """Write the file, calling `on_bytes` with the size of each piece written."""
    with _replacing(path) as file:
        file.write(_header(plan))
        for entry in plan.entries:
            for part in entry.parts():
                data = part.reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                on_bytes(data.nbytes)


def _header(plan: Plan) -> bytes:
    """Eight bytes of length, then JSON padded with spaces (https://huggingface.co/docs/safetensors, "Format")."""
    header: dict[str, Any] = {"__metadata__": plan.metadata}
    offset = 0
    for entry in plan.entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file in the same folder, flushed to disk and renamed to `path` at the end, or removed on failure."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
