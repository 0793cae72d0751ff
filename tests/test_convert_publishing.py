"""`--force` over an earlier output, failures between two renames, and what processes that died have left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, disk_of, heeds_signals, write_checkpoint

from convert import convert
from convert.__main__ import main
from dinov3_lite import DINOv3ViT
from dinov3_lite.checkpoint.files import whole_files

SHARD = 20_000  # bytes: several of TINY


@pytest.fixture
def a(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "a", TINY)


@pytest.fixture
def b(tmp_path) -> Path:
    """Of other weights and another config."""
    folder = write_checkpoint(tmp_path / "b", replace(TINY, rope_theta=50.0, layer_norm_eps=1e-3))
    return convert(folder, tmp_path / "b as bfloat16", to="transformers", dtype=torch.bfloat16)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("first", [SHARD, 10**9], ids=["shards", "one file"])
@pytest.mark.parametrize("second", [2 * SHARD, 10**9], ids=["fewer shards", "one file"])
def test_nothing_of_an_earlier_output_is_left_that_readers_would_take(a, b, first, second, tmp_path, recwarn):
    out = convert(a, tmp_path / "out", to="transformers", max_shard_size=first)
    (out / "notes.safetensors").write_bytes(b"a stranger's")
    (out / "pytorch_model.bin").write_bytes(b"read only where nothing else is")
    fresh = contents(convert(b, tmp_path / "fresh", to="transformers", max_shard_size=second))
    gone = set(contents(out)) - set(fresh) - {"notes.safetensors", "pytorch_model.bin"}
    recwarn.clear()
    convert(b, out, to="transformers", force=True, max_shard_size=second)
    assert set(contents(out)) == set(fresh) | {"notes.safetensors", "pytorch_model.bin"}
    assert {name: contents(out)[name] for name in fresh} == fresh
    assert {str(w.message).split(": ")[0] for w in recwarn} == {str(out / name) for name in gone}


def test_preprocessing_of_an_earlier_output_goes_too(a, b, tmp_path):
    out = convert(a, tmp_path / "out", to="transformers")
    (b / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match=r"preprocessor_config.json: removed: readers would mix it"):
        convert(b, out, to="transformers", force=True)
    assert not (out / "preprocessor_config.json").exists()


def test_without_force_nothing_of_it_is_touched_and_a_dry_run_tells(a, b, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    stale = tmp_path / "out" / "model.safetensors.index.json"
    stale.write_text("{}")
    with pytest.raises(FileExistsError, match=r"index.json: readers would mix it .*: use --force to remove it"):
        convert(b, stale.parent, to="transformers")
    assert main([str(b), "--to", "transformers", "--output", str(stale.parent), "--force", "--dry-run"]) == 0
    assert f"would remove {stale}" in capsys.readouterr().out and stale.exists()


def test_the_source_is_not_removed_as_an_earlier_output(a):
    before = contents(a)
    with pytest.raises(FileExistsError, match=r"model.safetensors: is the source itself, and readers would mix it"):
        convert(a, to="transformers", force=True, max_shard_size=SHARD)
    assert contents(a) == before


@pytest.mark.filterwarnings("ignore:.*removed")
@pytest.mark.skipif(os.name != "posix", reason="patches the calls of POSIX")
@pytest.mark.parametrize("sizes", [(SHARD, SHARD), (10**9, SHARD), (SHARD, 10**9), (10**9, 10**9)], ids=str)
def test_a_failure_at_any_rename_leaves_what_was_there(a, b, sizes, tmp_path, monkeypatch):
    out = convert(a, tmp_path / "out", to="transformers", max_shard_size=sizes[0])
    before, calls, real = contents(out), [], {name: getattr(os, name) for name in ("replace", "rename")}

    def failing(name: str, at: int):
        def call(source, target):
            calls.append(target)
            if len(calls) == at:
                raise OSError(5, "Input/output error")
            real[name](source, target)

        return call

    for at in range(1, 100):
        calls.clear()
        for name in real:
            monkeypatch.setattr(os, name, failing(name, at))
        try:
            convert(b, out, to="transformers", force=True, max_shard_size=sizes[1])
            break
        except OSError:
            assert contents(out) == before
    monkeypatch.undo()
    assert at > 4 and contents(out) == contents(convert(b, tmp_path / "c", to="transformers", max_shard_size=sizes[1]))


@pytest.mark.filterwarnings("ignore:.*removed")
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("first", [SHARD, 10**9], ids=["shards", "one file"])
@pytest.mark.parametrize("second", [SHARD, 10**9], ids=["shards", "one file"])
def test_killed_between_any_two_renames_nobody_reads_a_mixture(a, b, first, second, tmp_path, monkeypatch):
    """Every state of the folder that a kill could leave: the old model, the new one, or none."""
    out = convert(a, tmp_path / "out", to="transformers", max_shard_size=first)
    states: list[str] = []

    def seen() -> str:
        try:
            model = DINOv3ViT.from_pretrained(out)
        except (ValueError, OSError):
            return "none"
        old = (model.config.layer_norm_eps, model.dtype) == (1e-5, torch.float32)
        new = (model.config.layer_norm_eps, model.dtype) == (1e-3, torch.bfloat16)
        return "old" if old else "new" if new else "mixture"

    for name in ("replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda s, t, real=real: (states.append(seen()), real(s, t)))
    convert(b, out, to="transformers", force=True, max_shard_size=second)
    assert [*states, seen()][-1] == "new" and set(states) == {"old", "none"}


def test_everything_is_on_the_disk_before_the_first_rename(a, tmp_path, monkeypatch):
    events: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, real=real: (events.append(n), real(*args)))
    out = convert(a, tmp_path / "out", to="transformers", max_shard_size=SHARD)
    files = len(list(out.iterdir()))
    assert events.index("replace") >= files and events.count("replace") == files and events[-1] == "fsync"


@pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
class TestLeftovers:
    def start(self, folder: Path, before: str = "") -> subprocess.Popen[str]:
        """A conversion that waits where its file is written."""
        code = f"""{before}
