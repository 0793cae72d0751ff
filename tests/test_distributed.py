"""The scripts of examples/distributed, as docs/distributed.md starts them: the losses are those of one process."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, TINY, write_checkpoint
from torch.nn.functional import cross_entropy

from dinov3_lite import DINOv3ViT, parameter_groups

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


def torchrun(processes: int, script: str, checkpoint, *options: object, launcher: tuple[str, ...] = ()) -> list[float]:
    """The losses that a script prints, one a step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*launcher, EXAMPLES / script, "--model", checkpoint, *OPTIONS, *options]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"peak memory of each process, MB:( \d+)+$", done.stdout, re.MULTILINE)
    return losses(done.stdout)


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", text, re.MULTILINE)]


def train(common, model, optimizer) -> list[float]:
    """What one process computes, on whole batches."""
    args = argparse.Namespace(steps=STEPS, batch=BATCH, size=SIZE)
    found = []
    for _, images, labels in common.batches(args, torch.device("cpu"), 0, 1):
        loss = cross_entropy(model(images), labels)
        loss.backward()
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


@pytest.mark.parametrize(
    ("processes", "script", "options"),
    [
        (2, "ddp.py", ()),
        (2, "sharded.py", ()),
        (2, "sharded.py", ("--tp", 2)),
        (4, "sharded.py", ("--tp", 2)),
        (2, "sharded.py", ("--offload",)),
    ],
    ids=["ddp", "fsdp", "tp", "fsdp and tp", "offload"],
)
def test_training_over_several_is_training(processes, script, options, checkpoint, alone, tmp_path):
    save = ("--save", tmp_path / "trained") if processes == 4 else ()
    assert torchrun(processes, script, checkpoint, *options, *save) == pytest.approx(alone, rel=1e-4)
    if save:
        trained, before = DINOv3ViT.from_pretrained(tmp_path / "trained"), DINOv3ViT.from_pretrained(checkpoint)
        assert all(not torch.equal(a, b) for a, b in zip(trained.blocks.parameters(), before.blocks.parameters()))


def test_a_head_on_a_frozen_backbone(checkpoint, common):
    backbone = DINOv3ViT.from_pretrained(checkpoint, dtype=torch.bfloat16).requires_grad_(False)
    model = common.Classifier(backbone, backbone.embed_dim)
    expected = []
    optimizer = torch.optim.AdamW(model.head.parameters(), LR)
    for _, images, labels in common.batches(argparse.Namespace(steps=STEPS, batch=BATCH, size=SIZE), "cpu", 0, 1):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert torchrun(2, "frozen.py", checkpoint) == pytest.approx(expected, rel=1e-4)


def test_lora(checkpoint, common, tmp_path):
    peft = pytest.importorskip("peft")
    backbone = DINOv3ViT.from_pretrained(checkpoint)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["attn.qkv", "attn.proj"])
    model = common.Classifier(peft.get_peft_model(backbone, config), backbone.embed_dim)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR)
    expected = []
    for _, images, labels in common.batches(argparse.Namespace(steps=STEPS, batch=BATCH, size=SIZE), "cpu", 0, 1):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert torchrun(2, "lora.py", checkpoint, "--save", tmp_path / "adapters") == pytest.approx(expected, rel=1e-4)
    loaded = peft.PeftModel.from_pretrained(DINOv3ViT.from_pretrained(checkpoint), tmp_path / "adapters")
    for (name, there), (_, here) in zip(
        loaded.named_parameters(), model.backbone.named_parameters(), strict=True
    ):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5, msg=name)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(checkpoint, tmp_path):
    """Steps 0 to 3, a checkpoint, step 4, the end of all processes, and from step 4 on the same numbers."""
    unbroken = torchrun(2, "resume.py", checkpoint, "--folder", tmp_path / "unbroken")
    restarts = ("--max-restarts", "1")
    killed = torchrun(2, "resume.py", checkpoint, "--folder", tmp_path / "run", "--kill-at", 5, launcher=restarts)
    assert unbroken == killed[:5] + killed[6:] and killed[5] == killed[4] and len(unbroken) == STEPS
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-4", "step-6"]
