"""Features of a whole data set, written shard by shard; whatever kills the run, the same command goes on.

sources.py   what INPUT may be, listed            plan.py     the listing, frozen and cut into shards
reading.py   a shard's pictures as bytes          decode.py   bytes to the model's input, or the reason why not
compute.py   the model and the outputs wanted     job.py      all that decides the numbers, and its comparison
shard.py     `extract_shard`, the unit of work    engines.py  which process does which shard
folder.py    what lies where in the output        store.py    `open_features`: reading it, by numpy alone
check.py     status and verification              formats.py  parquet, webdataset, lance
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engines import extract
    from .store import FeatureStore, open_features

__all__ = ["FeatureStore", "extract", "open_features"]


if not TYPE_CHECKING:

    def __getattr__(name):
        if name == "extract":  # needs torch, which reading does not
            from .engines import extract

            return extract
        if name in ("FeatureStore", "open_features"):
            from . import store

            return getattr(store, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
