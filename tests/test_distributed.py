"""The scripts of examples/distributed, as docs/distributed.md starts them: the losses are those of one process."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, relative_error, write_checkpoint
from launch import FOUR, free_ports, torchrun
from sharded import FSDP_RUNS
from torch.nn.functional import cross_entropy

from dinov3_lite import DINOv3ViT, parameter_groups

pytestmark = pytest.mark.skipif(not FSDP_RUNS, reason=f"FSDP of PyTorch {torch.__version__} does not run on CPUs")
EXAMPLES = ROOT / "examples" / "distributed"
STEPS, BATCH, SIZE, LR = 6, 8, 32, 3e-3
OPTIONS = ("--steps", STEPS, "--batch", BATCH, "--size", SIZE, "--lr", LR)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", replace(TINY, pos_embed_rescale=2.0))


@pytest.fixture(scope="module")
def common():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import common
    finally:
        sys.path.remove(str(EXAMPLES))
    return common


def printed(processes: int, *words: object, **options: int) -> str:
    """What the processes print."""
    done = torchrun(processes, *words, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """The losses that each script prints under two processes."""
    folder = tmp_path_factory.mktemp("runs")
    scripts = {
        "ddp": ("ddp.py",),
        "fsdp": ("sharded.py",),
        "tp": ("sharded.py", "--tp", "2"),
        "offload": ("sharded.py", "--offload"),
        "frozen": ("frozen.py",),
        "resume": ("resume.py", "--folder", folder / "run"),
    }
    if importlib.util.find_spec("peft"):
        scripts["lora"] = ("lora.py", "--save", folder / "adapters")
    ports = zip(free_ports(len(scripts)), scripts.values(), strict=True)
    lists = [[port, script, "--model", checkpoint, *OPTIONS, *options] for port, (script, *options) in ports]
    words = json.dumps([[*map(str, words)] for words in lists])
    text = printed(2, Path(__file__).parent / "support" / "run_examples.py", words)
    found = dict(zip(scripts, re.split(r"^script \d+$", text, flags=re.MULTILINE)[1:], strict=True))
    for name, text in found.items():
        assert re.search(r"^peak memory of each process, MB: \d+ \d+$", text, re.MULTILINE), name
    return folder, {name: losses(text) for name, text in found.items()}


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", text, re.MULTILINE)]


def train(common, model, optimizer, clip: bool = True) -> list[float]:
    """What one process computes, on whole batches."""
    args = argparse.Namespace(steps=STEPS, batch=BATCH, size=SIZE)
    found = []
    for _, images, labels in common.batches(args, torch.device("cpu"), 0, 1):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def alone(checkpoint, common):
    backbone = DINOv3ViT.from_pretrained(checkpoint).train()
    model = common.Classifier(backbone, backbone.embed_dim)
    found = train(common, model, torch.optim.AdamW(parameter_groups(model, LR, layer_decay=0.8)))
    assert found[-1] < 0.9 * found[0]
    return found


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp", "offload"])
def test_training_over_two_is_training(name, runs, alone):
    assert runs[1][name] == pytest.approx(alone, rel=1e-4)


@FOUR
def test_training_over_four_and_saving(checkpoint, alone, tmp_path):
    words = ("--model", checkpoint, *OPTIONS, "--tp", 2, "--save", tmp_path / "trained")
    assert losses(printed(4, EXAMPLES / "sharded.py", *words)) == pytest.approx(alone, rel=1e-4)
    trained, before = DINOv3ViT.from_pretrained(tmp_path / "trained"), DINOv3ViT.from_pretrained(checkpoint)
    for (name, a), b in zip(trained.blocks.named_parameters(), before.blocks.parameters(), strict=True):
        assert 0 < relative_error(a, b) < 1, name


def test_a_head_on_a_frozen_backbone(checkpoint, common, runs):
    backbone = DINOv3ViT.from_pretrained(checkpoint, dtype=torch.bfloat16).requires_grad_(False)
    model = common.Classifier(backbone, backbone.embed_dim)
    expected = train(common, model, torch.optim.AdamW(model.head.parameters(), LR), clip=False)
    assert runs[1]["frozen"] == pytest.approx(expected, rel=1e-4)


def test_lora(checkpoint, common, runs):
    peft = pytest.importorskip("peft")
    backbone = DINOv3ViT.from_pretrained(checkpoint)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["attn.qkv", "attn.proj"])
    model = common.Classifier(peft.get_peft_model(backbone, config), backbone.embed_dim)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR)
    expected = train(common, model, optimizer, clip=False)
    folder, found = runs
    assert found["lora"] == pytest.approx(expected, rel=1e-4)
    loaded = peft.PeftModel.from_pretrained(DINOv3ViT.from_pretrained(checkpoint), folder / "adapters")
    for (name, there), here in zip(loaded.named_parameters(), model.backbone.parameters(), strict=True):
        assert relative_error(there, here) < 1e-3, name


def test_a_killed_run_goes_on_as_if_nothing_had_happened(checkpoint, runs, tmp_path):
    """Steps 0 to 4, of which 0 to 3 were saved, the end of all processes, and from step 4 on the same numbers."""
    words = ("resume.py", "--model", checkpoint, *OPTIONS, "--folder", tmp_path / "run", "--kill-at", 5)
    killed = losses(printed(2, EXAMPLES / words[0], *words[1:], restarts=1))
    unbroken = runs[1]["resume"]
    assert len(unbroken) == STEPS and killed == unbroken[:5] + unbroken[4:]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-4", "step-6"]


def test_the_page_names_every_script():
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^torchrun .*examples/distributed/(\w+\.py) --model checkpoint", page, re.MULTILINE))
    assert named == {file.name for file in EXAMPLES.glob("*.py")} - {"common.py"}
