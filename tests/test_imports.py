"""Who may import whom, what an import pulls in, and what a wheel installs."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_python
from packaging.version import Version

import dinov3_lite
from dinov3_lite import visualize
from dinov3_lite.checkpoint.layouts import LAYOUTS
from dinov3_lite.extraction.decode import decoders
from dinov3_lite.extraction.parquet import open_parquet
from dinov3_lite.extraction.sources import Listing, filesystem, find_sources, pictures
from dinov3_lite.extras import needed
from dinov3_lite.pixels import open_file
from dinov3_lite.tasks.data import read_mask
from dinov3_lite.tasks.drawing import draw_matches, save_picture

# The rooms of the library that know files, for those who may use any of them.
CHECKPOINT = {
    f"dinov3_lite.checkpoint{room}"
    for room in (
        "",
        ".containers",
        ".files",
        ".words",
        ".folders",
        ".hub",
        ".layouts",
        ".spans",
        ".layouts.table",
        ".layouts.transformers",
        ".saving",
    )
}
# The floors: a file may import, of ours, only what stands here. `lazily` counts as importing.
EDGES = {
    "kernels/availability.py": {"tiles_triton"},
    "kernels/measured.py": set(),
    "kernels/tuning.py": {"measured"},
    "kernels/operators.py": set(),
    "kernels/reference.py": set(),
    "kernels/tiles_triton.py": set(),
    "kernels/rotate_triton.py": {"tiles_triton"},
    "kernels/rope_attention_triton.py": {"tiles_triton"},
    "kernels/rope_attention_backward_triton.py": {"rope_attention_triton", "tiles_triton"},
    "kernels/layer_norm_triton.py": {"tiles_triton"},
    "kernels/swiglu_triton.py": {"tiles_triton"},
    "kernels/plain.py": {"reference"},
    "kernels/first_use.py": {"tuning"},
    "kernels/rotate.py": {"availability", "first_use", "operators", "plain", "rotate_triton", "tuning"},
    "kernels/rope_attention_launch.py": {
        *("first_use", "plain", "rope_attention_backward_triton", "rope_attention_triton", "tuning")
    },
    "kernels/rope_attention.py": {"operators", "rope_attention_launch", "rotate", "tuning"},
    "kernels/layer_norm.py": {
        *("availability", "first_use", "layer_norm_triton", "operators", "plain", "reference", "tuning")
    },
    "kernels/swiglu.py": {"availability", "first_use", "operators", "plain", "reference", "swiglu_triton", "tuning"},
    "kernels/__init__.py": {"availability", "layer_norm", "reference", "rope_attention", "swiglu"},
    "kernels/builds.py": {  # the offline gate's: nothing of the library imports it
        *("layer_norm_triton", "rope_attention_backward_triton", "rope_attention_triton", "rotate_triton"),
        *("swiglu_triton", "tuning"),
    },
    "dinov3_lite/config.py": set(),
    "dinov3_lite/tracing.py": set(),
    "dinov3_lite/rope.py": {"config", "tracing"},
    "dinov3_lite/checks.py": {"tracing"},
    "dinov3_lite/attention.py": {
        *("attention_ways", "kernels", "kernels.availability", "kernels.first_use", "rope", "tracing")
    },
    "dinov3_lite/checkpoint/files.py": set(),
    "dinov3_lite/checkpoint/words.py": set(),
    "dinov3_lite/checkpoint/spans.py": set(),
    "dinov3_lite/checkpoint/json_files.py": {"checkpoint.words"},
    "dinov3_lite/checkpoint/folders.py": {"checkpoint.words", "checkpoint.json_files", "checkpoint.spans"},
    "dinov3_lite/checkpoint/pickles.py": set(),
    "dinov3_lite/checkpoint/pth.py": {"checkpoint.pickles", "checkpoint.spans", "checkpoint.words", "pages"},
    "dinov3_lite/checkpoint/choose.py": set(),
    "dinov3_lite/checkpoint/containers.py": {"checkpoint.words", "checkpoint.pth", "checkpoint.spans", "pages"},
    "dinov3_lite/checkpoint/matching.py": {
        *("checkpoint.containers", "checkpoint.words", "checkpoint.layouts", "checkpoint.layouts.table"),
        *("checkpoint.choose", "checkpoint.spans"),
    },
    "dinov3_lite/checkpoint/layouts/table.py": set(),
    "dinov3_lite/checkpoint/layouts/vit.py": {"checkpoint.layouts.table", "config", "rope"},
    "dinov3_lite/checkpoint/layouts/*": {
        *("checkpoint.choose", "checkpoint.words", "checkpoint.json_files", "dinov3_lite/checkpoint/layouts/*"),
        "config",
    },
    "dinov3_lite/checkpoint/hub.py": {"checkpoint.words", "checkpoint.layouts", "checkpoint.layouts.timm"},
    "dinov3_lite/checkpoint/__init__.py": {
        *("checkpoint.containers", "checkpoint.words", "checkpoint.folders"),
        *("checkpoint.json_files", "checkpoint.layouts.others", "checkpoint.matching"),
        *("checkpoint.layouts", "checkpoint.layouts.table", "checkpoint.layouts.vit", "checkpoint.spans", "pages"),
    },
    "dinov3_lite/pretrained.py": {
        *("checkpoint", "checkpoint.channels", "checkpoint.hub", "checkpoint.saving", "checkpoint.spans"),
        *("pages", "sharding.loading", "sharding.parameters", "sharding.saving"),
    },
    "dinov3_lite/sharding/*": {
        *("dinov3_lite/sharding/*", "checkpoint", "checkpoint.containers", "checkpoint.words", "checkpoint.hub"),
        *("checkpoint.saving", "checkpoint.spans", "config", "layers"),
    },
    "dinov3_lite/checkpoint/channels.py": {"checkpoint", "checkpoint.spans"},
    "dinov3_lite/checkpoint/preprocessing.py": {"checkpoint", "checkpoint.json_files"},
    "dinov3_lite/checkpoint/saving.py": {
        *("checkpoint", "checkpoint.containers", "checkpoint.files", "checkpoint.folders", "checkpoint.matching"),
        *("checkpoint.layouts", "checkpoint.layouts.table", "checkpoint.layouts.vit", "checkpoint.spans"),
        *("config", "console"),
    },
    "dinov3_lite/packing.py": {"attention", "kernels"},
    "dinov3_lite/features.py": {"checks", "config"},
    "dinov3_lite/layers.py": {"attention", "config", "kernels", "rope", "tracing"},
    "dinov3_lite/model.py": {
        *("attention", "checks", "config", "features", "layers", "packing", "pages", "pretrained", "rope", "tracing")
    },
    "dinov3_lite/image.py": {"checkpoint.channels", "checkpoint.hub", "checkpoint.preprocessing", "checks", "pixels"},
    "dinov3_lite/convnext.py": {
        *("checks", "config", "convnext_features", "features", "layers", "model", "pages", "pretrained", "tracing")
    },
    "dinov3_lite/convnext_features.py": {"checks", "config", "features"},
    "dinov3_lite/pixels.py": {"extras"},
    "dinov3_lite/encoder.py": {"loading"},
    "dinov3_lite/interfaces.py": {
        *("checkpoint", "checkpoint.words", "checkpoint.json_files", "checks", "convnext", "convnext_features"),
        *("features", "model", "pretrained"),
    },
    "dinov3_lite/loading.py": {"attention", "checks", "convnext", "model", "pretrained"},
    "dinov3_lite/finetune.py": {"pretrained"},
    "dinov3_lite/window.py": {"checks", "features", "loading"},
    "dinov3_lite/export.py": {"checks", "loading", "model"},
    "dinov3_lite/pages.py": set(),
    "dinov3_lite/lent.py": {"pages", "pretrained", "tracing"},
    "dinov3_lite/prepacked.py": {"pages"},
    "dinov3_lite/attention_ways.py": {"prepacked"},
    "dinov3_lite/stopwatch.py": set(),
    "dinov3_lite/choices.py": {"pages", "stopwatch"},
    "dinov3_lite/folding.py": {"convnext", "features", "image", "layers"},
    "dinov3_lite/projection.py": {"choices", "lent", "pages", "prepacked", "stopwatch"},
    "dinov3_lite/stand_ins.py": {
        *("attention", "attention_ways", "choices", "convnext", "folding", "layers", "packing", "projection"),
        *("rope", "stopwatch"),
    },
    "dinov3_lite/graphs.py": set(),
    "dinov3_lite/prepared.py": {
        *("attention", "checks", "choices", "convnext", "folding", "graphs", "image", "layers", "lent", "model"),
        *("packing", "prepacked", "stand_ins", "tracing", "twin"),
    },
    "dinov3_lite/twin.py": {"convnext", "layers", "lent", "pretrained"},
    "dinov3_lite/inference.py": {"choices", "convnext", "image", "model", "prepared", "pretrained"},
    "dinov3_lite/visualize.py": {"extras"},
    "dinov3_lite/extras.py": set(),
    "dinov3_lite/sample.py": {
        *("checkpoint", "checkpoint.containers", "checkpoint.files", "checkpoint.layouts", "checkpoint.layouts.cards"),
        *("config", "convnext", "image", "model"),
    },
    "dinov3_lite/__init__.py": {
        *("config", "convnext", "encoder", "finetune", "image", "inference", "interfaces", "loading"),
        *("model", "sharding.loading", "window"),
        *("extraction.engines", "extraction.store"),
    },
    "dinov3_lite/explore/*": {"extras", "image", "loading"},
    "dinov3_lite/tasks/*": {
        *("dinov3_lite/tasks/*", "checkpoint.containers", "checkpoint.files", "checkpoint.hub", "checkpoint.spans"),
        *("extras", "finetune", "image", "inference", "loading", "pixels", "visualize", "window"),
    },
    "dinov3_lite/console.py": set(),
    "dinov3_lite/__main__.py": {"console"},
    "dinov3_lite/commands/*": {
        *("dinov3_lite/commands/*", "checkpoint", "checkpoint.containers", "checkpoint.files", "checkpoint.hub"),
        *(
            "checkpoint.preprocessing",
            "console",
            "convnext",
            "explore",
            "export",
            "image",
            "loading",
            "pixels",
            "sample",
            "tasks",
            "visualize",
        ),
        *(f"tasks.{name}" for name in ("data", "drawing", "matching", "measures", "predicting", "probing", "tracking")),
    },
    **{  # reading features stands on folder alone, writing them on the model; engines on all
        f"dinov3_lite/extraction/{name}.py": {f"extraction.{own}" for own in own} | others
        for name, own, others in (
            ("folder", ("writer",), set()),
            ("remote", ("folder", "sources"), set()),
            ("store", ("dataset", "folder", "remote"), set()),
            ("dataset", (), set()),
            ("writer", (), {"checkpoint.files"}),
            ("sources", (), {"extras"}),
            ("parquet", ("sources",), {"extras"}),
            ("tars", (), set()),
            ("doubled", (), set()),
            ("plan", ("doubled", "folder", "parquet", "sources", "tars"), set()),
            ("reading", ("parquet", "plan", "sources", "tars"), set()),
            ("decode", ("reading",), {"extras", "image", "pixels"}),
            ("pipeline", ("decode", "reading"), set()),
            ("commit", ("folder", "pipeline", "writer"), {"checkpoint.files"}),
            ("compute", (), {"features", "image", "inference", "loading", "model"}),
            (
                "job",
                ("commit", "compute", "decode", "folder", "plan", "sources"),
                {"checkpoint", "checkpoint.hub", "checkpoint.layouts", "checkpoint.layouts.vit", "image", "loading"},
            ),
            (
                "shard",
                ("commit", "compute", "decode", "folder", "job", "mesh", "pipeline", "plan", "reading", "remote"),
                {"checkpoint", "checkpoint.hub", "image", "loading"},
            ),
            ("mesh", ("compute", "parts"), {"image", "loading", "model"}),
            ("check", ("folder", "plan", "remote"), set()),
            ("parts", (), set()),
            ("progress", ("folder",), set()),
            (
                "engines",
                (
                    *("commit", "compute", "folder", "job", "mesh", "parts", "plan", "progress", "remote", "shard"),
                    "store",
                ),
                {"console", "extras", "image", "loading"},
            ),
            ("formats", ("store",), {"checkpoint.files", "extras"}),
            ("command", ("check", "engines", "formats", "remote"), {"commands.arguments", "console"}),
            ("__init__", ("engines", "store"), {"extraction"}),
        )
    },
    "convert/verify.py": {"convert/*", *CHECKPOINT, "dinov3_lite.config", "dinov3_lite.loading"},
    "convert/describe.py": {
        *(
            "convert/*",
            "dinov3_lite.checkpoint",
            "dinov3_lite.checkpoint.words",
            "dinov3_lite.image",
            "dinov3_lite.rope",
        ),
    },
    "convert/*": {"convert/*", *CHECKPOINT, "dinov3_lite.console"},
}
OURS = ("dinov3_lite", "convert", "kernels")


def library_files() -> list[Path]:
    return sorted(p.relative_to(ROOT) for folder in OURS for p in (ROOT / folder).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it: `config` or `commands.features` for one of its own package (""
    for the package's names), or the whole dotted name.
    """
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in OURS}
        elif isinstance(node, ast.ImportFrom) and node.level:
            folders = file.parent.parts[: len(file.parent.parts) - node.level + 1]
            assert folders, f"{file}:{node.lineno}"
            if node.module:
                found.add(".".join((*folders[1:], node.module)))
            else:
                modules = {a.name for a in node.names if list(ROOT.joinpath(*folders).glob(f"{a.name}*"))}
                found |= {".".join((*folders[1:], name)) for name in modules}
                found |= {".".join(folders[1:])} if len(modules) < len(node.names) else set()
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", library_files(), ids=str)
def test_nothing_imports_upwards(file):
    folder = f"{file.parent}/*"
    allowed = EDGES.get(str(file), EDGES.get(folder))
    assert allowed is not None, f"{file} has no floor yet: add it to EDGES"
    own = {".".join((*file.parent.parts[1:], p.stem)) for p in (ROOT / file.parent).glob("*.py")} | {""}
    assert imports(file) <= allowed | (own if folder in allowed else set())


