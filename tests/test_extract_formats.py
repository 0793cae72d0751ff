"""Features in other formats, each read back by its own reader."""

from __future__ import annotations

import numpy as np
import pytest
from extracted import OUTPUTS

import dinov3_lite
from dinov3_lite.extraction.formats import convert

pytest.importorskip("PIL")
pytest_plugins = ["extracting"]


@pytest.fixture(scope="module")
def native(checkpoint, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    return dinov3_lite.extract(photos, checkpoint, folder, outputs=OUTPUTS, size="native", shard_size=9)


def check_table(table, store):
    """A table of arrow's against the store."""
    assert table.column("key").to_pylist() == list(store.keys)
    for output in store.outputs:
        values = table.column(output).to_pylist()
        for i in range(len(store)):
            expected = store[output][i]
            expected = np.moveaxis(expected, -2, 0) if None in store[output].shape else expected
            assert np.array_equal(np.array(values[i], expected.dtype), expected), output


@pytest.mark.parametrize("kind", ["complete", "native"])
def test_parquet(kind, request, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    store = request.getfixturevalue(kind)
    convert(store.folder.path, tmp_path / "p", "parquet")
    assert len(list((tmp_path / "p").iterdir())) == len(store.shards)
    check_table(parquet.read_table(tmp_path / "p"), store)
    with pytest.raises(ValueError, match="is not empty"):
        convert(store.folder.path, tmp_path / "p", "parquet")


@pytest.mark.parametrize("kind", ["complete", "native"])
def test_lance(kind, request, tmp_path):
    lance = pytest.importorskip("lance")
    store = request.getfixturevalue(kind)
    convert(store.folder.path, tmp_path / "l", "lance")
    check_table(lance.dataset(str(tmp_path / "l")).to_table(), store)


@pytest.mark.parametrize("kind", ["complete", "native"])
def test_webdataset(kind, request, tmp_path):
    wds = pytest.importorskip("webdataset")
    store = request.getfixturevalue(kind)
    convert(store.folder.path, tmp_path / "w", "webdataset")
    files = sorted(str(file) for file in (tmp_path / "w").iterdir())
    samples = list(wds.WebDataset(files, shardshuffle=False).decode())
    assert [sample["key.txt"] for sample in samples] == list(store.keys)
    for i, sample in enumerate(samples):
        assert sample["__key__"] == f"{i:012d}"
        for output in store.outputs:
            assert np.array_equal(sample[f"{output}.npy"], store[output][i])


def test_an_unknown_format_is_refused(complete, tmp_path):
    with pytest.raises(ValueError, match="format 'hdf5': expected one of parquet, webdataset, lance"):
        convert(complete.folder.path, tmp_path / "x", "hdf5")
