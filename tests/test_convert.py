"""`python -m convert`: what is written, and that it is written whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PREPROCESSING, ROOT, TINY, TINY_GATED, run_python, trained_like, write_checkpoint
from safetensors import safe_open

from convert import convert
from convert.__main__ import main
from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.weights import LITE_FILE, open_checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", TINY)


def test_the_file_describes_itself(folder):
    path = convert(folder)
    assert path == folder / LITE_FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert DINOv3Config.from_dict(json.loads(metadata["config"])) == TINY
    assert json.loads(metadata["preprocessing"]) == PREPROCESSING
    assert metadata["source_layout"] == "transformers"
    assert metadata["source_digest"] == metadata["digest"]
    assert metadata["rope"] == "computed"


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_the_file_loads_as_the_source_does(config, dtype, tmp_path):
    folder = write_checkpoint(tmp_path, config)
    expected = DINOv3ViT.from_pretrained(folder, dtype=dtype).state_dict()
    state = DINOv3ViT.from_pretrained(convert(folder, tmp_path / "x.safetensors", dtype=dtype)).state_dict()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def test_every_tensor_is_aligned_for_its_dtype_and_the_data_for_a_cache_line(folder):
    path = convert(folder, dtype=torch.float16)
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header_size) % 64 == 0
    header = json.loads(path.read_bytes()[8 : 8 + header_size])
    del header["__metadata__"]
    assert {entry["dtype"] for entry in header.values()} == {"F32", "F16"}
    for entry in header.values():
        assert entry["data_offsets"][0] % {"F32": 4, "F16": 2}[entry["dtype"]] == 0


def test_a_converted_file_can_be_cast_again(folder, tmp_path):
    half = convert(convert(folder), tmp_path, dtype=torch.bfloat16)
    assert half == tmp_path / LITE_FILE
    opened = open_checkpoint(half)
    assert opened.dtype == torch.bfloat16
    assert opened.metadata["source_layout"] == "transformers"
    assert opened.metadata["source_digest"] == open_checkpoint(folder).digest() != opened.digest()


def test_an_existing_output_is_kept_unless_forced(folder):
    path = convert(folder)
    before = path.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=f"{path}: exists already: use --force to replace it"):
        convert(folder)
    assert path.stat().st_mtime_ns == before
    convert(folder, force=True)
    assert path.stat().st_mtime_ns > before


def test_only_our_layout_is_written_so_far(folder):
    with pytest.raises(ValueError, match="to is 'timm': expected 'lite'"):
        convert(folder, to="timm")


@pytest.mark.skipif(os.name != "posix", reason="file modes and signals of POSIX")
class TestWholeOrNotAtAll:
    CRASH = """
import os, signal, sys
import convert, convert.writer
written = []
def on_bytes(n):
    written.append(n)
    if len(written) == 20:
        {act}
original = convert.write_safetensors
convert.write_safetensors = lambda path, plan, on_bytes: original(path, plan, crash)
crash = on_bytes
convert.convert(sys.argv[1], force=True)
"""

    def crash(self, folder: Path, act: str) -> subprocess.CompletedProcess[str]:
        code = [sys.executable, "-c", self.CRASH.format(act=act), str(folder)]
        return subprocess.run(code, capture_output=True, text=True, cwd=Path(__file__).parent)

    def test_killed(self, folder):
        assert self.crash(folder, "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
        assert not (folder / LITE_FILE).exists()
        assert convert(folder).exists()

    def test_killed_while_replacing(self, folder):
        before = convert(folder).read_bytes()
        self.crash(folder, "os.kill(os.getpid(), signal.SIGKILL)")
        assert (folder / LITE_FILE).read_bytes() == before

    def test_failed(self, folder):
        listing = sorted(folder.iterdir())
        done = self.crash(folder, "raise OSError('the disk is gone')")
        assert done.returncode == 1 and "the disk is gone" in done.stderr
        assert sorted(folder.iterdir()) == listing

    def test_disk_full(self, folder):
        """A limit on file size stands in for a full disk: the write fails half-way."""
        code = f"""
import resource, signal, sys
from convert.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main([{str(folder)!r}]))
"""
        listing = sorted(folder.iterdir())
        done = run_python(code)
        assert done.returncode == 1 and done.stderr.startswith("convert: ") and done.stderr.count("\n") == 1
        assert sorted(folder.iterdir()) == listing

    def test_others_may_read_it(self, folder):
        old = os.umask(0o022)
        try:
            assert convert(folder).stat().st_mode & 0o777 == 0o644
        finally:
            os.umask(old)


# ---- the command


def test_summary_line(folder, capsys):
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("vit-c32-d3-h2  0.0 M parameters  float32  0.1 MB  ")
    assert out.rstrip().endswith(str(folder / LITE_FILE)) and out.count("\n") == 1
    digest = open_checkpoint(folder).digest()[:8]
    assert f"transformers {digest} -> lite {digest}" in out
    assert err == ""


def test_quiet(folder, capsys):
    assert main([str(folder), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_output_and_dtype(folder, tmp_path):
    assert main([str(folder), "--output", str(tmp_path / "half.safetensors"), "--dtype", "bfloat16"]) == 0
    assert open_checkpoint(tmp_path / "half.safetensors").dtype == torch.bfloat16


def test_a_folder_of_models_goes_on_past_a_bad_one(tmp_path, capsys):
    for name in ("a", "b", "c"):
        write_checkpoint(tmp_path / name, TINY)
    (tmp_path / "b" / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and err.count("\n") == 1 and "b/config.json" in err
    assert (tmp_path / "a" / LITE_FILE).exists() and (tmp_path / "c" / LITE_FILE).exists()
    assert main([str(tmp_path), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert (tmp_path / "out" / "c" / LITE_FILE).exists()


@pytest.mark.parametrize("source", ["/nowhere/at/all", str(ROOT / "tests")])
def test_bad_input_is_status_1_and_one_line(source, capsys):
    assert main([source]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"convert: {source}: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["x", "--dtype", "int8"], ["x", "--to", "keras"], ["x", "--nonsense"]])
def test_bad_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m convert" in capsys.readouterr().err


def test_as_a_module_from_the_repository_root(folder):
    done = subprocess.run([sys.executable, "-m", "convert", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "vit-c32-d3-h2" in done.stdout, done.stderr


def test_weights_that_are_not_numbers_survive(tmp_path):
    weights = trained_like(TINY)
    weights["norm.bias"][0] = float("nan")
    folder = write_checkpoint(tmp_path, TINY, weights)
    state = DINOv3ViT.from_pretrained(convert(folder, dtype=torch.float16)).state_dict()
    assert state["norm.bias"][0].isnan() and state["norm.bias"][1:].isfinite().all()