@pytest.mark.parametrize("package", OURS)
def test_nothing_imports_in_a_circle(package):
    """Every module can stand before all that import it."""
    files = {file for file in library_files() if file.parts[0] == package}
    edges = {
        ".".join(file.with_suffix("").parts[1:]).removesuffix("__init__").rstrip("."): imports(file) for file in files
    }
    done: set[str] = set()
    while ready := {module for module in edges.keys() - done if edges[module] & edges.keys() <= done | {module}}:
        done |= ready
    assert not {module: edges[module] for module in edges.keys() - done}


def test_the_library_never_names_its_references():
    for file in library_files():
        if file == Path("convert/verify.py"):
            continue  # --verify compares with transformers where it is installed
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"transformers", "timm", "torchvision"}, file


def test_no_private_name_is_imported_from_pytorch():
    """One such was not there in PyTorch 2.6, which the library says that it runs on, and nothing could be imported."""
    for file in library_files():
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                private = [a.name for a in node.names if a.name.startswith("_") and a.name != "_pytree"]
                assert not private, f"{file} imports {private} from {node.module}"


def test_the_package_imports_a_name_when_it_is_used():
    code = """
import sys, torch, dinov3_lite
assert not any(name.startswith("dinov3_lite.") for name in sys.modules)
dinov3_lite.DINOv3Config
assert "dinov3_lite.config" in sys.modules and "dinov3_lite.model" not in sys.modules
assert set(dinov3_lite.__all__) <= set(dir(dinov3_lite))
from dinov3_lite import *
assert DINOv3ViT is dinov3_lite.DINOv3ViT and optimize_for_inference is dinov3_lite.optimize_for_inference
try:
    dinov3_lite.DINOv2
except AttributeError as error:
    print(error)
"""
    done = run_python(code)
    assert done.stdout.strip() == "module 'dinov3_lite' has no attribute 'DINOv2'", done.stderr


