"""Stored features for a DataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


class FeatureDataset(Dataset[tuple[Any, ...]]):
    """Item i is the tensors of row i, one an output, and its key.

    store: a FeatureStore. Each worker of a DataLoader maps the files itself.
    """

    def __init__(self, store: Any, outputs: Sequence[str]) -> None:
        self.store, self.outputs = store, tuple(outputs)
        self._rows = [store[name] for name in self.outputs]

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return (*(torch.from_numpy(rows[i]) for rows in self._rows), self.store.keys[i])
