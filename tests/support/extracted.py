"""What `extract` wrote, compared."""

from __future__ import annotations

import numpy as np

OUTPUTS = ["cls_token", "patch_mean", "patch_tokens", "register_tokens"]
FLOAT32 = {"store": "float32", "batch_size": 3}


def same_rows(store, complete, names):
    """Whether the CLS tokens are those of these pictures."""
    return np.array_equal(
        np.asarray(store["cls_token"]), complete["cls_token"][[list(complete.keys).index(n) for n in names]]
    )


def tree(folder):
    """All files but logs."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.parent.name != "log")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
