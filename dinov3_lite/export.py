"""A model as one file for a runtime: ONNX, a torch.export program, or a package compiled by AOTInductor.

Each takes `pixel_values` (B, 3, H, W), float32 whatever the weights' dtype, and gives `last_hidden_state`
(B, 1 + R + h*w, C) and `pooler_output` (B, C) in the weights' dtype, those of `DINOv3Output`, by these names.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .checks import check_size
from .loading import Backbone
from .model import DINOv3ViT

OPSET = 18  # what torch's exporter writes without converting; LayerNormalization is there since 17
OUTPUTS = ("last_hidden_state", "pooler_output")
TRACED = (2, 14, 16)  # batch and grid of the images traced: near the usual 224 pixels, which inductor plans for
CHECKED = ((1, 2, 7), (3, 6, 4))  # batch and grid of the images that the file is checked with

# Relative errors that pass: 40 blocks with the statistics of trained weights give 6e-6 and 5e-3 in the first two.
BOUNDS = {torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2, torch.float64: 1e-10}

Runtime = Callable[[Tensor], dict[str, Tensor]]


def export(
    model: Backbone, path: str | os.PathLike[str], format: str, size: int | tuple[int, int] | None = None
) -> dict[tuple[int, ...], float]:
    """Export `model` to one file, which appears under its name only after it was run and its outputs compared.

    format: "onnx", "pt2" (a torch.export program) or "aoti" (compiled by AOTInductor for the device the model is on).
    size: a fixed (height, width) in pixels, or one number for a square. None leaves both free: multiples of the patch
        size from two patches on, for a ConvNeXt any from 64 pixels on. The batch is free in any case.

    Returns a dict from the shape of each batch tried to the relative error ||file - model|| / ||model||, the larger of
    both outputs'. It is empty, with a UserWarning, where onnxruntime is missing. ONNX above 1.5 GiB keeps its weights
    in a second file, `path` + ".data".

    Raises ValueError for another model, an unknown format, another suffix or size, training mode, and a dtype that
    onnxruntime can't run on a CPU; FileExistsError if `path` is there; ImportError if onnx or onnxscript is missing;
    RuntimeError if an error is above `BOUNDS`.
    """
    path = Path(path)
    size = None if size is None else check_size("size", size)
    _check(model, path, format, size)
    write, run = FORMATS[format].write, FORMATS[format].run
    with _whole(path) as temporary:
        write(trace(model, size), temporary, describe(model))
        if format == "onnx" and not _installed("onnxruntime"):
            warnings.warn(f"{path}: {UNCHECKED}", stacklevel=2)
            return {}
        return _compare(run(temporary), model, path, size)


def trace(model: Backbone, size: tuple[int, int] | None = None) -> ExportedProgram:
    """`model` as a torch.export program with scaled_dot_product_attention, whatever `model.attention` is.

    size: as in `export`.
    """
    B, h, w = TRACED
    p = model.stride
    H, W = size or (h * p, w * p)
    axes = {0: Dim("batch", min=1)}
    if size is None and isinstance(model, DINOv3ViT):
        axes |= {2: p * Dim("h", min=2), 3: p * Dim("w", min=2)}
    elif size is None:
        axes |= {2: Dim("height", min=2 * p), 3: Dim("width", min=2 * p)}
    images = torch.zeros(B, model.config.num_channels, H, W, device=model.device)
    with torch.no_grad():
        program = torch.export.export(_NamedOutputs(model), (images,), dynamic_shapes={"pixel_values": axes})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # would be written to the file, with the paths of this machine
    return program


def describe(model: Backbone) -> dict[str, str]:
    """Name, weights and geometry of the model, as the metadata that is written into the file."""
    return {
        "model": model.config.name,
        "weights": model.weights_id,
        "patch_size" if isinstance(model, DINOv3ViT) else "stride": str(model.stride),
        "num_prefix_tokens": str(model.num_prefix_tokens),
    }


class _NamedOutputs(nn.Module):
    """The model with a plain dictionary as its output, which a file can be loaded with where this package is not."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = copy.copy(model)  # shares the weights
        if isinstance(self.model, DINOv3ViT):
            self.model.attention = "sdpa"

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        output = self.model(pixel_values)
        return {name: getattr(output, name) for name in OUTPUTS}


# ---- the formats


def _write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=OUTPUTS,
            verbose=False,
        )
    assert onnx_program is not None
    if hasattr(onnx_program, "rename_axes"):  # torch 2.11
        shape = onnx_program.model.graph.inputs[0].shape  # (s0, 3, 16*s1, 16*s2) or (s0, 3, s1, s2)
        assert shape is not None
        symbols = [str(axis).rpartition("*")[2] for axis in shape]
        sides = ("h", "w") if "*" in str(shape[2]) else ("height", "width")
        names = dict(zip(symbols, ("batch", "channels", *sides), strict=True))
        onnx_program.rename_axes({symbol: name for symbol, name in names.items() if not symbol.isdecimal()})
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(path)


