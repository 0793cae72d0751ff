"""Reading what `extract` wrote: rows by number, memory-mapped, with numpy alone. Complete or not."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from .folder import from_line
from .remote import folder_at

OPEN = 64  # files kept open of each output


def open_features(folder: str | os.PathLike[str]) -> FeatureStore:
    """Open the features in a folder that `extract` wrote or is still writing: those of the finished shards.

    folder: of this machine, or the URL of one in an object store, whose files are fetched when rows of them are used.

    Returns a FeatureStore. Raises FileNotFoundError if there is no such folder, ValueError if it is another kind.
    """
    return FeatureStore(folder)


class FeatureStore:
    """Rows of features in the order of the plan, each with its key. Needs neither torch nor the model.

    store["cls_token"][i]   features of picture i, a numpy array; slices and lists of numbers give several
    store.keys[i]           its key: path in the folder, line of the list, tar/member or parquet file/row
    len(store)              how many rows there are
    store.rejects           pictures without a row: dictionaries with key, reason, shard and picture (in the shard)
    store.missing           numbers of the shards that are not done
    store.job               the settings that decide the features: model, sizes, dtypes, outputs
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder_at(folder)
        self.job = self.folder.read_job()
        total = self.job["plan"]["shards"]
        self._markers: dict[int, dict[str, Any]] = {}
        if self.folder.has(self.folder.index):
            index = self.folder.read_json(self.folder.index)
            self.shards, rows, rejects = list(range(total)), index["rows"], index["rejects"]
        else:
            self.shards = self.folder.done()
            markers = self.folder.read_all([self.folder.marker(i) for i in self.shards])
            self._markers = dict(zip(self.shards, markers, strict=True))
            rows = [marker["rows"] for marker in self._markers.values()]
            rejects = [len(marker["rejects"]) for marker in self._markers.values()]
        self._with_rejects = [shard for shard, count in zip(self.shards, rejects, strict=True) if count]
        self.offsets = np.concatenate(([0], np.cumsum(rows, dtype=np.int64)))
        """Row at which each shard begins, and the number of all rows."""
        self.missing = sorted(set(range(total)) - set(self.shards))
        self._arrays: dict[str, Rows] = {}

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name} {self[name].shape[1:]}" for name in self.outputs)
        missing = f", {len(self.missing)} shards missing" if self.missing else ""
        return f"FeatureStore({str(self.folder)!r}: {len(self)} rows of {outputs}{missing})"

    @property
    def outputs(self) -> list[str]:
        """Names of the stored outputs, such as "cls_token"."""
        return list(self.job["outputs"])

    def __getitem__(self, output: str) -> Rows:
        if output not in self.job["outputs"]:
            raise KeyError(f"{self.folder} holds {', '.join(self.outputs)}, not {output!r}")
        if output not in self._arrays:
            ragged = None in self.job["outputs"][output]
            self._arrays[output] = RaggedRows(self, output) if ragged else Rows(self, output)
        return self._arrays[output]

    @cached_property
    def keys(self) -> Keys:
        """The key of each row's picture, a sequence of strings."""
        return Keys(self)

    @property
    def rejects(self) -> list[dict[str, Any]]:
        """Pictures without a row, and why."""
        found = []
        unread = [shard for shard in self._with_rejects if shard not in self._markers]
        markers = self.folder.read_all([self.folder.marker(shard) for shard in unread])
        self._markers |= dict(zip(unread, markers, strict=True))
        for shard in self._with_rejects:
            found += [{**reject, "shard": shard} for reject in self._markers[shard]["rejects"]]
        return found

    def dataset(self, *outputs: str) -> Any:
        """A torch Dataset: item i is (the features of each output named, as tensors, and the key) of row i."""
        from .dataset import FeatureDataset

        return FeatureDataset(self, outputs or tuple(self.outputs))