def test_no_name_of_the_package_hides_a_module():
    modules = {file.stem for file in library_files() if file.parent == Path("dinov3_lite")} | {"checkpoint", "kernels"}
    assert not modules & set(dinov3_lite.__all__)
    assert sorted(dinov3_lite._MODULES) == sorted(dinov3_lite.__all__)


def test_importing_pulls_in_nothing_heavy():
    code = """
import sys, torch
before = set(sys.modules)
import dinov3_lite, convert, dinov3_lite.export, dinov3_lite.inference
from dinov3_lite import DINOv3ViT
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"transformers", "triton", "PIL", "huggingface_hub", "matplotlib", "timm", "torchvision", "sympy", "onnx"}
print(sorted(new & (heavy | {"onnxscript", "onnxruntime"})))
"""
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_loading_and_running_pull_in_nothing_heavy_either(tmp_path):
    from helpers import TINY, write_checkpoint

    heavy = {"transformers", "PIL", "huggingface_hub"}
    if Version(torch.__version__) >= Version("2.13"):
        heavy |= {"sympy", "triton"}  # older releases import them by themselves for random numbers on the meta device
    code = f"""
import sys, torch
before = set(sys.modules)
from dinov3_lite import DINOv3ViT, ImageProcessor
model = DINOv3ViT.from_pretrained({str(write_checkpoint(tmp_path, TINY))!r})
images = ImageProcessor(size=(16, 16))(torch.zeros(3, 20, 20, dtype=torch.uint8))
with torch.no_grad():
    model(**images)
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & {heavy}))
"""
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_load_imports_what_it_needs(tmp_path):
    """Nothing of writing, of other channels, of the hub's client, of sharding, preparing or tasks."""
    from helpers import TINY, write_checkpoint

    folder = write_checkpoint(tmp_path / "folder", TINY)
    file = dinov3_lite.DINOv3ViT(TINY).save_pretrained(tmp_path / "lite.safetensors")
    code = f"""
import sys, torch
before = set(sys.modules)
from dinov3_lite import DINOv3ViT
for source in ({str(folder)!r}, {str(file)!r}):
    DINOv3ViT.from_pretrained(source)
    print(*sorted(set(sys.modules) - before))
"""
    first, second = run_python(code).stdout.splitlines()
    assert first == second
    ours = {name.removeprefix("dinov3_lite.") for name in first.split() if name.startswith("dinov3_lite.")}
    assert ours == {
        *("attention", "checks", "config", "features", "layers", "model", "packing", "pages", "pretrained", "rope"),
        "tracing",
        *("checkpoint", *(f"checkpoint.{name}" for name in ("choose", "containers", "folders", "hub", "json_files"))),
        *("checkpoint.layouts", "checkpoint.matching", "checkpoint.spans", "checkpoint.words"),
        *(f"checkpoint.layouts.{name}" for name in ("cards", "convnext", "table", "vit", *LAYOUTS)),
    }
    others = {name.split(".")[0] for name in first.split()} - {"dinov3_lite"}
    assert others <= {"safetensors", "torch"}