def _run_onnx(path: Path) -> Runtime:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> dict[str, Tensor]:
        arrays = session.run(OUTPUTS, {"pixel_values": images.cpu().numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(OUTPUTS, arrays, strict=True)}

    return run


def _write_pt2(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    with _late_errors(path) as file:
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})


def _run_pt2(path: Path) -> Runtime:
    return torch.export.load(path).module()


def _write_aoti(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    options = {"aot_inductor.metadata": metadata}
    with _late_errors(path) as file:
        torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)


def _run_aoti(path: Path) -> Runtime:
    return torch._inductor.aoti_load_package(str(path))


class Format(NamedTuple):
    """One kind of file: what its name ends with, how it is written, and how it is run."""

    suffix: str
    write: Callable[[ExportedProgram, Path, dict[str, str]], None]
    run: Callable[[Path], Runtime]


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _run_onnx),
    "pt2": Format(".pt2", _write_pt2, _run_pt2),
    "aoti": Format(".aoti.pt2", _write_aoti, _run_aoti),
}
INSTALL = "pip install 'dinov3-lite[export]'"
UNCHECKED = f"not checked, which needs onnxruntime: {INSTALL}"


# ---- checks, before and after


def _check(model: Backbone, path: Path, format: str, size: tuple[int, int] | None) -> None:
    """What would otherwise fail after all the work, or not at all."""
    if not isinstance(model, Backbone):
        raise ValueError(
            f"model is a {type(model).__name__}: expected a DINOv3ViT or DINOv3ConvNeXt; of one that torch.compile or "
            "another module wraps, give the one inside"
        )
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}: expected one of {', '.join(FORMATS)}")
    suffix = Path(f"model{FORMATS[format].suffix}").suffix
    if path.suffix != suffix:
        raise ValueError(f"{path}: expected a name that ends with {suffix} for the format {format!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}: make it first")
    for file in (path, _weights_of(path)):
        if file.exists():
            raise FileExistsError(f"{file}: exists already: remove it, or choose another name")
    if model.training:
        raise ValueError("the model is in training mode, where features are random: call model.eval() first")
    if size is not None:
        model.check_images(torch.empty(1, model.config.num_channels, *size, device="meta"))
    if format == "onnx":
        if missing := [package for package in ("onnx", "onnxscript") if not _installed(package)]:
            raise ImportError(f"the format 'onnx' needs {' and '.join(missing)}: {INSTALL}")
        dtype = model.dtype
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(
                f"the weights are {dtype}, which onnxruntime can't run on a CPU: load the model with dtype "
                "torch.float32 or torch.float16, or export it as pt2 or aoti"
            )


@torch.no_grad()
def _compare(run: Runtime, model: Backbone, path: Path, size: tuple[int, int] | None) -> dict[tuple[int, ...], float]:
    """The relative error at each shape tried, or RuntimeError if one is too large."""
    p, bound = model.stride, BOUNDS[model.dtype]
    odd = 0 if isinstance(model, DINOv3ViT) else 5  # a ConvNeXt takes any size
    errors: dict[tuple[int, ...], float] = {}
    for B, h, w in CHECKED:
        shape = (B, model.config.num_channels, *(size or (h * p + odd, w * p + odd)))
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(model.device)
        ours, theirs = model(images), run(images)
        error = max(_relative_error(theirs[name], getattr(ours, name)) for name in OUTPUTS)
        if not error <= bound:  # NaN too
            raise RuntimeError(
                f"{path}: not written: for images of shape {shape} it differs from the model by a relative error of "
                f"{error:.1e}, expected at most {bound:.1e}"
            )
        errors[shape] = error
    return errors


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _weights_of(path: Path) -> Path:
    """Where torch's exporter writes the weights of an ONNX file that would be too large for its format (2 GiB)."""
    return path.with_name(f"{path.name}.data")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """`path` in a temporary folder beside it: files written there move to their places at the end, `path` the last."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        for file in (_weights_of(temporary), temporary):
            if file.exists():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                os.replace(file, path.with_name(file.name))


class _WriteOnly(io.BytesIO):
    """A file for torch's writer of archives, which ends the process where one of its writes fails: it keeps the first
    error for later. It is a BytesIO to those who check.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def seek(self, *_: int) -> int:
        return 0  # to the beginning, once all is written


@contextmanager
def _late_errors(path: Path) -> Iterator[Any]:
    """What torch is given to write `path` to, so that a full disk is an OSError that names it."""
    if importlib.util.find_spec("torch.export.pt2_archive") is None:  # before torch 2.8, whose files were zipfile's
        yield str(path)
        return
    try:
        with path.open("wb") as opened:
            file = _WriteOnly(opened)
            yield file
            if file.error:
                raise file.error
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks: that torchvision is missing, that its own code uses what is deprecated."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