class _ByShard(Sequence[Any]):
    """Something for each row, held shard by shard."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # what is mapped here would go with it as bytes

    def _load(self, shard: int) -> Any:
        raise NotImplementedError

    def _one(self, loaded: Any, row: int) -> Any:
        return loaded[row]

    def _several(self, rows: Sequence[int]) -> Any:
        return [self[row] for row in rows]

    def __len__(self) -> int:
        return len(self.store)

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> Any: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self._several(range(*i.indices(len(self))))
        if isinstance(i, tuple):
            raise TypeError(f"{i} is a tuple, and rows lie in many files: take rows first, as x[3][:5] or x[[0, 2]]")
        index = np.asarray(i)
        if index.ndim == 1:
            return self._several(self._numbers(index).tolist())
        if index.ndim:
            raise self._no_rows(f"rows of shape {index.shape}")
        if index.dtype.kind not in "iu":
            raise self._no_rows(f"row {i!r:.60}")
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i}: there are {len(self)}")
        row = int(i) % len(self)
        number = bisect_right(self.store.offsets, row) - 1
        return self._one(self._of_shard(number), row - int(self.store.offsets[number]))

    def _numbers(self, index: np.ndarray) -> np.ndarray:
        """The rows that a list of numbers, or a mask with a value for each row, stands for."""
        if index.dtype == bool:
            if len(index) != len(self):
                raise IndexError(f"mask of {len(index)} values for {len(self)} rows: expected one value a row")
            return np.flatnonzero(index)
        if index.size and index.dtype.kind not in "iu":
            raise self._no_rows(f"row {index.tolist()[0]!r:.60}")
        return index

    @staticmethod
    def _no_rows(what: str) -> IndexError:
        return IndexError(
            f"{what}: expected a whole number, a slice, a list of numbers or a mask; that of a key is "
            "store.keys.index(key)"
        )

    def _of_shard(self, number: int) -> Any:
        """What belongs to the shard at this place among those that are done."""
        if number not in self._open:
            self._open[number] = self._load(self.store.shards[number])
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def blocks(self) -> Iterator[Any]:
        """All rows, a shard at a time."""
        for number in range(len(self.store.shards)):
            yield self._load(self.store.shards[number])


class Keys(_ByShard):
    """The keys, read when they are used."""

    def _load(self, shard: int) -> list[str]:
        with self.store.folder.open(self.store.folder.keys(shard)) as file:
            return [from_line(line) for line in file]


class Rows(_ByShard):
    """One output of all rows: like an array of `shape` and `dtype`, mapped from the files shard by shard."""

    def __init__(self, store: FeatureStore, output: str) -> None:
        super().__init__(store)
        self.output = output

    @property
    def shape(self) -> tuple[Any, ...]:
        """Rows first; None where rows differ."""
        return (len(self), *self.store.job["outputs"][self.output])

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of the files."""
        return np.dtype("int32" if self.output == "grid" else self.store.job["store"])

    def _load(self, shard: int) -> Any:
        return self.store.folder.array(self.store.folder.rows(self.output, shard))

    def _one(self, loaded: Any, row: int) -> Any:
        return np.array(loaded[row])

    def _several(self, rows: Sequence[int]) -> Any:
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for k, row in enumerate(rows):
            found[k] = self[int(row)]
        return found

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """All rows in memory: `np.asarray(store["cls_token"])`."""
        found = np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *self.blocks()])
        return found if dtype is None else found.astype(dtype)


class RaggedRows(Rows):
    """Patch tokens of pictures of several sizes: row i is (h*w, C), of several blocks (K, h*w, C); see `grid`."""

    def _load(self, shard: int) -> Any:
        folder = self.store.folder
        grid = folder.array(folder.rows("grid", shard))
        ends = np.cumsum(grid.prod(axis=1, dtype=np.int64))
        patches = folder.array(folder.rows(self.output, shard))
        return np.split(patches, ends[:-1]) if len(ends) else []

    def _one(self, loaded: Any, row: int) -> Any:
        return np.moveaxis(np.array(loaded[row]), 0, -2)

    def _several(self, rows: Sequence[int]) -> Any:
        return [self[int(row)] for row in rows]

    def blocks(self) -> Iterator[Any]:
        """All rows, a list of arrays a shard."""
        for shard in self.store.shards:
            yield [np.moveaxis(block, 0, -2) for block in self._load(shard)]

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise ValueError(f"{self.output} of pictures of several sizes is no single array: take its rows")
