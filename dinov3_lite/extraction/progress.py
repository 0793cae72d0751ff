"""A bar over the whole job, whoever works on it: it counts markers, and what this process has begun."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from .folder import Folder


class Bar:
    """Pictures where the plan knows how many there are, else shards."""

    def __init__(self, folder: Folder, plan: dict[str, Any], show: bool | None) -> None:
        self.folder, self.shards, self.pictures = folder, plan["shards"], plan["pictures"]
        self.begun = 0  # pictures of the shard that this process is at
        self.looked, self.done = 0.0, 0
        self.bar = tqdm(
            total=self.pictures or self.shards,
            unit=" pictures" if self.pictures else " shards",
            disable=None if show is None else not show,
            mininterval=0.5,
        )

    def __enter__(self) -> Bar:
        self.count()
        self.bar.start_t, self.bar.initial = time.time(), self.bar.n  # the rate is that of this run
        return self

    def __exit__(self, *_: object) -> None:
        self.count()
        self.bar.close()

    def add(self, pictures: int) -> None:
        """More pictures of the shard at hand are through."""
        self.begun += pictures
        self._show()

    def count(self) -> None:
        """A shard has ended: look at the folder."""
        self.begun = 0
        self.looked = 0.0
        self._show()

    def _show(self) -> None:
        if self.bar.disable:
            return
        if time.monotonic() - self.looked > self.folder.look_every:
            self.done, self.looked = len(self.folder.done()), time.monotonic()
        whole = self.pictures * self.done / self.shards + self.begun if self.pictures else self.done
        self.bar.n = min(round(whole), self.bar.total)
        self.bar.refresh()
