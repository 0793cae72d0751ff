"""Checkpoints in the hub's cache and behind links, without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, run_python, save_shards, trained_like, write_checkpoint

from convert import convert
from dinov3_lite import DINOv3ViT, ImageProcessor
from dinov3_lite.checkpoint import open_checkpoint


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", TINY)


def test_a_hub_id_in_the_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / "models--someone--dinov3-tiny" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    model = DINOv3ViT.from_pretrained("someone/dinov3-tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert model.config == TINY


def test_a_hub_id_that_is_not_in_the_cache(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="someone/dinov3-tiny is not in the cache, nor a local file or folder, and this is offline",
    ):
        DINOv3ViT.from_pretrained("someone/dinov3-tiny", cache_dir=tmp_path, local_files_only=True)


def test_loading_works_from_the_repository_root_too(folder):
    done = run_python(f"from dinov3_lite import DINOv3ViT; DINOv3ViT.from_pretrained({str(folder)!r})", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def cached(folder: Path, cache: Path, name: str) -> str:
    """The folder's files in a hub's cache, as its client lays them out: links into a folder of blobs."""
    commit = "0" * 40
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / f"{i:064}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{i:064}"))
    return name


@pytest.mark.skipif(sys.platform == "win32", reason="links need a permission there")
@pytest.mark.parametrize("shards", [0, 3])
def test_a_hub_id_in_the_cache_is_links_to_blobs(shards, folder, tmp_path):
    expected = DINOv3ViT.from_pretrained(folder)
    if shards:
        save_shards(folder, trained_like(TINY), shards)
    name = cached(folder, tmp_path / "cache", "facebook/dinov3-vit7b16-pretrain-lvd1689m")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = DINOv3ViT.from_pretrained(name, **options)
    assert model.weights_id == expected.weights_id
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    assert ImageProcessor.from_pretrained(name, **options) == ImageProcessor()
    (snapshot,) = (tmp_path / "cache").glob("*/snapshots/*")
    assert open_checkpoint(convert(snapshot, tmp_path / "out")).weights_id.endswith(expected.weights_id.split()[1])


@pytest.mark.skipif(sys.platform == "win32", reason="links need a permission there")
@pytest.mark.parametrize("shards", [0, 3])
def test_files_that_are_links_to_another_place(shards, folder, tmp_path):
    """One rule for a single file and for shards: a link is as good as what it leads to."""
    if shards:
        save_shards(folder, trained_like(TINY), shards)
    links = tmp_path / "links"
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)
    assert DINOv3ViT.from_pretrained(links).weights_id == DINOv3ViT.from_pretrained(folder).weights_id
    gone = sorted(folder.glob("*.safetensors"))[-1]
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=rf"{gone.name}'? ?(: a link to a file that is gone|is missing from the folder)"
    ):
        DINOv3ViT.from_pretrained(links)