@pytest.mark.parametrize(
    ("package", "use", "message"),
    [
        ("PIL", lambda folder: decoders(), "^opening pictures needs Pillow: pip install 'dinov3-lite.images.'$"),
        ("PIL", lambda folder: open_file(folder / "a.png").__enter__(), "a.png: opening pictures needs P"),
        ("PIL", lambda folder: read_mask(folder / "a.png"), "a.png: opening pictures needs Pillow"),
        ("PIL", lambda folder: visualize.draw([]), "^drawing pictures needs Pillow: pip install"),
        ("PIL", lambda folder: save_picture(np.zeros((2, 2), np.uint8), folder / "a.png"), "^drawing pictures needs P"),
        ("PIL", lambda folder: draw_matches(*np.zeros((2, 4, 4, 3), np.uint8), []), "^drawing pictures needs Pillow"),
        (
            "fsspec",
            lambda folder: filesystem("s3://a/b.txt"),
            "^s3://a/b.txt: opening URLs needs fsspec: pip install f",
        ),
        ("fsspec", lambda folder: list(pictures(find_sources(["s3://a/b.txt"])[0], Listing())), "^s3://a/b.txt: open"),
        ("pyarrow", lambda folder: open_parquet("a.parquet"), "^a.parquet: reading parquet needs pyarrow: pip install"),
    ],
)
def test_a_package_that_is_missing_is_named(package, use, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        use(tmp_path)


def test_a_list_of_files_is_read_without_fsspec(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("a.jpg\n")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert list(pictures(find_sources([str(tmp_path / "list.txt")])[0], Listing())) == ["a.jpg"]


def test_why_an_installed_package_is_not_imported_is_told():
    with (
        pytest.raises(ImportError, match=r"^reading videos needs opencv \(libGL.so.1\): pip install it$"),
        needed("reading videos", "opencv", "it"),
    ):
        raise ImportError("libGL.so.1")


def test_the_kernels_folder_is_harmless_under_its_own_name():
    """With the root on the path, transformers takes our folder for the package `kernels`: that must not break it."""
    pytest.importorskip("transformers")
    code = """
import kernels, transformers
assert kernels.__version__
assert not hasattr(kernels, "CUDAProperties")
print(transformers.DINOv3ViTModel.__name__)
"""
    done = run_python(code, cwd=ROOT)
    assert done.stdout.strip() == "DINOv3ViTModel", done.stderr
