"""ONNX, torch.export programs and AOTInductor packages: equal to the model at what was not traced, whole or not there."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, TINY_GATED, relative_error, run_python, trained_like, write_checkpoint

import dinov3_lite.export
from dinov3_lite import DINOv3ViT, attention
from dinov3_lite.__main__ import main
from dinov3_lite.encoder import PyramidEncoder
from dinov3_lite.export import FORMATS, OUTPUTS, export

REAL_HEAD_DIM = replace(TINY, patch_size=16, hidden_size=128, num_hidden_layers=1)  # 64, as in the released models
SHALLOW = replace(TINY, num_hidden_layers=1)
GATED = replace(TINY_GATED, num_hidden_layers=2)
SHAPES = [
    (1, 2, 9),
    (2, 5, 3),
    (4, 3, 3),
    (1, 20, 16),
]  # batch and grid: none of them traced, none that `export` checks


def load(folder, config, **kwargs) -> DINOv3ViT:
    outliers = kwargs.pop("outliers", False)
    return DINOv3ViT.from_pretrained(
        write_checkpoint(folder, config, trained_like(config, outliers=outliers)), **kwargs
    )


@pytest.fixture(scope="module")
def onnxruntime():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    return pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def gated(tmp_path_factory, onnxruntime):
    """A model and its ONNX file."""
    folder = tmp_path_factory.mktemp("gated")
    model = load(folder / "checkpoint", GATED)
    export(model, folder / "model.onnx", "onnx")
    return model, folder / "model.onnx"


@torch.no_grad()
def assert_equal_at(run, model, shapes, bound):
    """`run`, from a batch of images to both outputs, against the model."""
    p = model.patch_size
    for batch, h, w in shapes:
        images = torch.randn(batch, 3, h * p, w * p)
        actual, expected = run(images), model(images)
        for name in OUTPUTS:
            assert actual[name].dtype == getattr(expected, name).dtype
            assert relative_error(actual[name], getattr(expected, name)) <= bound, (name, batch, h, w)


def in_onnxruntime(session):
    def run(images):
        arrays = session.run(None, {"pixel_values": images.numpy()})
        return {out.name: torch.from_numpy(a) for out, a in zip(session.get_outputs(), arrays, strict=True)}

    return run


# ---- ONNX


def test_onnx_at_other_batches_and_resolutions(gated, onnxruntime):
    model, file = gated
    session = onnxruntime.InferenceSession(file)
    assert_equal_at(in_onnxruntime(session), model, SHAPES, 5e-6)
    (images,), (tokens, cls_token) = session.get_inputs(), session.get_outputs()
    assert images.name == "pixel_values" and images.type == tokens.type == cls_token.type == "tensor(float)"
    assert (tokens.name, cls_token.name) == OUTPUTS
    assert images.shape[1] == 3 and tokens.shape[2] == 32 and cls_token.shape[1] == 32
    if hasattr(torch.onnx.ONNXProgram, "rename_axes"):
        assert images.shape == ["batch", 3, "8*h", "8*w"] and tokens.shape == ["batch", "h*w + 3", 32]


def test_onnx_says_what_it_is_and_not_where_it_was_made(gated, onnxruntime):
    model, file = gated
    import onnx

    about = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert about == {"model": "vit-c32-d2-h2", "weights": model.weights_id, "patch_size": "8", "num_prefix_tokens": "3"}
    (standard,) = onnx.load(file).opset_import
    assert (standard.domain, standard.version) == ("", dinov3_lite.export.OPSET)
    assert str(ROOT).encode() not in file.read_bytes()


def test_onnx_in_float16_keeps_a_stream_that_float16_can_not_hold(tmp_path, onnxruntime):
    model = load(tmp_path, REAL_HEAD_DIM, outliers=True, dtype=torch.float16)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32), output_hidden_states=True).hidden_states[1].abs().max() > 65504
    export(model, tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].type == "tensor(float)"  # images stay float32
    assert_equal_at(in_onnxruntime(session), model, SHAPES, 2e-3)


def test_onnx_with_weights_beside_it(tmp_path, onnxruntime, monkeypatch):
    """What happens above 1.5 GiB, here from the first byte on."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    model = load(tmp_path / "checkpoint", SHALLOW)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    export(model, here / "model.onnx", "onnx")
    assert {file.name for file in here.iterdir()} == {"model.onnx", "model.onnx.data"}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert (here / "model.onnx.data").stat().st_size > 0.7 * weights
    here.rename(there)  # the two find each other anywhere
    assert_equal_at(in_onnxruntime(onnxruntime.InferenceSession(there / "model.onnx")), model, SHAPES[:1], 5e-6)
    (there / "model.onnx").unlink()
    with pytest.raises(FileExistsError, match=r"model\.onnx\.data: exists already"):
        export(model, there / "model.onnx", "onnx")


