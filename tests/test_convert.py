"""`python -m convert`: what is written, and that it is written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PREPROCESSING, ROOT, TINY, TINY_GATED, run_python, trained_like, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convert import convert
from convert.__main__ import main
from convert.plan import make_plan, parse_size
from convert.verify import verify
from convert.writer import write
from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.checkpoint import CONVERTED, containers, files, json_files, open_checkpoint
from dinov3_lite.checkpoint.saving import save


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", TINY)


def test_the_file_describes_itself(folder):
    path = convert(folder)
    assert path == folder / CONVERTED
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
    assert half == tmp_path / CONVERTED
    opened = open_checkpoint(half)
    assert opened.dtype == torch.bfloat16
    assert opened.card.source_layout == "transformers"
    assert opened.card.source_digest == open_checkpoint(folder).digest() != opened.digest()


def test_an_existing_output_is_kept_unless_forced(folder):
    path = convert(folder)
    before = path.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=f"{path}: exists already: use --force to replace it"):
        convert(folder)
    assert path.stat().st_mtime_ns == before
    convert(folder, force=True)
    assert path.stat().st_mtime_ns > before


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
@pytest.mark.parametrize("size", ["20KB", 20_000, "0.02MB", "20000"])
def test_arguments_as_the_command_line_and_transformers_take_them(folder, tmp_path, dtype, size):
    out = convert(str(folder), str(tmp_path / "out"), to="transformers", dtype=dtype, max_shard_size=size)
    assert DINOv3ViT.from_pretrained(out).dtype == torch.bfloat16
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1 and all(sum(t.nbytes for t in load_file(s).values()) <= 20_000 for s in shards)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), ("1.5 mb", 1_500_000), ("2TB", 2 * 10**12), (7, 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "int8"}, "dtype is 'int8': expected one of float32, float16, bfloat16, or None"),
        ({"dtype": torch.int8}, "dtype is torch.int8: expected one of"),
        ({"max_shard_size": "5 bananas"}, "max_shard_size is '5 bananas': expected a number of bytes"),
        ({"max_shard_size": 0}, "max_shard_size is 0: expected"),
        ({"max_shard_size": -5}, "max_shard_size is -5: expected"),
        ({"max_shard_size": True}, "max_shard_size is True: expected"),
        ({"max_shard_size": None}, "max_shard_size is None: expected"),
        ({"to": None}, "to is None: expected one of lite"),
    ],
    ids=str,
)
def test_other_arguments_are_refused_before_anything_begins(arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        convert("org/nowhere", **arguments)


def test_an_unknown_layout(folder):
    with pytest.raises(ValueError, match="to is 'keras': expected one of lite, transformers, meta, timm"):
        convert(folder, to="keras")


@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_overwritten(folder, force):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"model.safetensors: is the source itself: give another --output"):
        convert(folder, to="timm", force=force, allow_loss=True)
    with pytest.raises(FileExistsError, match=r"dinov3_lite.safetensors: is the source itself"):
        convert(convert(folder), force=force)
    assert (folder / "model.safetensors").read_bytes() == before


def test_two_conversions_at_once(folder):
    """Whoever ends last wins, and the file is whole at any time."""
    script = "import sys; from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, str(folder), "--force", "--quiet"]
    running = [subprocess.Popen(command, cwd=Path(__file__).parent) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    DINOv3ViT.from_pretrained(folder / CONVERTED)
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("to", ["lite", "meta"])
def test_where_the_kernel_does_not_copy(folder, tmp_path, monkeypatch, to):
    """Other systems, and files on two file systems."""
    expected = convert(folder, tmp_path / "a", to=to).read_bytes()
    monkeypatch.delattr(os, "copy_file_range")
    assert convert(folder, tmp_path / "b", to=to).read_bytes() == expected


@pytest.mark.skipif(os.name != "posix", reason="file modes and signals of POSIX")
class TestWholeOrNotAtAll:
    CRASH = """
