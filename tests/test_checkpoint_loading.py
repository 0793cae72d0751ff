from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, TINY_GATED, run_python, trained_like, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import DINOv3ViT, ImageProcessor
from dinov3_lite.checkpoint import CONVERTED, open_checkpoint

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory in /proc")


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", TINY)


def save_shards(folder, weights, n=3):
    """The same weights in n shards with an index, as transformers writes big models."""
    names = sorted(weights)
    weight_map = {name: f"model-{i % n + 1:05}-of-{n:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink(missing_ok=True)


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
    total = sum(t.numel() for name, t in state.items() if name != "rope_embed.periods")
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
        if not re.search(r"qkv\.[qkv]_bias", name):  # vectors that the model holds as one
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


# ---- bad input: one clear sentence each


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder, change):
    weights = trained_like(TINY)
    change(weights)
    save_file(weights, folder / "model.safetensors")


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def lose_metadata(folder):
    path = convert(folder)
    save_file(load_file(path), path)
    (folder / "model.safetensors").unlink()


def change_metadata(folder, **changes):
    from safetensors import safe_open

    path = convert(folder)
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v})
    (folder / "model.safetensors").unlink()


BAD = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"config.json: missing: a checkpoint in transformers' layout needs",
    ),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json: not valid JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config.json: holds a list, expected a JSON object",
    ),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), r"config.json: no model_type in it"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config.json: not valid JSON"),
    "dinov2": (lambda f: edit_config(f, model_type="dinov2"), r"config.json: model_type is 'dinov2'"),
    "convnext": (
        lambda f: edit_config(f, model_type="dinov3_convnext"),
        r"config.json: model_type is 'dinov3_convnext'",
    ),
    "contradictory config": (
        lambda f: edit_config(f, num_attention_heads=5),
        r"config.json: hidden_size 32 does not divide",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"no model.safetensors.*it holds 'config.json', 'prepro",
    ),
    "truncated data": (
        lambda f: truncate(f / "model.safetensors", 5000),
        r"model.safetensors: not a whole safetensors file",
    ),
    "truncated header": (
        lambda f: truncate(f / "model.safetensors", 100),
        r"model.safetensors: not a whole safetensors file",
    ),
    "empty file": (lambda f: truncate(f / "model.safetensors", 0), r"model.safetensors: not a whole safetensors file"),
    "a web page": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), r"not a whole safetensors file"),
    "lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"model.safetensors: a git-lfs pointer, not the weights",
    ),
    "foreign tensors": (
        lambda f: save_file({"fc.weight": torch.zeros(3)}, f / "model.safetensors"),
        r"none of its 1 tensors \(first: 'fc.weight'\)",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda w: w.pop("layer.1.norm2.bias")),
        r"model.safetensors: lacks tensor 'layer.1.norm2.bias', which the config \(vit-c32-d3-h2\) calls for",
    ),
    "extra tensor": (
        lambda f: edit_weights(f, lambda w: w.update({"neck.weight": torch.zeros(3)})),
        r"model.safetensors: holds tensor 'neck.weight', which the config \(vit-c32-d3-h2\) has no place for",
    ),
    "key bias that the config denies": (
        lambda f: edit_weights(f, lambda w: w.update({"layer.0.attention.k_proj.bias": torch.zeros(32)})),
        r"holds tensor 'layer.0.attention.k_proj.bias', which",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({"norm.weight": torch.zeros(31)})),
        r"against the config \(vit-c32-d3-h2\), tensor 'norm.weight' has shape \(31,\), not \(32,\)",
    ),
    "deeper config": (
        lambda f: edit_config(f, num_hidden_layers=4),
        r"lacks tensors 'layer.3.attention.k_proj.weight', .*'layer.3.attention.q_proj.weight' and 12 more, which",
    ),
    "shallower config": (
        lambda f: edit_config(f, num_hidden_layers=2),
        r"holds tensors 'layer.2.attention.k_proj.weight', .*'layer.2.attention.q_proj.weight' and 12 more, which",
    ),
    "wider config": (
        lambda f: edit_config(f, hidden_size=64),
        r"against the config \(vit-c64-d3-h2\), tensor .* has shape .*, not",
    ),
    "no register count": (lambda f: edit_config(f, num_register_tokens=0), r"register_tokens' has shape \(1, 4, 32\)"),
    "integer weights": (
        lambda f: edit_weights(f, lambda w: w.update({"norm.weight": torch.zeros(32, dtype=torch.int8)})),
        r"tensor 'norm.weight' is I8, expected one of F64, F32, F16, BF16",
    ),
    "mixed dtypes": (
        lambda f: edit_weights(f, lambda w: w.update({"norm.weight": torch.zeros(32).bfloat16()})),
        r"'norm.weight' is torch.bfloat16 but '.*' is torch.float32: say which dtype",
    ),
    "both prefixes": (
        lambda f: edit_weights(f, lambda w: w.update({"model.layer.0.norm1.bias": torch.zeros(32)})),
        r"tensor '(model.)?layer.0.norm1.bias' is also there as",
    ),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index.json: no weight_map",
    ),
    "shard missing": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"norm.bias": "model-1.safetensors"}}'),
        ),
        r"index.json: shard 'model-1.safetensors' is missing",
    ),
    "shard outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"norm.bias": "../model.safetensors"}}'
        ),
        r"index.json: shard '../model.safetensors' is not the name of a file",
    ),
    "converted by a later release": (
        lambda f: change_metadata(f, dinov3_lite="2"),
        r"converted file of version 2, this release",
    ),
    "converted without config": (
        lambda f: change_metadata(f, config=""),
        r"its metadata is not what this library writes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence(case, folder):
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        DINOv3ViT.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no model.safetensors.*\(it holds nothing\)"):
        DINOv3ViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["", "./nowhere", "/nowhere/at/all", "nowhere.safetensors", "a b/c"])
def test_no_such_source(source):
    with pytest.raises(FileNotFoundError, match=f"{source}: no such file or folder, and no hub id"):
        DINOv3ViT.from_pretrained(source)


def test_a_file_of_another_kind(tmp_path):
    file = tmp_path / "weights.npz"
    file.write_bytes(b"123")
    with pytest.raises(ValueError, match="weights.npz: expected a folder or a file of type .safetensors, .pth, .pt"):
        DINOv3ViT.from_pretrained(file)


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path):
    weights = trained_like(TINY)
    weights["layer.1.mlp.down_proj.bias"][3] = 1e5
    folder = write_checkpoint(tmp_path, TINY, weights)
    for load in (DINOv3ViT.from_pretrained, lambda f, dtype: convert(f, dtype=dtype)):
        with pytest.raises(
            ValueError, match=r"'blocks.1.mlp.fc2.bias' reaches 1e\+05, beyond float16's 65504: use bfloat16"
        ):
            load(folder, dtype=torch.float16)
    assert not (folder / CONVERTED).exists()


# ---- the hub, without a network


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
