"""Digests of all that the converter writes for made checkpoints, so that a change of a byte is noticed.

python tests/support/written.py > tests/data/written.json
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import DINOv3Config

PLAIN = DINOv3Config(
    patch_size=4,
    hidden_size=64,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_register_tokens=2,
)
CONFIGS = {
    "plain": PLAIN,
    "gated": replace(PLAIN, use_gated_mlp=True, hidden_act="silu", value_bias=False),
    "key bias": replace(PLAIN, key_bias=True),
    "no bias": replace(PLAIN, query_bias=False, value_bias=False, proj_bias=False, mlp_bias=False),
    "no registers": replace(PLAIN, num_register_tokens=0),
}
PREPROCESSING = {
    "do_resize": True,
    "size": {"height": 96, "width": 160},
    "resample": 2,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.1],
}


def made_tensors(config: DINOv3Config) -> dict[str, torch.Tensor]:
    """Tensors in transformers' layout with values that every release of torch makes alike."""
    C, F, p = config.hidden_size, config.intermediate_size, config.patch_size
    shapes = {
        "embeddings.cls_token": (1, 1, C),
        "embeddings.register_tokens": (1, config.num_register_tokens, C),
        "embeddings.mask_token": (1, 1, C),
        "embeddings.patch_embeddings.weight": (C, 3, p, p),
        "embeddings.patch_embeddings.bias": (C,),
        "norm.weight": (C,),
        "norm.bias": (C,),
    }
    mlp = {"up_proj": (F, C), "down_proj": (C, F)} | ({"gate_proj": (F, C)} if config.use_gated_mlp else {})
    for i in range(config.num_hidden_layers):
        for norm in ("norm1", "norm2"):
            shapes |= {f"layer.{i}.{norm}.weight": (C,), f"layer.{i}.{norm}.bias": (C,)}
        for part, bias in zip("qkvo", ("query_bias", "key_bias", "value_bias", "proj_bias"), strict=True):
            shapes[f"layer.{i}.attention.{part}_proj.weight"] = (C, C)
            if getattr(config, bias):
                shapes[f"layer.{i}.attention.{part}_proj.bias"] = (C,)
        for part, shape in mlp.items():
            shapes[f"layer.{i}.mlp.{part}.weight"] = shape
            if config.mlp_bias:
                shapes[f"layer.{i}.mlp.{part}.bias"] = shape[:1]
        shapes |= {f"layer.{i}.layer_scale{n}.lambda1": (C,) for n in (1, 2)}
    tensors = {}
    for n, (name, shape) in enumerate(sorted(shapes.items())):
        count = torch.Size(shape).numel()
        tensors[name] = ((torch.arange(count) * 7919 + n * 104729) % 2048 / 1024 - 1).reshape(shape)
    return tensors


def written() -> dict[str, dict[str, str]]:
    """Of each conversion: a digest of each file's header or text, and of its tensors."""
    result: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in CONFIGS.items():
            source = Path(scratch) / name
            source.mkdir()
            save_file(made_tensors(config), source / "model.safetensors", {"format": "pt"})
            (source / "config.json").write_text(json.dumps({**config.to_dict(), "dinov3_lite_note": "made"}))
            (source / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
            (source / "LICENSE").write_text("DINOv3 License")
            for to in ("lite", "transformers", "meta", "timm"):
                for dtype in (None, torch.float16):
                    folder = Path(scratch) / f"{name}, {to}, {dtype}"
                    options = {"max_shard_size": 40_000} if to == "transformers" else {}
                    convert(source, folder, to=to, dtype=dtype, allow_loss=True, **options)
                    files = (file for file in sorted(folder.iterdir()) if file.name != "README.md")  # words for people
                    result[folder.name] = {file.name: digest(file) for file in files}
    return result


def digest(file: Path) -> str:
    """Of a file's bytes, without the RoPE periods in it: the last digit of a power may be another elsewhere."""
    if file.suffix not in (".safetensors", ".pth"):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    sha = hashlib.sha256()
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        sha.update(data[: 8 + int.from_bytes(data[:8], "little")])
        tensors = load_file(file)
    else:
        tensors = torch.load(file, weights_only=True)
        sha.update(repr([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]).encode())
    for name in sorted(tensors.keys() - {"rope_embed.periods"}):
        sha.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    print(json.dumps(written(), indent=1))