def code_of_the_page(name):
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"^```python {name}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return code


def test_the_pages_onnxruntime_code_runs(gated):
    model, file = gated
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype(np.float32)
    session = {"pixels": images}
    exec(code_of_the_page("onnxruntime").replace("vitb16.onnx", str(file)), session)
    with torch.no_grad():
        expected = model(torch.from_numpy(images))
    assert session["feature_map"].shape == (2, 32, 8, 12)
    assert relative_error(torch.from_numpy(session["feature_map"]), expected.feature_map) < 5e-6
    assert relative_error(torch.from_numpy(session["cls_token"]), expected.cls_token) < 5e-6


# ---- torch.export and AOTInductor


def test_pt2_at_other_batches_and_resolutions(tmp_path):
    model = load(tmp_path, GATED)
    assert set(export(model, tmp_path / "model.pt2", "pt2").values()) == {0.0}
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert_equal_at(program.module(), model, SHAPES, 0.0)
    assert json.loads(extra["metadata.json"])["num_prefix_tokens"] == "3"


def test_aoti_at_other_batches_and_resolutions(tmp_path):
    model = load(tmp_path, REAL_HEAD_DIM)
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):  # compiles in half the time
        export(model, tmp_path / "model.pt2", "aoti")
    package = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    assert_equal_at(package, model, SHAPES, 5e-6)
    assert package.get_metadata()["patch_size"] == "16"
    session = {}
    exec(code_of_the_page("aoti").replace("vitb16.aoti.pt2", str(tmp_path / "model.pt2")), session)
    assert session["out"]["last_hidden_state"].shape == (2, 4 * 6 + 5, 128)
    runs_without_us("torch._inductor.aoti_load_package({!r})", tmp_path / "model.pt2", model)


def test_pt2_of_a_fixed_resolution_leaves_the_batch_free(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "has", lambda name: False)  # a program's operators: in bfloat16 a CPU has others
    model = load(tmp_path, SHALLOW, dtype=torch.bfloat16)
    errors = export(model, tmp_path / "model.pt2", "pt2", size=(24, 40))
    assert errors == {(1, 3, 24, 40): 0.0, (3, 3, 24, 40): 0.0}
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert_equal_at(program, model, [(5, 3, 5)], 0.0)
    with pytest.raises(Exception, match="size"):
        program(torch.randn(1, 3, 40, 24))
    runs_without_us("torch.export.load({!r}).module()", tmp_path / "model.pt2", model)