import os, sys, time
from convert.__main__ import main
def slow(descriptor):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = slow
sys.exit(main(sys.argv[1:]))
"""
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), "--quiet"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
            preexec_fn=heeds_signals,
        )  # fmt: skip
        assert process.stdout.readline() == "writing\n"
        return process

    @pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
    def test_a_killed_one_leaves_nothing(self, a):
        listing = sorted(a.iterdir())
        process = self.start(a)
        process.kill()
        process.communicate()
        assert sorted(a.iterdir()) == listing

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    def test_signals_end_it_in_order(self, a, number):
        listing = sorted(a.iterdir())
        process = self.start(a)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == 128 + number and "Traceback" not in err
        assert sorted(a.iterdir()) == listing

    def test_the_next_run_removes_what_a_killed_one_left_but_not_what_is_being_written(self, a):
        """Where files have a name while they are written."""
        no_nameless = "import os; del os.O_TMPFILE"
        killed, living = self.start(a, no_nameless), self.start(a, no_nameless)
        assert len(list(a.glob(".*.tmp"))) == 2
        killed.kill()
        killed.communicate()
        convert(a)
        (left,) = a.glob(".*.tmp")
        living.terminate()
        living.communicate()
        assert not left.exists()


def test_files_put_aside_by_a_killed_process_go_once_others_are_whole(tmp_path):
    left = tmp_path / ".x.json.0123abcd.old"
    left.write_text("old")
    with whole_files() as out, out.create(tmp_path / "x.json") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("to", ["lite", "transformers", "meta", "timm"])
def test_a_file_that_cannot_be_written_is_named(a, to, tmp_path):
    code = f"""
import resource, sys
from convert.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main([{str(a)!r}, "--to", {to!r}, "--allow-loss", "--output", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"convert: {tmp_path / 'out'}/") and "can't be written" in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_what_does_not_go_onto_the_disk_in_one_write_is_no_file(tmp_path):
    """The system writes what still fits, and says so by a number alone; torch.save hides the error behind its own."""
    file = tmp_path / "x.bin"
    file.write_bytes(b"old")
    data = os.urandom(50_000)
    for write in (lambda f: f.write(data), lambda f: torch.save(torch.zeros(10_000), f), lambda f: f.write(data[::2])):
        named = re.escape(f"File too large: '{file}'")
        with pytest.raises(OSError, match=named), disk_of(20_000), whole_files() as out, out.create(file) as opened:
            write(opened)
        assert [p.name for p in tmp_path.iterdir()] == ["x.bin"] and file.read_bytes() == b"old"
    with disk_of(60_000), whole_files() as out, out.create(file) as opened:
        assert opened.write(np.arange(10_000, dtype=np.int32)) == 40_000 and opened.write(b"") == 0
    assert np.array_equal(np.fromfile(file, np.int32), np.arange(10_000))