import os, signal, sys
import convert, tqdm
class Bar(tqdm.tqdm):
    pieces = 0
    def update(self, n):
        Bar.pieces += 1
        if Bar.pieces == 20:
            {act}
tqdm.tqdm = Bar
convert.convert(sys.argv[1], force=True, to=sys.argv[2])
"""

    def crash(self, folder: Path, act: str, to: str = "lite") -> subprocess.CompletedProcess[str]:
        code = [sys.executable, "-c", self.CRASH.format(act=act), str(folder), to]
        return subprocess.run(code, capture_output=True, text=True, cwd=Path(__file__).parent)

    def test_killed(self, folder):
        assert self.crash(folder, "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
        assert not (folder / CONVERTED).exists()
        assert convert(folder).exists()

    def test_killed_while_replacing(self, folder):
        before = convert(folder).read_bytes()
        self.crash(folder, "os.kill(os.getpid(), signal.SIGKILL)")
        assert (folder / CONVERTED).read_bytes() == before

    @pytest.mark.parametrize("to", ["lite", "meta"])
    def test_failed(self, folder, to):
        listing = sorted(folder.iterdir())
        done = self.crash(folder, "raise OSError('the disk is gone')", to)
        assert done.returncode == 1 and "the disk is gone" in done.stderr
        assert sorted(folder.iterdir()) == listing

    def test_disk_full(self, folder):
        """A limit on file size stands in for a full disk: the write fails half-way."""
        code = f"""