def runs_without_us(load_expression, file, model):
    """In a process where this package can't be imported."""
    shape = (1, 3, 3 * model.patch_size, 5 * model.patch_size)
    images = torch.linspace(-2, 2, math.prod(shape)).view(shape)
    code = f"""
import sys
sys.modules["dinov3_lite"] = None
import torch
run = {load_expression.format(str(file))}
with torch.no_grad():
    print(run(torch.linspace(-2, 2, {math.prod(shape)}).view{shape})["pooler_output"].double().norm().item())
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(images).pooler_output.double().norm().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_the_model_is_left_as_it_was(tmp_path):
    model = load(tmp_path, SHALLOW, attention="eager")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    program = dinov3_lite.export.trace(model)
    assert model.attention == "eager" and all(parameter.requires_grad for parameter in model.parameters())
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    operators = {str(node.target) for node in program.graph.nodes}
    assert any("scaled_dot_product_attention" in operator for operator in operators)


# ---- whole or not at all


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    """By one percent in the periods of RoPE."""
    model = load(tmp_path / "checkpoint", SHALLOW)
    other = load(tmp_path / "other", SHALLOW)
    with torch.no_grad():
        other.rope_embed.periods *= 1.01
    trace = dinov3_lite.export.trace
    monkeypatch.setattr(dinov3_lite.export, "trace", lambda model, size: trace(other, size))
    (tmp_path / "out").mkdir()
    with pytest.raises(
        RuntimeError, match=r"not written: for images of shape \(1, 3, 16, 56\) it differs .* at most 5"
    ):
        export(model, tmp_path / "out" / "model.pt2", "pt2")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_of_not_a_number_does_not_pass(tmp_path):
    def run(images):
        return dict.fromkeys(OUTPUTS, torch.tensor(float("nan")))

    with pytest.raises(RuntimeError, match="relative error of nan"):
        dinov3_lite.export._compare(run, DINOv3ViT(SHALLOW).eval(), tmp_path, None)


def test_a_failure_to_write_leaves_nothing(tmp_path, monkeypatch):
    model = load(tmp_path / "checkpoint", SHALLOW)

    def full(program, file, **kwargs):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export(model, tmp_path / "model.pt2", "pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "tensorrt"}, ValueError, "format is 'tensorrt': expected one of onnx, pt2, aoti"),
        ({"path": "model.onnx"}, ValueError, r"model\.onnx: expected a name that ends with \.pt2 for the format 'pt2'"),
        ({"path": "nowhere/model.pt2"}, FileNotFoundError, "there is no folder .*nowhere: make it first"),
        ({"path": "there.pt2"}, FileExistsError, r"there\.pt2: exists already: remove it, or choose another name"),
        ({"size": (24, 41)}, ValueError, "image height 24 and width 41 must be multiples of the patch size 8"),
        ({"size": (0, 8)}, ValueError, r"size is \(0, 8\): expected \(height, width\), two whole"),
        ({"size": 12}, ValueError, "image height 12 and width 12 must be multiples"),
        ({"size": "64x64"}, ValueError, r"size is 64x64: expected \(height, width\), two whole numbers of pixels"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    (tmp_path / "there.pt2").touch()
    arguments = {"path": "model.pt2", "format": "pt2", **arguments}
    with pytest.raises(error, match=message):
        export(DINOv3ViT(TINY).eval(), **{**arguments, "path": tmp_path / arguments["path"]})
    assert [file.name for file in tmp_path.iterdir()] == ["there.pt2"]


def test_a_model_in_training_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the model is in training mode.*: call model.eval\(\) first"):
        export(DINOv3ViT(TINY).train(), tmp_path / "model.pt2", "pt2")


@pytest.mark.parametrize("wrap", [PyramidEncoder, torch.compile])
def test_what_is_no_model_is_refused(tmp_path, wrap):
    model = wrap(DINOv3ViT(replace(TINY, num_hidden_layers=4)).eval())
    message = f"model is a {type(model).__name__}: expected a DINOv3ViT or DINOv3ConvNeXt; of one that torch.compile"
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "model.pt2", "pt2")


def test_onnx_in_bfloat16_is_refused(tmp_path, onnxruntime):
    with pytest.raises(ValueError, match=r"the weights are torch.bfloat16, which onnxruntime can't run on a CPU"):
        export(DINOv3ViT(TINY).eval().bfloat16(), tmp_path / "model.onnx", "onnx")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dinov3_lite.export, "_installed", lambda package: package != "onnxscript")
    message = r"the format 'onnx' needs onnxscript: pip install 'dinov3-lite\[export\]'"
    with pytest.raises(ImportError, match=message):
        export(DINOv3ViT(TINY).eval(), tmp_path / "model.onnx", "onnx")


def test_without_onnxruntime_the_file_is_written_and_said_to_be_unchecked(tmp_path, monkeypatch):
    monkeypatch.setattr(dinov3_lite.export, "_installed", lambda package: package != "onnxruntime")
    monkeypatch.setattr(dinov3_lite.export, "trace", lambda model, size: None)
    stub = FORMATS["onnx"]._replace(write=lambda program, path, metadata: path.write_bytes(b"a graph"))
    monkeypatch.setitem(FORMATS, "onnx", stub)
    with pytest.warns(UserWarning, match=r"model.onnx: not checked, which needs onnxruntime: pip install"):
        assert export(DINOv3ViT(SHALLOW).eval(), tmp_path / "model.onnx", "onnx") == {}
    assert (tmp_path / "model.onnx").read_bytes() == b"a graph"


# ---- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = write_checkpoint(tmp_path / "checkpoint", SHALLOW)
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(folder), "--format", "pt2"]) == 0
    out, err = capsys.readouterr()
    assert "vit-c32-d1-h2.pt2: pt2, 0." in out and err == ""
    assert "images 1 x 3 x 16 x 56: relative error to the model 0.0e+00" in out
    assert main(["export", str(folder), "--format", "pt2"]) == 1
    out, err = capsys.readouterr()
    assert err == "dinov3_lite: vit-c32-d1-h2.pt2: exists already: remove it, or choose another name\n"
    assert (
        main(["export", str(folder), "--format", "pt2", "--output", "b.pt2", "--size", "24x40", "--dtype", "float16"])
        == 0
    )
    assert "images 3 x 3 x 24 x 40" in capsys.readouterr().out
    (tmp_path / "c.pt2.notes").write_text("not of the export")
    assert main(["export", str(folder), "--format", "pt2", "--output", "c.pt2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == "c.pt2" and told["files"] == ["c.pt2"] and told["format"] == "pt2"
    assert told["bytes"] == (tmp_path / "c.pt2").stat().st_size and told["model"] == "vit-c32-d1-h2"
    assert [c["images"] for c in told["checked"]] == [[1, 3, 16, 56], [3, 3, 48, 32]]
    assert all(c["relative_error"] < 5e-5 for c in told["checked"])
    for arguments in ([], ["--format", "tensorrt"], ["--format", "pt2", "--size", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["export", str(folder), *arguments])
        assert caught.value.code == 2 and "usage: python -m dinov3_lite export" in capsys.readouterr().err


def test_the_command_without_onnxruntime(tmp_path, monkeypatch, capsys):
    def unchecked(model, path, format, size):
        path.touch()
        return {}

    monkeypatch.setattr("dinov3_lite.export.export", unchecked)
    folder = write_checkpoint(tmp_path / "checkpoint", SHALLOW)
    assert main(["export", str(folder), "--format", "onnx", "--output", str(tmp_path / "model.onnx")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("dinov3_lite: warning: ") and "model.onnx: not checked, which needs onnxruntime: pip" in err


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_file_that_can_t_be_written(format, tmp_path):
    """A limit of 60 KB in place of a full disk. torch's own writer of archives would end the process."""
    if format == "onnx":
        pytest.importorskip("onnxscript")
    write_checkpoint(tmp_path / "checkpoint", SHALLOW)
    command = f"ulimit -f 20; {sys.executable} -m dinov3_lite export checkpoint --format {format} --output x.{format}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(f"dinov3_lite: .*x\\.{format}.*File too large.*\n", done.stderr), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_the_weights_get_their_name_before_the_file_that_needs_them(tmp_path, monkeypatch):
    """Both are on the disk before either is renamed; a crash between the renames leaves no file without its weights."""
    from dinov3_lite import export

    calls = []
    fsync, replace_ = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])

    def replace_once(source, target):
        calls.append(Path(target).name)
        if calls.count("model.onnx"):
            raise OSError("killed")
        replace_(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(OSError, match="killed"), export._whole(tmp_path / "model.onnx") as temporary:
        temporary.write_bytes(b"graph")
        temporary.with_name("model.onnx.data").write_bytes(b"weights")
    assert calls == ["fsync", "model.onnx.data", "fsync", "model.onnx"]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx.data"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", OUTPUTS)
@pytest.mark.parametrize("shape", [0, 1])
def test_each_output_is_checked_at_each_shape_against_what_its_dtype_allows(shape, wrong, dtype, tmp_path):
    model = DINOv3ViT(SHALLOW).eval().to(dtype)
    bound = {torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    shapes = [(1, 3, 2 * 8, 7 * 8), (3, 3, 6 * 8, 4 * 8)]

    def run_with(error):
        def run(images):
            output = model(images)
            given = {name: getattr(output, name).double() for name in OUTPUTS}
            given[wrong] *= 1 + error * (tuple(images.shape) == shapes[shape])
            return given

        return run

    errors = dinov3_lite.export._compare(run_with(0.9 * bound), model, tmp_path / "x", None)
    assert list(errors) == shapes
    assert errors[shapes[shape]] == pytest.approx(0.9 * bound) and errors[shapes[1 - shape]] == 0
    with pytest.raises(RuntimeError, match=r"not written: for images of shape .* expected at most"):
        dinov3_lite.export._compare(run_with(1.1 * bound), model, tmp_path / "x", None)
