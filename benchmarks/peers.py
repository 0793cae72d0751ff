"""The libraries that people use instead, on the same weights. Import this before anything of theirs."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert import convert
from dinov3_lite import DINOv3ConvNeXt, DINOv3ViT, load, optimize_for_inference
from dinov3_lite.checkpoint.layouts import TRANSFORMERS, rename
from dinov3_lite.config import config_from_dict, config_from_name
from dinov3_lite.sample import made_weights

REFERENCES = Path(sys.prefix) / "references" / "torchvision"

Features = Callable[[Tensor], Tensor]  # (B, 3, H, W) -> last_hidden_state (B, N, C)
Builder = Callable[[Path, torch.dtype, torch.device], Features]
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}  # in OpenVINO's words


def write_checkpoint(folder: Path, variant: str) -> Path:
    """Made weights of a released variant, as from the hub."""
    config = config_from_name(variant)
    theirs = {name: t.contiguous() for name, t in rename(made_weights(config), TRANSFORMERS, config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@dataclass(frozen=True)
class Peer:
    """One way of computing features: its name, how it is made, and on which devices and dtypes it is shown.

    least: the lowest precision that it may choose to compute in; None where that is the dtype asked for.
    files: writes the files that `build` reads, where they are not there yet.
    """

    name: str
    build: Builder
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    least: torch.dtype | None = None
    files: Callable[[Path, torch.dtype], object] = lambda folder, dtype: None


def of_module(load: Callable[..., Any], features: Callable[[Any, Tensor], Tensor], compiled: bool = False) -> Builder:
    """A torch module loaded by `load(folder, dtype)`, `features` of which are last_hidden_state."""

    def build(folder: Path, dtype: torch.dtype, device: torch.device) -> Features:
        model = load(folder, dtype).to(device).eval()
        call = torch.compile(model, dynamic=False) if compiled else model
        return lambda images: features(call, images)

    return build


def config_of(folder: Path) -> Any:
    return config_from_dict(json.loads((folder / "config.json").read_text()))


def is_convnext(folder: Path) -> bool:
    return "convnext" in config_of(folder).name


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> DINOv3ViT | DINOv3ConvNeXt:
    return load(folder, dtype=dtype)


def ours_narrow(folder: Path, dtype: torch.dtype) -> DINOv3ViT | DINOv3ConvNeXt:
    """With a residual stream of the weights' dtype, as transformers and timm have it."""
    model = ours(folder, dtype)
    model.residual_dtype = dtype
    return model


def ours_prepared(backend: str, load: Callable[..., Any] = ours) -> Builder:
    def build(folder: Path, dtype: torch.dtype, device: torch.device) -> Features:
        model = optimize_for_inference(load(folder, dtype).to(device), backend=backend, dynamic=False)
        return lambda images: model(images).last_hidden_state

    return build


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32, name: str = "", **options: Any) -> Any:
    """One of transformers' classes, in evaluation mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = name or ("DINOv3ConvNextModel" if is_convnext(folder) else "DINOv3ViTModel")
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype, **options).eval()


def transformers_eager(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    if is_convnext(folder):
        raise ValueError("a ConvNeXt has no attention")
    return transformers_model(folder, dtype, attn_implementation="eager")


def timm_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    written = folder / "timm"
    if not written.exists():
        convert(folder, written, to="timm", allow_loss=True)
    return written


def timm_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A timm model with these weights. ImportError where there is no timm."""
    timm, written = import_timm(), timm_folder(folder)
    architecture = json.loads((written / "config.json").read_text())["architecture"]
    options = {} if is_convnext(folder) else {"dynamic_img_size": True}
    model = timm.create_model(architecture, pretrained=False, num_classes=0, **options)
    model.load_state_dict(load_file(written / "model.safetensors"))
    return model.to(dtype).eval()


def timm_features(model: Any, images: Tensor) -> Tensor:
    """Its last_hidden_state; of a ConvNeXt, whose forward_features is a map, made of that as forward makes its pool."""
    features = model.forward_features(images)
    if features.ndim == 3:
        return features
    tokens = torch.cat((features.mean((2, 3)).unsqueeze(1), features.flatten(2).mT), dim=1)
    norm = model.head.norm
    return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)


def import_timm() -> ModuleType:
    """An installed timm, or the one that `make` puts beside the environment."""
    find_references("timm")
    import timm

    return timm


def find_references(package: str) -> None:
    """Where a package is missing, look for it among what `make` put beside the environment: timm and torchvision."""
    if importlib.util.find_spec(package) is None and REFERENCES.exists():
        import transformers.models.dinov3_vit.modeling_dinov3_vit  # noqa: F401  before it can see that torchvision

        sys.path += [str(REFERENCES), str(Path(__file__).parent.parent / "tests" / "support")]
        import torchvision_shim  # noqa: F401


