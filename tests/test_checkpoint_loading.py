"""What is loaded: every tensor from the file, mapped where it can be; and a converted file beside its source."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, TINY_GATED, run_python, save_shards, trained_like, write_checkpoint

from convert import convert
from dinov3_lite import DINOv3ViT
from dinov3_lite.checkpoint import open_checkpoint

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory in /proc")


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", TINY)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- what is loaded


@pytest.mark.parametrize(
    "config", [TINY, TINY_GATED, replace(TINY, num_register_tokens=0)], ids=["plain", "gated", "no registers"]
)
def test_every_tensor_of_the_model_comes_from_the_file(config, tmp_path):
    weights = trained_like(config)
    folder = write_checkpoint(tmp_path, config, weights)
    state = DINOv3ViT.from_pretrained(folder).state_dict()
    assert torch.equal(state["cls_token"], weights["embeddings.cls_token"])
    assert torch.equal(state["patch_embed.proj.weight"], weights["embeddings.patch_embeddings.weight"])
    for i in range(config.num_hidden_layers):
        qkv = torch.cat([weights[f"layer.{i}.attention.{p}_proj.weight"] for p in "qkv"])
        assert torch.equal(state[f"blocks.{i}.attn.qkv.weight"], qkv)
        assert torch.equal(state[f"blocks.{i}.ls2.gamma"], weights[f"layer.{i}.layer_scale2.lambda1"])
        if config.use_gated_mlp:
            w12 = torch.cat([weights[f"layer.{i}.mlp.{p}_proj.weight"] for p in ("gate", "up")])
            assert torch.equal(state[f"blocks.{i}.mlp.w12.weight"], w12)
        thirds = [weights.get(f"layer.{i}.attention.{p}_proj.bias", torch.zeros(config.hidden_size)) for p in "qkv"]
        assert torch.equal(state[f"blocks.{i}.attn.qkv.bias"], torch.cat(thirds))
    zeros = config.num_hidden_layers * config.hidden_size  # of the third that is not there
    total = sum(t.numel() for name, t in state.items() if name != "rope_embed.periods") - zeros
    assert total == sum(t.numel() for t in weights.values())


def test_shards_prefixes_and_the_converted_file_give_the_same_model(folder, tmp_path):
    weights = trained_like(TINY)
    expected = DINOv3ViT.from_pretrained(folder)
    prefixed = {("model." + k if k.startswith("layer.") else k): v for k, v in weights.items()}
    sources = [convert(folder), folder]
    sources.append(write_checkpoint(tmp_path / "prefixed", TINY, prefixed))
    sources.append(write_checkpoint(tmp_path / "shards", TINY))
    save_shards(sources[-1], weights)
    sources.append(write_checkpoint(tmp_path / "prefixed shards", TINY))
    save_shards(sources[-1], prefixed, 2)
    for source in sources:
        model = DINOv3ViT.from_pretrained(str(source))
        assert model.config == TINY
        assert not model.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), (source, name)
        assert model.weights_id.split()[1] == expected.weights_id.split()[1]


def test_dtype_and_device(folder):
    assert DINOv3ViT.from_pretrained(folder).norm.weight.dtype == torch.float32
    model = DINOv3ViT.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope_embed.periods.dtype == torch.float32
    meta = DINOv3ViT.from_pretrained(folder, device="meta")
    assert all(t.is_meta for t in meta.state_dict().values())


def test_the_checkpoints_own_dtype_is_kept(tmp_path):
    weights = {name: w.bfloat16() for name, w in trained_like(TINY).items()}
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY, weights))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@linux_only
def test_loading_a_converted_file_is_zero_copy(folder):
    """Every parameter points into the mapping of the file, but for the biases that are fused in one; training writes
    nothing there.
    """
    path = convert(folder)
    before = path.read_bytes()
    model = DINOv3ViT.from_pretrained(path)
    mapping = next(line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line)
    start, end = (int(address, 16) for address in mapping.split()[0].split("-"))
    for name, tensor in model.state_dict().items():
        if not name.endswith("qkv.bias"):  # whose thirds the file has apart
            assert start <= tensor.data_ptr() < end, name
    model.train()(torch.randn(1, 3, 16, 16)).last_hidden_state.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert path.read_bytes() == before


@linux_only
def test_loading_does_not_read_what_is_not_used(tmp_path):
    """Of a 130 MB file, loading makes neither a copy nor more than its headers and samples resident."""
    config = replace(TINY, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=3)
    path = convert(write_checkpoint(tmp_path, config))
    code = f"""