import resource, signal, sys
from convert.__main__ import main
from convert.plan import parse_size
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
    assert out.rstrip().endswith(str(folder / CONVERTED)) and out.count("\n") == 1
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
    assert out.count("\n") == 2 and err.count("\n") == 2 and "b/config.json" in err
    assert err.splitlines()[1] == f"convert: 1 of 3 failed: {tmp_path / 'b'}"
    assert (tmp_path / "a" / CONVERTED).exists() and (tmp_path / "c" / CONVERTED).exists()
    assert main([str(tmp_path), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert (tmp_path / "out" / "c" / CONVERTED).exists()


@pytest.mark.parametrize("source", ["/nowhere/at/all", str(ROOT / "tests")])
def test_bad_input_is_status_1_and_one_line(source, capsys):
    assert main([source]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"convert: {source}: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "--dtype", "int8"],
        ["x", "--to", "keras"],
        ["x", "--max-shard-size", "0"],
        ["x", "--max-shard-size", "5 pounds"],
        ["x", "--nonsense"],
    ],
)
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
    with pytest.warns(UserWarning, match="NaN or infinity in tensor 'norm.bias': kept as it is"):
        path = convert(folder, dtype=torch.float16)
    state = DINOv3ViT.from_pretrained(path).state_dict()
    assert state["norm.bias"][0].isnan() and state["norm.bias"][1:].isfinite().all()


# ---- --verify and --inspect


@pytest.mark.parametrize("to", ["lite", "transformers", "meta"])
def test_verify_says_what_it_compared(to, tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "source", TINY)
    options = ["--to", to, "--output", str(tmp_path / "out"), "--verify"]
    assert main([str(folder), *options]) == 0
    out = capsys.readouterr().out
    match = re.search(r"verified: (\d+) tensors equal and finite; hidden states within (\S+) of transformers'", out)
    assert int(match[1]) == len(open_checkpoint(folder).names()) and float(match[2]) < 5e-6


def test_verify_from_the_repository_root(folder, tmp_path):
    """Where `import kernels` would find our folder, transformers is imported with the root off the path."""
    pytest.importorskip("transformers")
    (tmp_path / "kernels-0.18.3.dist-info").mkdir()
    command = [sys.executable, "-m", "convert", str(folder), "--verify"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "hidden states within" in done.stdout, done.stderr


def test_inspect(folder, capsys):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    for source, layout in ((folder, "transformers"), (convert(folder), "lite"), (convert(folder, to="meta"), "meta")):
        assert main([str(source), "--inspect"]) == 0
        text = capsys.readouterr().out
        assert "vit-c32-d3-h2" in text and layout in text and "dinov3-license" in text
        assert main([str(source), "--inspect", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["layout"] == layout and said["dtype"] == "float32" and said["warnings"] == []
        assert said["config"]["hidden_size"] == 32 and said["source_layout"] in ("transformers", "meta")
        weights = {name: t for name, t in DINOv3ViT(TINY).state_dict().items() if name != "rope_embed.periods"}
        assert said["parameters"] == sum(t.numel() for t in weights.values())
        assert said["rope"].startswith("computed" if layout != "meta" else "stored, equal")


def test_inspect_tells_rounded_periods_and_tensors_left_out(folder, tmp_path, capsys):
    meta = convert(folder, tmp_path, to="meta")
    tensors = torch.load(meta, weights_only=True)
    tensors["rope_embed.periods"] = tensors["rope_embed.periods"].bfloat16()
    tensors["local_cls_norm.bias"] = torch.zeros(32)
    torch.save(tensors, meta)
    assert main([str(meta), "--inspect"]) == 0
    out = capsys.readouterr().out
    assert "stored, rounded to bfloat16" in out and "left out   'local_cls_norm.bias'" in out


def test_inspect_warns_of_a_satellite_model_with_imagenet_statistics(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "dinov3-vitl16-pretrain-sat493m", TINY)
    assert main([str(folder), "--inspect"]) == 0
    assert "WARNING    a satellite model (sat493m) with ImageNet's image statistics" in capsys.readouterr().out


def test_the_licence_goes_along(folder, tmp_path):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    path = convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "DINOv3 License Agreement"
    assert open_checkpoint(path).card.license == "dinov3-license"
    assert open_checkpoint(convert(path, tmp_path / "again")).card.license == "dinov3-license"


# ---- --dry-run, and --json


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(folder, tmp_path, capsys):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    before = sorted(tmp_path.rglob("*"))
    options = [str(folder), "--to", "transformers", "--output", str(tmp_path / "out"), "--max-shard-size", "40KB"]
    assert main([*options, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main([*options, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*options, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    written = sorted(str(file) for file in (tmp_path / "out").iterdir())
    assert sorted(file["path"] for file in said["files"]) == written and all(path in text for path in written)
    assert said["bytes"] == sum(t.nbytes for t in trained_like(TINY).values())
    assert said["path"] == done["path"] == str(tmp_path / "out") and said["to"] == "transformers"
    assert said["lost"] == said["left_out"] == [] and done["weights"] == said["weights"]


def test_a_dry_run_fails_as_the_real_run_would(folder, tmp_path, capsys):
    weights = trained_like(TINY)
    weights["norm.bias"][3] = 1e6
    large = write_checkpoint(tmp_path / "large", TINY, weights)
    convert(folder, tmp_path / "there")
    (tmp_path / "file").write_text("")
    for options in (
        [folder, "--to", "timm", "--output", tmp_path / "new"],
        [folder, "--output", tmp_path / "there"],
        [folder, "--output", tmp_path / "file" / "x.safetensors"],
        [large, "--dtype", "float16", "--output", tmp_path / "half"],
        [folder / "config.json"],
    ):
        errors = []
        for more in (["--dry-run"], []):
            assert main([*map(str, options), *more]) == 1
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1
            errors.append(err)
        assert errors[0] == errors[1]
    assert not (tmp_path / "new").exists()


def test_a_disk_without_room_is_told_before_writing(folder, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    for more in (["--dry-run"], []):
        assert main([str(folder), *more]) == 1
        assert re.search(r"1000 bytes are free on this disk, \d+ are needed", capsys.readouterr().err)
    assert not (folder / CONVERTED).exists()


def test_inspect_says_what_a_layout_would_lose(folder, capsys):
    assert main([str(folder), "--inspect", "--to", "timm"]) == 0
    assert "--to timm loses 'mask_token': it has no mask token" in capsys.readouterr().out


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example:\n  python -m convert " in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="redirections of a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "env"),
    [
        (">&- 2>&-", {}),
        (">/dev/full", {"PYTHONUNBUFFERED": "1"}),
        ("| true; exit ${PIPESTATUS[0]}", {"PYTHONUNBUFFERED": ""}),
        ("", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_the_status_speaks_of_the_work_and_not_of_telling_it(redirection, env, tmp_path):
    folder = write_checkpoint(tmp_path / "söurce", TINY)
    command = f"{sys.executable} -m convert söurce {redirection}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "dinov3_lite.safetensors").exists()
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_bar_where_there_is_no_stderr(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert convert(folder, tmp_path / "out", progress=True).exists()


# ---- files larger than one step, and reads and writes that end early


def in_several_calls(source, target, count, offset):
    """copy_file_range as POSIX lets it be: fewer bytes than asked for, and then none, as between two file systems."""
    if offset % 3 == 0:
        raise OSError(errno.EXDEV, "Invalid cross-device link")
    data = os.pread(source, min(count, 37), offset)
    return os.write(target, data)


@pytest.mark.parametrize("to", ["lite", "meta"])
@pytest.mark.parametrize("kernel", ["copies", "copies a part", "does not copy"])
def test_tensors_of_several_steps(kernel, to, folder, tmp_path, monkeypatch):
    """A step is 64 MB: only the 7B has tensors that are larger."""
    expected = convert(folder, tmp_path / "a", to=to).read_bytes()
    monkeypatch.setattr(containers, "STEP", 1000)
    monkeypatch.setattr(containers, "BLOCK", 300)
    if kernel == "copies a part":
        monkeypatch.setattr(os, "copy_file_range", in_several_calls, raising=False)
    elif kernel == "does not copy":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert convert(folder, tmp_path / "b", to=to).read_bytes() == expected


def test_the_bar_counts_every_byte_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "STEP", 1000)
    for several in (False, True):
        if several:
            monkeypatch.setattr(os, "copy_file_range", in_several_calls, raising=False)
        for dtype in (None, torch.float16):
            plan, counts = make_plan(open_checkpoint(folder), tmp_path / f"{dtype} {several}", dtype=dtype), []
            save(plan.folder, plan.files, counts.append)
            assert sum(counts) == plan.nbytes
            assert max(counts) <= 1000 or dtype


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"12345678")
    with path.open("rb", buffering=0) as file, pytest.raises(OSError, match="short: ended early: was it changed"):
        files.read_into(file, memoryview(bytearray(9)))
    stored = files.StoredTensor("x", torch.float32, (3,), lambda: torch.zeros(3), path, offset=0)
    with pytest.raises(OSError, match="ended early"):
        stored.span().load()
    tensor = containers.OutputTensor("x", torch.float32, (3,), [stored.span()])
    with (tmp_path / "out").open("wb") as out, pytest.raises(OSError, match="ended early"):
        containers._write_tensor(out, tensor, lambda count: None)


@pytest.mark.parametrize(("spare", "count"), [(0, 1), (-1, 2)], ids=["just fits", "a byte short"])
def test_a_shard_is_full_when_it_is_full(spare, count, folder, tmp_path):
    size = sum(tensor.nbytes for tensor in trained_like(TINY).values())
    out = convert(folder, tmp_path / "out", to="transformers", max_shard_size=size + spare)
    assert len(list(out.glob("*.safetensors"))) == count
    assert (out / "model.safetensors.index.json").exists() == (count > 1)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(folder, tmp_path):
    out = convert(folder, tmp_path / "out", to="transformers", max_shard_size=1)
    shards = sorted(out.glob("*.safetensors"))
    assert [len(load_file(shard)) for shard in shards] == [1] * len(trained_like(TINY))
    assert main([str(out), "--quiet", "--output", str(tmp_path / "back")]) == 0
    weights, back = DINOv3ViT.from_pretrained(folder).state_dict(), DINOv3ViT.from_pretrained(tmp_path / "back")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in back.state_dict().items())


# ---- --verify, and options in combination

TIMMS = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96, key_bias=True)


def verified(out: str) -> tuple[int, float]:
    """How many tensors were compared, and the largest error of a hidden state."""
    match = re.search(r"verified: (\d+) tensors equal and finite; hidden states within (\S+) of transformers'", out)
    return int(match[1]), float(match[2])


@pytest.mark.parametrize("to", ["lite", "transformers", "meta"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_verify_compares_with_the_source_as_it_was_cast(dtype, to, tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "source", TINY)
    options = ["--to", to, "--dtype", dtype, "--output", str(tmp_path / "out"), "--max-shard-size", "30KB"]
    assert main([str(folder), *options, "--verify"]) == 0
    count, error = verified(capsys.readouterr().out)
    assert count == len(open_checkpoint(folder).names())
    assert {"float32": 0, "float16": 1e-5, "bfloat16": 1e-4}[dtype] < error < {"float32": 5e-6}.get(dtype, 0.1)


def test_verify_runs_what_was_written(folder, tmp_path):
    """What differs in the config alone is in no tensor: the forward has to notice it."""
    pytest.importorskip("transformers")
    plan = make_plan(open_checkpoint(folder), tmp_path / "out", to="transformers")
    config = write(plan) / "config.json"
    assert max(verify(plan).errors) < 5e-6
    config.write_text(json.dumps({**json.loads(config.read_text()), "layer_norm_eps": 0.1}))
    errors = verify(plan).errors
    assert len(errors) == TINY.num_hidden_layers + 1
    assert errors[0] < 5e-6 and min(errors[1:]) > 1e-3, "the embeddings have no norm, all else has"


def test_verify_of_a_conversion_with_losses_compares_the_rest(tmp_path, capsys):
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "source", TIMMS)
    options = [str(folder), "--to", "timm", "--output", str(tmp_path / "out"), "--verify", "--json"]
    assert main(options) == 1
    assert "the timm layout can't hold 'mask_token': it has no mask token; " in capsys.readouterr().err
    assert main([*options, "--allow-loss"]) == 0
    said = json.loads(capsys.readouterr().out)
    lost = 1 + TIMMS.num_hidden_layers  # the mask token and the key biases
    assert verified(said["verified"])[0] == len(open_checkpoint(folder).names()) - lost
    assert [loss.split(":")[0] for loss in said["lost"]] == ["'mask_token'", "'blocks.0.attn.qkv.k_bias' (and 2 more)"]

    plan = make_plan(open_checkpoint(folder), tmp_path / "out", to="timm")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["blocks.2.attn.v_bias"][7] += 1e-6
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'blocks.2.attn.qkv.v_bias' differs from its source"):
        verify(plan)


@pytest.mark.parametrize("name", ["rope_embed.periods", "local_cls_norm.bias"])
def test_verify_compares_what_no_digest_holds(name, folder, tmp_path):
    """The periods in float32, whatever the weights are, and what the model does not use."""
    source = convert(folder, tmp_path / "source", to="meta")
    tensors = torch.load(source, weights_only=True)
    tensors |= {f"local_cls_norm.{part}": torch.randn(32) for part in ("weight", "bias")}
    torch.save(tensors, source)
    plan = make_plan(open_checkpoint(source), tmp_path / "out", to="meta", dtype=torch.bfloat16)
    written = torch.load(write(plan), weights_only=True)
    assert verify(plan).tensors == len(open_checkpoint(source).names())
    written[name] = written[name] + 1e-6 * (name == "rope_embed.periods") + 1e-2 * (name != "rope_embed.periods")
    torch.save(written, plan.path)
    with pytest.raises(ValueError, match=rf"tensor '{name}' differs from its source: convert again"):
        verify(plan)


def test_options_reach_the_conversion(folder, tmp_path, monkeypatch, capsys):
    """Each by itself, and as it was said: 5GB is 5,000,000,000 bytes, as transformers counts."""
    asked = {}

    def spy(name):
        function = getattr(sys.modules["convert.__main__"], name)
        monkeypatch.setattr(f"convert.__main__.{name}", lambda *a, **k: (asked.update({name: k}), function(*a, **k))[1])

    for name in ("make_plan", "check", "write"):
        spy(name)
    output, size = ["--output", str(tmp_path / "out")], "max_shard_size"
    default = {"to": "lite", "dtype": None, "max_shard_size": 5_000_000_000}
    assert main([str(folder), *output]) == 0
    assert asked == {"make_plan": default, "check": {"force": False, "allow_loss": False}, "write": {"progress": True}}
    for text, value in {"5GB": 5 * 10**9, "7MB": 7 * 10**6, "90KB": 90_000, "123456": 123_456}.items():
        assert main([str(folder), *output, "--force", "--quiet", "--max-shard-size", text]) == 0
        assert asked["make_plan"] == {**default, size: value}
    assert asked["check"] == {"force": True, "allow_loss": False} and asked["write"] == {"progress": False}
    assert main([str(folder), *output, "--force", "--allow-loss", "--dtype", "float16"]) == 0
    assert asked["make_plan"] == {**default, "dtype": torch.float16}
    assert asked["check"] == {"force": True, "allow_loss": True}


@pytest.mark.parametrize("options", [["--inspect"], ["--dry-run"], ["--json"], ["--inspect", "--json"], ["--verify"]])
def test_quiet_is_quiet_whatever_else_is_asked(options, folder, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main([str(folder), "--output", str(tmp_path / "out"), "--quiet", *options]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "out").exists() == (options[0] in ("--json", "--verify"))


def test_one_object_a_model(tmp_path, capsys):
    for name in ("b", "a"):
        write_checkpoint(tmp_path / "models" / name, TINY)
    output = tmp_path / "out"
    assert main([str(tmp_path / "models"), "--json", "--output", str(output), "--to", "transformers"]) == 0
    first, second = capsys.readouterr().out.split("\n}\n")[:2]
    assert [json.loads(text + "}")["path"] for text in (first, second)] == [str(output / "a"), str(output / "b")]
    assert "verified" not in first and json.loads(first + "}")["lost"] == []


@pytest.mark.parametrize("prefix", ["rgb", "depth.", "rgb.backbone"])
def test_a_prefix_names_the_backbone(prefix, tmp_path, capsys):
    weights = {where: trained_like(TIMMS, seed) for seed, where in enumerate(("rgb.backbone.", "depth.backbone."))}
    folder = write_checkpoint(
        tmp_path / "both", TIMMS, {where + name: w for where, named in weights.items() for name, w in named.items()}
    )
    assert main([str(folder)]) == 1
    assert "under 'depth.backbone.', 'rgb.backbone.': name the one that is meant" in capsys.readouterr().err
    expected = weights["rgb.backbone." if prefix.startswith("rgb") else "depth.backbone."]["norm.bias"]
    options = ["--prefix", prefix, "--output", str(tmp_path / "out"), "--json"]
    assert main([str(folder), *options]) == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]
    other = "depth." if prefix.startswith("rgb") else "rgb."
    assert len(left_out) == 1 and left_out[0].startswith(f"{len(trained_like(TIMMS))} tensors of '{other}'")
    assert torch.equal(open_checkpoint(tmp_path / "out" / CONVERTED).tensor("norm.bias"), expected)
    again = convert(folder, tmp_path / "again", prefix=prefix)
    assert again.read_bytes() == (tmp_path / "out" / CONVERTED).read_bytes()


# ---- --inspect


def test_inspect_shows_what_lies_beside_the_weights(tmp_path, capsys):
    images = {"size": {"height": 96, "width": 160}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]}
    folder = write_checkpoint(tmp_path / "source", TINY, preprocessing={**PREPROCESSING, **images})
    out = convert(folder, tmp_path / "shards", to="transformers", max_shard_size=40_000)
    shards = list(out.glob("*.safetensors"))
    assert main([str(out), "--inspect", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {key: said[f"image_{key.removeprefix('image_')}"] for key in images} == images
    assert said["files"] == len(shards) > 1 and said["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert main([str(out), "--inspect"]) == 0
    text = capsys.readouterr().out
    assert "size {'height': 96, 'width': 160}, mean [0.4, 0.5, 0.6], std [0.2, 0.3, 0.1]" in text
    assert f" MB in {len(shards)} file(s)" in text


@pytest.mark.parametrize("names", [["norm.bias"], ["layer.1.norm1.weight", "norm.bias"]], ids=len)
def test_inspect_warns_of_weights_that_are_not_numbers(names, tmp_path, capsys):
    weights = trained_like(TINY)
    for name, value in zip(names, (float("nan"), float("inf")), strict=False):
        weights[name][17] = value
    folder = write_checkpoint(tmp_path, TINY, weights)
    first = "norm.bias" if len(names) == 1 else "blocks.1.norm1.weight"
    assert main([str(folder), "--inspect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == [
        f"NaN or infinity in {len(names)} tensors, first '{first}'"
    ]
    assert main([str(folder), "--inspect"]) == 0
    assert f"WARNING    NaN or infinity in {len(names)} tensors" in capsys.readouterr().out
    more = "" if len(names) == 1 else r" \(and 1 more\)"
    with pytest.warns(UserWarning, match=f"NaN or infinity in tensor '{first}'{more}: kept as it is"):
        convert(folder)


def test_inspect_tells_periods_that_the_config_does_not_give(folder, tmp_path, capsys):
    meta = convert(folder, tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    tensors["rope_embed.periods"][1] *= 1.01
    torch.save(tensors, meta)
    assert main([str(meta), "--inspect"]) == 0
    assert "stored, others than the config gives" in capsys.readouterr().out


# ---- where to


def test_the_source_behind_a_link_is_not_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"out.model.safetensors: is the source itself"):
        convert(folder, out, to="transformers", force=True)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_folder_that_may_not_be_written_to(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    for more in (["--dry-run"], []):
        assert main([str(folder), "--output", str(tmp_path / "new" / "x"), *more]) == 1
        assert f"{tmp_path}: no permission to write into this folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_licence_that_is_there_stays(folder, tmp_path):
    (folder / "LICENSE.md").write_text("DINOv3 License Agreement")
    out = tmp_path / "out"
    out.mkdir()
    (out / "LICENSE.md").write_text("another's")
    convert(folder, out)
    assert (out / "LICENSE.md").read_text() == "another's"


@pytest.mark.parametrize("to", ["transformers", "timm"])
def test_a_layout_that_is_a_folder_makes_one_of_any_name(to, tmp_path):
    folder = write_checkpoint(tmp_path / "source", TIMMS)
    out = convert(folder, tmp_path / "dots.safetensors", to=to, allow_loss=True)
    assert out == tmp_path / "dots.safetensors" and (out / "model.safetensors").is_file()


def test_the_british_licence_goes_along_too(folder, tmp_path):
    (folder / "LICENCE").write_text("DINOv3 License Agreement")
    assert open_checkpoint(convert(folder, tmp_path / "out")).card.license == "dinov3-license"
    assert (tmp_path / "out" / "LICENCE").exists()


def test_a_damaged_index_is_a_model_that_fails_by_itself(tmp_path, capsys):
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, TINY)
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors.index.json").write_text("{")
    assert main([str(tmp_path), "--quiet"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and "index.json: not valid JSON" in lines[0] and lines[1].endswith(f"failed: {tmp_path / 'a'}")
    )
    assert (tmp_path / "b" / CONVERTED).exists()


def test_an_index_of_many_megabytes_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 500)
    assert (folder / "config.json").stat().st_size > 500
    with pytest.raises(ValueError, match=r"config.json: \d+ bytes, expected a JSON file of at most 500"):
        open_checkpoint(folder)


def test_what_is_lost_and_left_out_is_said_to_people_too(tmp_path, capsys):
    meta = convert(write_checkpoint(tmp_path / "source", TIMMS), tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    torch.save(tensors | {f"local_cls_norm.{part}": torch.zeros(128) for part in ("weight", "bias")}, meta)
    options = [str(meta), "--to", "timm", "--allow-loss", "--dtype", "bfloat16", "--output", str(tmp_path / "timm")]
    left_out = "2 tensors of 'local_cls_norm.' (normalises the CLS token of local crops in pretraining)"
    assert main([*options, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "-> timm bfloat16" in text and "would lose 'mask_token'" in text and f"would leave out {left_out}" in text
    assert main(options) == 0
    assert f"\n  left out {left_out}\n" in capsys.readouterr().out
    lite = convert(meta, tmp_path / "lite")
    assert main([str(lite), "--inspect"]) == 0
    text = capsys.readouterr().out
    assert "  made from  meta\n" in text and "  layout     lite\n" in text
    assert open_checkpoint(tmp_path / "timm").left_out == {}


def test_a_revision_reaches_the_hub(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("dinov3_lite.checkpoint.hub.download", lambda name, **k: (asked.append((name, k)), folder)[1])
    convert("someone/dinov3-tiny", tmp_path / "a", revision="v2")
    assert main(["someone/dinov3-tiny", "--revision", "v3", "--quiet", "--output", str(tmp_path / "b")]) == 0
    assert [(name, options["revision"]) for name, options in asked] == [
        ("someone/dinov3-tiny", "v2"),
        ("someone/dinov3-tiny", "v3"),
    ]


@pytest.mark.parametrize("to", ["lite", "meta"])
def test_what_is_carried_along_is_not_said_to_be_left_out(to, folder, tmp_path, capsys):
    meta = convert(folder, tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    torch.save(tensors | {f"local_cls_norm.{part}": torch.zeros(32) for part in ("weight", "bias")}, meta)
    options = [str(meta), "--to", to, "--output", str(tmp_path / "out"), "--json"]
    for more in (["--dry-run"], []):
        assert main([*options, *more]) == 0
        assert json.loads(capsys.readouterr().out)["left_out"] == []


def test_what_is_carried_along_keeps_its_own_dtype(folder, tmp_path):
    meta = convert(folder, tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    norm = {f"local_cls_norm.{part}": torch.randn(32).bfloat16() for part in ("weight", "bias")}
    torch.save(tensors | norm, meta)
    back = torch.load(convert(convert(meta, tmp_path / "lite"), tmp_path / "back", to="meta"), weights_only=True)
    for name, tensor in norm.items():
        assert back[name].dtype == torch.bfloat16 and torch.equal(back[name], tensor)


def test_the_index_of_shards_that_are_gone_is_not_of_the_file_beside_it(folder):
    """An index that transformers' own save leaves behind."""
    index = {"weight_map": dict.fromkeys(trained_like(TINY), "model-00001-of-00002.safetensors")}
    expected = open_checkpoint(folder).weights_id
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).weights_id == expected


def test_the_source_is_remembered_through_a_cast_and_another_conversion(folder, tmp_path):
    half = convert(folder, tmp_path / "half", dtype=torch.bfloat16)
    assert open_checkpoint(convert(half, tmp_path / "again")).card.source_digest == open_checkpoint(folder).digest()


def test_what_lies_beside_a_file_that_was_named_is_not_about_it_if_it_is_of_other_sizes(folder, tmp_path):
    meta = convert(folder, tmp_path / "meta", to="meta")
    write_checkpoint(meta.parent, replace(TINY, hidden_size=64), {"x": torch.zeros(1)})
    opened = open_checkpoint(meta)
    assert opened.config == TINY and opened.card.preprocessing is None
