"""Features in other formats: parquet and Lance for databases, webdataset's tars for training. A shard at a time."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import whole_files
from ..extras import needed
from .store import FeatureStore, open_features

READERS = "float32"  # in tables: neither Spark nor polars reads halves from both formats


def convert(folder: str | os.PathLike[str], destination: str | os.PathLike[str], to: str) -> str:
    """Write the features of a complete job as "parquet" (a file a shard), "webdataset" (a tar a shard) or "lance".

    Parquet and Lance have the columns `key`, and one of float32 lists an output. A sample of a tar is named by its
    row's number: `000000000017.key.txt`, `000000000017.cls_token.npy`. Returns what was written, in words.

    Raises ValueError for another format, for a job that is not complete, and for a destination that is not empty;
    ImportError without pyarrow or Lance.
    """
    if to not in FORMATS:
        raise ValueError(f"format {to!r}: expected one of {', '.join(FORMATS)}")
    store, destination = open_features(folder), Path(destination)
    if store.missing:
        raise ValueError(f"{store.folder}: {len(store.missing)} shards are missing: extract them first")
    if destination.exists() and any(destination.iterdir()):
        raise ValueError(f"{destination}: is not empty: give a new folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    FORMATS[to](store, destination)
    return f"{destination}: {len(store)} rows of {', '.join(store.outputs)} as {to}"


def _to_parquet(store: FeatureStore, destination: Path) -> None:
    _pyarrow("parquet")
    from pyarrow.parquet import write_table

    destination.mkdir(exist_ok=True)
    for shard, table in _tables(store):
        with whole_files() as files, files.create(destination / f"{shard:08d}.parquet") as file:
            write_table(table, file, compression="zstd")


def _to_lance(store: FeatureStore, destination: Path) -> None:
    _pyarrow("lance")
    with needed("writing lance", "pylance", "pylance"):
        import lance
    tables = _tables(store)
    _, first = next(tables)

    def batches() -> Iterator[Any]:
        yield from first.to_batches()
        for _, table in tables:
            yield from table.to_batches()

    lance.write_dataset(batches(), str(destination), schema=first.schema)


def _to_webdataset(store: FeatureStore, destination: Path) -> None:
    destination.mkdir(exist_ok=True)
    for shard, first, keys, rows in _shards(store):
        path = destination / f"{shard:08d}.tar"
        with whole_files() as files, files.create(path) as file, tarfile.open(fileobj=file, mode="w|") as tar:
            for i, key in enumerate(keys):
                _add(tar, f"{first + i:012d}.key.txt", key.encode("utf-8", "surrogateescape"))
                for name, values in rows.items():
                    content = io.BytesIO()
                    np.save(content, values[i])
                    _add(tar, f"{first + i:012d}.{name}.npy", content.getvalue())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


FORMATS: dict[str, Callable[[FeatureStore, Path], None]] = {
    "parquet": _to_parquet,
    "webdataset": _to_webdataset,
    "lance": _to_lance,
}


def _pyarrow(format: str) -> Any:
    with needed(f"writing {format}", "pyarrow", "'dinov3-lite[arrow]'"):
        import pyarrow
    return pyarrow


def _shards(store: FeatureStore) -> Iterator[tuple[int, int, list[str], dict[str, Any]]]:
    """(shard, its first row, keys, rows of each output)."""
    blocks = zip(store.keys.blocks(), *(store[name].blocks() for name in store.outputs), strict=True)
    for shard, first, (keys, *rows) in zip(store.shards, store.offsets, blocks, strict=False):
        yield shard, int(first), keys, dict(zip(store.outputs, rows, strict=True))


def _tables(store: FeatureStore) -> Iterator[tuple[int, Any]]:
    """(shard, its arrow table)."""
    import pyarrow

    for shard, _, keys, rows in _shards(store):
        names = [key.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for key in keys]
        columns = {"key": pyarrow.array(names, pyarrow.string())}
        for name, values in rows.items():
            columns[name] = _ragged_column(values, store[name]) if isinstance(values, list) else _column(values)
        yield shard, pyarrow.table(columns)


def _column(values: Any) -> Any:
    """(n, a, b, ..) -> n lists of a lists of b .. float32 numbers; int32 stay so."""
    import pyarrow

    flat = np.ascontiguousarray(values).reshape(-1)
    array = pyarrow.array(flat if flat.dtype == np.int32 else flat.astype(READERS))
    for length in reversed(values.shape[1:]):
        array = pyarrow.FixedSizeListArray.from_arrays(array, length)
    return array


def _ragged_column(values: list[Any], rows: Any) -> Any:
    """From n arrays (p_i, C), or (K, p_i, C), -> n lists of p_i lists of C (or of K lists of C) float32 numbers."""
    import pyarrow

    moved = [np.moveaxis(value, -2, 0) for value in values]
    offsets = np.concatenate(([0], np.cumsum([len(value) for value in moved], dtype=np.int64)))
    shape = [n for n in rows.shape[1:] if n is not None]
    flat = _column(np.concatenate([np.empty((0, *shape), np.float32), *moved]))
    return pyarrow.LargeListArray.from_arrays(offsets, flat)
