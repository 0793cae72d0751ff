"""PyTorch's .pth files, read by their index: what torch.save writes is found, whatever else is refused or harmless."""

from __future__ import annotations

import argparse
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dinov3_lite.checkpoint.pth import MAX_DEPTH, open_pth, record_offset


def contents() -> dict:
    """What training code saves: nested dictionaries, parameters, views, odd dtypes, and things that are no tensors."""
    whole = torch.randn(6, 4)
    tagged = whole + 1
    tagged.origin = "somewhere"  # a tensor with an attribute is saved in another way
    return {
        "model": OrderedDict(weight=whole, transposed=whole.T, part=whole[1:3], parameter=nn.Parameter(whole * 2)),
        "linear": nn.Linear(4, 3).state_dict(),
        "dtypes": {
            **{str(d): whole.to(d) for d in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)},
            "bool": whole > 0,
            "complex": whole * 1j,
        },
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "tagged": tagged,
        "epoch": 7,
        "arguments": {"lr": 1e-3, "name": "run", "sizes": (1, 2), "flags": [True, None], "shape": whole.shape},
        "optimizer": {"state": {0: {"exp_avg": whole}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
def test_the_tensors_are_those_that_torch_reads(legacy, protocol, tmp_path):
    file = tmp_path / "x.pth"
    torch.save(contents(), file, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    expected = torch.load(file, weights_only=False)
    tensors = {tensor.name: tensor for tensor in open_pth(file)}
    assert len(tensors) == 4 + 2 + 7 + 3
    for name, tensor in tensors.items():
        truth = expected.get(name)
        for outer in (outer for outer in expected if truth is None and name.startswith(f"{outer}.")):
            truth = expected[outer][name.removeprefix(f"{outer}.")]
        assert not tensor.problem
        read = tensor.read()
        assert (read.dtype, read.shape, read.stride()) == (truth.dtype, truth.shape, truth.stride())
        assert torch.equal(read, truth)
        assert tensor.dtype == read.dtype and tensor.shape == tuple(read.shape)
        if tensor.offset is not None:
            data = file.read_bytes()[tensor.offset :][: read.numel() * read.element_size()]
            assert data == read.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert (tensors["model.transposed"].offset is None) and (tensors["model.part"].offset is not None)


def test_reading_never_writes(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    before = (tmp_path / "x.pth").read_bytes()
    (tensor,) = open_pth(tmp_path / "x.pth")
    tensor.read().add_(1)
    assert (tmp_path / "x.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.eye(3).to_sparse(), "is sparse"),
        (torch.zeros(3, device="meta"), "is without data"),
        (torch.ones(1).expand(1000), "shows the 4 bytes of its record several times"),
    ],
    ids=["sparse", "meta", "expanded"],
)
def test_a_tensor_that_is_no_block_of_bytes_has_a_problem_and_the_others_do_not(tensor, problem, tmp_path):
    torch.save({"odd": tensor, "plain": torch.ones(2)}, tmp_path / "x.pth")
    odd, plain = open_pth(tmp_path / "x.pth")
    assert odd.name == "odd" and problem in odd.problem
    with pytest.raises(ValueError, match=f"x.pth: tensor 'odd' .*{problem}"):
        odd.read()
    assert not plain.problem and torch.equal(plain.read(), torch.ones(2))


def rewrite(file: Path, change, compression: int = zipfile.ZIP_STORED) -> None:
    """The same archive with other members: change(name, data) gives the new data, or None to leave it out."""
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            if (new := change(name, data)) is not None:
                archive.writestr(name, new)


def test_an_index_that_points_before_the_file_is_damage(tmp_path):
    """A damaged end of an archive moves its members' places below zero, where seeking fails as a bad disk does."""
    member = zipfile.ZipInfo("x/byteorder")
    member.header_offset = -64
    (tmp_path / "x.pth").write_bytes(bytes(100))
    with (tmp_path / "x.pth").open("rb") as file, pytest.raises(ValueError, match="'x/byteorder' before the file's"):
        record_offset(file, member)


def test_a_record_of_another_size_is_no_tensor(tmp_path):
    """torch.load with mmap would go on into the next record."""
    file = tmp_path / "x.pth"
    torch.save({"a": torch.ones(64), "b": torch.zeros(64)}, file)
    rewrite(file, lambda name, data: data[:100] if name.endswith("data/0") else data)
    a, b = open_pth(file)
    assert a.problem == "lies in a record of 100 bytes, where its storage takes 256" and not b.problem
    rewrite(file, lambda name, data: None if name.endswith("data/0") else data)
    a, b = open_pth(file)
    assert a.problem == "has no data: the archive lacks the record '0'" and not b.problem


def test_an_archive_written_by_another_program_is_read(tmp_path):
    """Its records don't start at multiples of eight, and one checksum is missing."""
    file = tmp_path / "x.pth"
    values = {"a": torch.randn(5, dtype=torch.float64), "b": torch.randn(7)}
    torch.save(values, file)
    rewrite(file, lambda name, data: data)
    data = file.read_bytes()
    start = data.index(b"PK\x01\x02")
    file.write_bytes(data[: start + 16] + b"\0\0\0\0" + data[start + 20 :])  # the CRC-32 of the pickle
    assert all(torch.equal(tensor.read(), values[tensor.name]) for tensor in open_pth(file))


class Runs:
    """Unpickled without care, it makes a folder."""

    def __reduce__(self):
        return Path.mkdir, (Path("made"),)


class Plain:
    pass


def deep(levels: int) -> dict:
    content: dict = {"a": torch.ones(1)}
    for _ in range(levels):
        content = {"d": content}
    return content


REFUSED = {
    "an object with code": ({"a": torch.ones(1), "b": Runs()}, r"holds Python objects beyond tensors \("),
    "an object": ({"a": torch.ones(1), "b": Plain()}, r"holds Python objects beyond tensors \("),
    "a module": (nn.Linear(2, 2), "holds Python objects beyond tensors"),
    "a class": ({"a": torch.ones(1), "b": (OrderedDict, [("a", 1)])}, None),
    "no tensor": ({"epoch": 3}, r"no tensors in it \(it holds a dict\)"),
    "a list": ([torch.ones(1)], r"no tensors in it \(it holds a list\)"),
    "a tensor by itself": (torch.ones(1), r"no tensors in it \(it holds a SavedTensor\)"),
    "a key that is a tuple": ({"a": torch.ones(1), ("b", "c"): 1}, "a dictionary with a tuple as its key"),
    "deep dictionaries": (deep(MAX_DEPTH + 3), "nested more than 16 deep"),
    "a long name": ({"a" * 700: {"b" * 700: torch.ones(1)}}, "a name of 1401 characters"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[what]
    torch.save(content, "x.pth", _use_new_zipfile_serialization=not legacy)
    if message is None:
        assert [tensor.name for tensor in open_pth(Path("x.pth"))] == ["a"]
    else:
        with pytest.raises(ValueError, match=f"^x.pth: .*{message}"):
            open_pth(Path("x.pth"))
    assert not Path("made").exists()


def test_a_pickle_by_itself_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.pth").write_bytes(pickle.dumps({"a": Runs()}))
    with pytest.raises(ValueError, match="x.pth: "):
        open_pth(Path("x.pth"))
    assert not Path("made").exists()


def test_dictionaries_that_hold_each_other_are_walked_once(tmp_path):
    laughs: dict = {"a": torch.ones(1)}
    for _ in range(MAX_DEPTH - 1):
        laughs = {key: laughs for key in ("teacher", "model", "ema", "student", "state_dict", "backbone", "net")}
    circle: dict = {"b": torch.ones(1)}
    circle["model"] = circle
    torch.save(laughs, tmp_path / "laughs.pth")
    torch.save(circle, tmp_path / "circle.pth")
    assert [t.name for t in open_pth(tmp_path / "laughs.pth")] == ["teacher." * (MAX_DEPTH - 1) + "a"]
    assert [t.name for t in open_pth(tmp_path / "circle.pth")] == ["b"]


def test_archives_that_are_no_checkpoints(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"a": torch.ones(64)}, file)
    rewrite(file, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="its members are compressed, which torch.save never does"):
        open_pth(file)
    torch.jit.script(nn.Linear(2, 2)).save(str(file))
    with pytest.raises(ValueError, match="a TorchScript program: save the state dict"):
        open_pth(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match="an archive with 0 members called data.pkl"):
        open_pth(file)
    torch.save({"a": torch.ones(64)}, file)
    rewrite(file, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(ValueError, match="its numbers are big-endian"):
        open_pth(file)


def pickled(*instructions: bytes) -> bytes:
    return b"\x80\x02" + b"".join(instructions) + b"."


BOMBS = {
    "a byte array of a terabyte": b"\x96" + struct.pack("<Q", 1 << 40),
    "a text of a terabyte": b"\x8d" + struct.pack("<Q", 1 << 40),
    "a memo of a billion": b"Nr" + struct.pack("<I", 1 << 30),
    "tuples of tuples as a key": b"}" + b")" + b"".join(b"2\x86" for _ in range(60)) + b"Ns",
    "copies of a dictionary": b"ccollections\nOrderedDict\n}\x85R",
    "a name that is imported": b"cos\nsystem\n(X\x04\x00\x00\x00truetR",
    "attributes of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}(X\x01\x00\x00\x00aK\x01ub",
    "an instance": b"(iantigravity\nx\n",
    "too few objects": b"u",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_pickle_takes_little(bomb, tmp_path, limit_memory=1 << 30):
    resource = pytest.importorskip("resource")
    file = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1)}, file)
    rewrite(file, lambda name, data: pickled(BOMBS[bomb]) if name.endswith("data.pkl") else data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="x.pth: "):
        open_pth(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert "antigravity" not in sys.modules


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
def test_a_damaged_file_gives_its_tensors_or_a_sentence(legacy, tmp_path, data):
    """Bytes of the index changed at random: no other exception, and no byte of another tensor."""
    file = tmp_path / "x.pth"
    torch.save(
        {"a": torch.full((8,), 1.0), "b": torch.full((8,), 2.0)}, file, _use_new_zipfile_serialization=not legacy
    )
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2]))])
    try:
        tensors = open_pth(file)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        return
    for tensor in tensors:
        if not tensor.problem:
            assert tensor.read().numel() * tensor.read().element_size() <= 64


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_class_of_an_object_is_named(protocol, tmp_path):
    state = {"model": nn.Linear(4, 3).state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save(state, tmp_path / "run.pth", pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"run.pth: .*argparse.Namespace"):
        list(open_pth(tmp_path / "run.pth"))
