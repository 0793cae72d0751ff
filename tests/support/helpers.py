"""What several test files need: trained-like weights, checkpoints on disk, the measure of error."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov3_lite import DINOv3Config
from dinov3_lite.checkpoint.layouts import TRANSFORMERS

ROOT = Path(__file__).parents[2]

PREPROCESSING = {
    "image_processor_type": "DINOv3ViTImageProcessor",
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

TINY = DINOv3Config(
    patch_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_register_tokens=4,
)
TINY_GATED = replace(
    TINY, use_gated_mlp=True, hidden_act="silu", key_bias=True, value_bias=False, num_register_tokens=2
)


def save_shards(folder: Path, weights: dict[str, Tensor], n: int = 3) -> None:
    """The same weights in n shards with an index, as transformers writes big models."""
    names = sorted(weights)
    weight_map = {name: f"model-{i % n + 1:05}-of-{n:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink(missing_ok=True)


def trained_like(config: DINOv3Config, seed: int = 0, outliers: bool = False) -> dict[str, Tensor]:
    """A state dict in transformers' layout with the statistics of trained weights, which plain initial ones hide.

    LayerNorm gains spread over a decade and more, LayerScale over two, every bias is non-zero. With `outliers` the residual
    stream of one register passes 65,504 in block 0, as in released models: the register starts at 60,000 in one channel,
    and the first MLP recognises it and adds about as much again.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    weights = {}
    for equation in TRANSFORMERS.table(config).equations(config):
        for name, shape in equation.theirs:
            if "norm" in name and name.endswith("weight"):
                weights[name] = torch.exp(normal(shape, 0.7))
            elif "layer_scale" in name:
                weights[name] = 10 ** (2 * torch.rand(shape, generator=generator) - 2) * torch.sign(normal(shape, 1.0))
            elif name.endswith("bias"):
                weights[name] = normal(shape, 0.2)
            elif name.endswith("token") or name.endswith("tokens"):
                weights[name] = normal(shape, 1.0)
            else:
                weights[name] = normal(shape, math.prod(shape[1:]) ** -0.5)
    if outliers:
        # a normalised token is at most sqrt(C) in one channel: only this register gets there
        channel, unit, high = 5, 3, config.hidden_size**0.5
        weights["embeddings.register_tokens"][0, 1, channel] = 60000.0
        weights["layer.0.norm2.weight"][channel] = 1.0
        up = weights["layer.0.mlp.up_proj.weight"]
        up[unit] = 0.0
        up[unit, channel] = 1.0
        weights["layer.0.mlp.up_proj.bias"][unit] = -high / 2 if not config.use_gated_mlp else 0.0
        if config.use_gated_mlp:
            gate = weights["layer.0.mlp.gate_proj.weight"]
            gate[unit] = 0.0
            gate[unit, channel] = 1.0
            weights["layer.0.mlp.gate_proj.bias"][unit] = -high / 2
        weights["layer.0.mlp.down_proj.weight"][channel, unit] = 20000.0 / (
            high / 2 if not config.use_gated_mlp else high**2 / 2
        )
        weights["layer.0.layer_scale2.lambda1"][channel] = 4.0
    return weights


def write_checkpoint(
    folder: Path,
    config: DINOv3Config,
    weights: dict[str, Tensor] | None = None,
    preprocessing: dict | None = PREPROCESSING,
) -> Path:
    """A checkpoint folder as downloaded from the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if preprocessing is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    weights = trained_like(config) if weights is None else weights
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||, in float64; infinity if anything in `actual` is not finite."""
    error = (actual.double() - truth.double()).norm() / truth.double().norm()
    return error.item() if error.isfinite() else float("inf")


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes: what a full disk does, by a limit of the system's (POSIX)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def transformers_with(name: str) -> ModuleType:
    """Transformers. Skips the test where it is missing, or is of a release before this class."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return transformers


class ByFirstWord(dict[str, str]):
    """Choices for `optimize_for_inference` that answer a question by its first word."""

    def get(self, question: str, default: str | None = None) -> str | None:
        return super().get(question.split()[0], default)


def heeds_signals() -> None:
    """In a child: `nohup`, and a shell's jobs in the background, hand down that signals are ignored."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, away from the repository's root."""
    kwargs.setdefault("cwd", Path(__file__).parent)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


def run_reference(script: str, *arguments: object, cwd: Path) -> str:
    """What a script of this folder prints in a fresh interpreter that also sees what `make` installs for it.

    Skips the test where that, torchvision or timm, is missing.
    """
    extra = [str(Path(sys.prefix) / "references" / "torchvision"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(extra)},
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    if done.returncode and (missing := re.search("No module named '(timm|torchvision)'", done.stderr)):
        pytest.skip(f"needs {missing[1]}, as `make test` installs it")
    assert done.returncode == 0, done.stderr
    return done.stdout