def meta_file(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    if not (folder / "meta").exists():
        convert(folder, folder / "meta", to="meta")
    (file,) = (folder / "meta").glob("*.pth")
    return file


def meta_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Meta's own model from the clone of its repository that DINOV3_REPO names. ImportError without."""
    if "DINOV3_REPO" not in os.environ:
        raise ImportError("DINOV3_REPO does not name a clone of facebookresearch/dinov3")
    find_references("torchvision")
    name = f"dinov3_{config_of(folder).name}".replace("-", "_")
    model = torch.hub.load(os.environ["DINOV3_REPO"], name, source="local", pretrained=False)
    model.load_state_dict(torch.load(meta_file(folder)))
    return model.to(dtype).eval()


def meta_features(model: Any, images: Tensor) -> Tensor:
    """Its last_hidden_state; a ConvNeXt of Meta's has no storage tokens."""
    out = model.forward_features(images)
    tokens = [out["x_norm_clstoken"].unsqueeze(1), out.get("x_storage_tokens"), out["x_norm_patchtokens"]]
    return torch.cat([part for part in tokens if part is not None], dim=1)


def onnx_file(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Our model as an ONNX file: what both runtimes get. ValueError for a dtype that onnxruntime lacks."""
    from dinov3_lite.export import export

    file = folder / f"model.{PRECISIONS[dtype]}.onnx"
    if not file.exists():
        export(ours(folder, dtype), file, "onnx")
    return file


def onnxruntime_session(folder: Path, dtype: torch.dtype, device: torch.device) -> Features:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_file(folder, dtype), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(["last_hidden_state"], {name: images.float().numpy()})[0])


def openvino_model(hinted: bool) -> Builder:
    """The float32 file, compiled for one shape: to run in the dtype asked for, or in what OpenVINO takes by itself."""

    def build(folder: Path, dtype: torch.dtype, device: torch.device) -> Features:
        config = {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype]} if hinted else {}
        compiled = functools.cache(functools.partial(compiled_by_openvino, folder, **config))
        return lambda images: torch.from_numpy(compiled(images.shape)(images.float().numpy())["last_hidden_state"])

    return build


def compiled_by_openvino(folder: Path, shape: torch.Size, **config: object) -> Any:
    """The float32 file for one shape, a few percent faster than for all sizes. ImportError without OpenVINO."""
    import openvino

    core = openvino.Core()
    model = core.read_model(onnx_file(folder))
    model.reshape(list(shape))
    return core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), **config})


def float32_onnx_file(folder: Path, dtype: torch.dtype) -> Path:
    return onnx_file(folder)


def last_hidden_state(model: Any, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


OPENVINO_BY_ITSELF = "OpenVINO, its own precision"  # bfloat16 where the processor multiplies that, unasked
OURS_NARROW = "ours, bfloat16 stream"  # residual_dtype = torch.bfloat16
PEERS = [
    Peer("ours", of_module(ours, last_hidden_state)),
    Peer("ours, prepacked", ours_prepared("prepacked"), devices=("cpu",)),
    Peer(OURS_NARROW, of_module(ours_narrow, last_hidden_state), dtypes=(torch.bfloat16,)),
    Peer(f"{OURS_NARROW}, prepacked", ours_prepared("prepacked", ours_narrow), ("cpu",), dtypes=(torch.bfloat16,)),
    Peer("ours, compiled", ours_prepared("inductor")),
    Peer(f"{OURS_NARROW}, compiled", ours_prepared("inductor", ours_narrow), ("cuda",), dtypes=(torch.bfloat16,)),
    Peer("transformers, sdpa", of_module(transformers_model, last_hidden_state)),
    Peer("transformers, eager attention", of_module(transformers_eager, last_hidden_state)),
    Peer("transformers, compiled", of_module(transformers_model, last_hidden_state, compiled=True)),
    Peer("timm", of_module(timm_model, timm_features), files=timm_folder),
    Peer("Meta", of_module(meta_model, meta_features), files=meta_file),
    Peer("onnxruntime", onnxruntime_session, devices=("cpu",), files=onnx_file),
    Peer("OpenVINO", openvino_model(hinted=True), devices=("cpu",), files=float32_onnx_file),
    Peer(
        OPENVINO_BY_ITSELF,
        openvino_model(hinted=False),
        devices=("cpu",),
        dtypes=(torch.float32,),
        least=torch.bfloat16,
        files=float32_onnx_file,
    ),
]
