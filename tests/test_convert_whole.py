"""A conversion is written whole or not at all, whatever size its files have and whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, run_python, trained_like, write_checkpoint
from safetensors.torch import load_file

from convert import convert
from convert.__main__ import main
from convert.plan import make_plan
from dinov3_lite import DINOv3ViT
from dinov3_lite.checkpoint import CONVERTED, containers, open_checkpoint, spans
from dinov3_lite.checkpoint.saving import save


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", TINY)


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


def test_a_disk_without_room_is_told_before_writing(folder, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    for more in (["--dry-run"], []):
        assert main([str(folder), *more]) == 1
        assert re.search(r"1000 bytes are free on this disk, \d+ are needed", capsys.readouterr().err)
    assert not (folder / CONVERTED).exists()


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
        spans.read_into(file, memoryview(bytearray(9)))
    stored = spans.StoredTensor("x", torch.float32, (3,), lambda _: torch.zeros(3), path, offset=0)
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


# ---- places that can't be written to


def test_a_folder_that_may_not_be_written_to(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    for more in (["--dry-run"], []):
        assert main([str(folder), "--output", str(tmp_path / "new" / "x"), *more]) == 1
        assert f"{tmp_path}: no permission to write into this folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