import torch
from dinov3_lite import DINOv3ViT
def resident():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup") if ":" in line and "kB" in line)
    return int(fields["Private_Dirty"].split()[0]), int(fields["Pss_File"].split()[0])
def main():
    DINOv3ViT.from_pretrained({str(path.with_name("tiny.safetensors"))!r})  # warm up
    before = resident()
    model = DINOv3ViT.from_pretrained({str(path)!r})
    after = resident()
    print(after[0] - before[0], after[1] - before[1])
main()
"""
    convert(write_checkpoint(tmp_path / "tiny", TINY), path.with_name("tiny.safetensors"))
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    copied, mapped = map(int, done.stdout.split())
    size = path.stat().st_size / 1024
    assert size > 100_000 and copied < 0.1 * size and mapped < 0.5 * size


@linux_only
def test_what_is_joined_stays_in_memory_once(tmp_path):
    """Else the pages of queries, keys and values would lie in memory twice."""
    config = replace(TINY, hidden_size=256, num_attention_heads=4)
    opened = open_checkpoint(write_checkpoint(tmp_path, config))
    spans = opened.spans["blocks.0.attn.qkv.weight"]
    whole = opened.read(spans)
    parts = [span.read() for span in spans]
    pages = [resident(part) for part in parts]
    assert torch.equal(whole, torch.cat(parts))
    assert len(parts) == 3 and pages == [0, 0, 0]
    assert all(resident(part) >= 63 for part in parts)


def resident(tensor: torch.Tensor) -> int:
    """How many of the whole pages of a tensor lie in memory."""
    first, last = -(-tensor.data_ptr() // 4096), (tensor.data_ptr() + tensor.nbytes) // 4096
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        return sum(entry != 0 for entry in memoryview(file.read(8 * (last - first))).cast("Q"))


def test_repr_shows_the_fingerprint(folder):
    model = DINOv3ViT.from_pretrained(folder)
    assert re.search(r"vit-c32-d3-h2, 0.0 M parameters, weights transformers [0-9a-f]{8}\n", repr(model))
    assert "weights random" in repr(DINOv3ViT(TINY))


def test_the_fingerprint_goes_when_other_weights_come(folder):
    model = DINOv3ViT.from_pretrained(folder)
    model.load_state_dict(DINOv3ViT(TINY).state_dict())
    assert "weights from a state dict" in repr(model)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_no_model_runs_in(folder, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*: expected torch.float32, float16, bfloat16, float64 or None"):
        DINOv3ViT.from_pretrained(folder, dtype=dtype)


def test_a_default_device_changes_nothing(folder):
    with torch.device("meta"):
        model = DINOv3ViT.from_pretrained(folder)
        convert(folder)
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert {t.device.type for t in DINOv3ViT.from_pretrained(folder).state_dict().values()} == {"cpu"}


def test_a_link_to_a_file_that_is_gone(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")
    with pytest.raises(ValueError, match=r"model.safetensors: a link to a file that is gone: download it again"):
        DINOv3ViT.from_pretrained(folder)


def test_the_fingerprint_tells_weights_apart(folder, tmp_path):
    weights = trained_like(TINY)
    weights["layer.2.attention.k_proj.weight"][-1, -1] += 1e-3
    other = write_checkpoint(tmp_path / "other", TINY, weights)
    assert open_checkpoint(folder).digest() != open_checkpoint(other).digest()


# ---- a converted file beside its source


def test_a_stale_converted_file_is_refused(folder):
    convert(folder)
    weights = {name: w * 2 for name, w in trained_like(TINY).items()}
    write_checkpoint(folder, TINY, weights)
    with pytest.raises(ValueError, match=r"dinov3_lite.safetensors: was converted from other weights.* --force"):
        DINOv3ViT.from_pretrained(folder)
    convert(folder, force=True)
    assert torch.equal(DINOv3ViT.from_pretrained(folder).cls_token, weights["embeddings.cls_token"])

    weights["layer.1.mlp.up_proj.weight"][10:50] = 0  # in the middle of one tensor
    write_checkpoint(folder, TINY, weights)
    with pytest.raises(ValueError, match="was converted from other weights"):
        DINOv3ViT.from_pretrained(folder)


def test_a_config_changed_since_the_conversion_is_refused(folder):
    convert(folder)
    edit_config(folder, layer_norm_eps=1e-2)
    with pytest.raises(ValueError, match="or another config"):
        DINOv3ViT.from_pretrained(folder)


def test_an_edited_converted_file_is_refused(folder):
    path = convert(folder)
    data = bytearray(path.read_bytes())
    data[-4:] = b"\0\0\0@"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its tensors are not those it was written with"):
        DINOv3ViT.from_pretrained(path)
