"""Properties of the converter over random small configs and random corruption of valid files."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, trained_like, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import convert
from dinov3_lite import DINOv3Config
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.layouts import LAYOUTS


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def configs(draw) -> DINOv3Config:
    """Every switch that all four layouts can hold, at sizes of which timm's tells the head dim (64)."""
    qkv_bias, gated = draw(st.booleans()), draw(st.booleans())
    return DINOv3Config(
        patch_size=draw(st.sampled_from([2, 3, 4])),
        num_channels=draw(st.sampled_from([1, 3])),
        hidden_size=draw(st.sampled_from([64, 128])),
        num_attention_heads=1,
        intermediate_size=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 12)),
        num_register_tokens=draw(st.integers(0, 5)),
        query_bias=qkv_bias,
        value_bias=qkv_bias,
        proj_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )


@examples(40)
@given(
    config=configs(), chain=st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=5), seed=st.integers(0, 99)
)
def test_any_chain_of_layouts_comes_back_bit_for_bit(config, chain, seed):
    config = replace(config, num_attention_heads=config.hidden_size // 64)
    weights = trained_like(config, seed)
    weights["embeddings.mask_token"].zero_()
    with tempfile.TemporaryDirectory() as scratch:
        path = source = write_checkpoint(Path(scratch) / "source", config, weights)
        for i, layout in enumerate([*chain, "transformers"]):
            path = convert(path, Path(scratch) / str(i), to=layout, max_shard_size=20_000)
        first, last = open_checkpoint(source), open_checkpoint(path)
        assert last.names() == first.names() and last.digest() == first.digest()
        for name in first.names():
            assert torch.equal(first.tensor(name), last.tensor(name)), name


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, tuple[bytes, dict[str, torch.Tensor]]]:
    """The bytes of a valid file of each layout that is a file, and its tensors."""
    folder = tmp_path_factory.mktemp("valid")
    source = write_checkpoint(folder / "source", TINY)
    files = {
        "transformers": source / "model.safetensors",
        "lite": convert(source, folder / "lite"),
        "meta": convert(source, folder / "meta", to="meta"),
    }
    opened = open_checkpoint(source)
    tensors = {name: opened.tensor(name).clone() for name in opened.names()}
    return {name: (file.read_bytes(), tensors) for name, file in files.items()}


@st.composite
def corruptions(draw) -> tuple[str, list[tuple[str, float, int]]]:
    """A layout, and a few changes: cut at, insert at, or overwrite at a place (as a share of the file)."""
    kinds = st.tuples(st.sampled_from(["cut", "insert", "overwrite"]), st.floats(0, 1), st.integers(0, 255))
    return draw(st.sampled_from(["transformers", "lite", "meta"])), draw(st.lists(kinds, min_size=1, max_size=3))


@examples(400)
@given(corruption=corruptions(), early=st.booleans())
def test_a_corrupted_file_is_a_clean_error_or_the_same_structure(valid, corruption, early):
    """Never a traceback, never another model: what still opens has the names, shapes and dtypes of the original.

    A flipped bit of a weight can't be told from another weight: only the converted file, which has a digest, may notice.
    """
    layout, changes = corruption
    data, tensors = valid[layout]
    broken = bytearray(data)
    for what, share, value in changes:
        # half of the time in the header, where structure is
        place = int(share * min(len(broken), 6000 if early else len(broken)))
        if what == "cut":
            del broken[place:]
        elif what == "insert":
            broken.insert(place, value)
        elif place < len(broken):
            broken[place] = value
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), TINY)
        (folder / "model.safetensors").unlink()
        name = {"transformers": "model.safetensors", "lite": "dinov3_lite.safetensors", "meta": "meta.pth"}[layout]
        if layout == "meta":
            (folder / "config.json").unlink()
        (folder / name).write_bytes(broken)
        try:
            opened = open_checkpoint(folder)
            found = {key: opened.tensor(key).clone() for key in opened.names()}
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            return
        assert found.keys() == tensors.keys()
        for key, tensor in found.items():
            assert tensor.shape == tensors[key].shape and tensor.dtype == tensors[key].dtype, key
        if bytes(broken) == data:
            assert all(torch.equal(found[key], tensors[key]) for key in tensors)
