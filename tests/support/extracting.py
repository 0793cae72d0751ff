"""Fixtures of the tests of `extract`, which name this file in their `pytest_plugins`."""

from __future__ import annotations

import pytest
from extracted import OUTPUTS
from helpers import TINY, write_checkpoint
from pictures import PREPROCESSING_48, write_pictures


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Tiny, for pictures of 48 px."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), TINY, preprocessing=PREPROCESSING_48)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with sixteen pictures and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 16)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="session")
def names(photos):
    """What they are called, in the order of the plan."""
    return sorted(str(p.relative_to(photos)) for p in photos.rglob("*") if p.is_file() and p.suffix != ".txt")


@pytest.fixture(scope="session")
def complete(checkpoint, photos, tmp_path_factory):
    """All outputs of them, float32."""
    import dinov3_lite

    output = tmp_path_factory.mktemp("complete") / "features"
    return dinov3_lite.extract(
        photos, checkpoint, output, outputs=OUTPUTS, store="float32", batch_size=3, shard_size=7, decode_threads=2
    )
