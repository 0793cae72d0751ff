"""Tools that people put the model into, each tried where it is installed: what they do to nn.Modules works on ours."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import TINY, relative_error, write_checkpoint
from torch import nn

from dinov3_lite import optimize_for_inference, parameter_groups

TARGETS = ["attn.qkv", "attn.proj"]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 24, 40)


def adapter(method: str):
    peft = pytest.importorskip("peft")
    return {
        "LoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, bias="all"),
        "DoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
        "IA3": lambda: peft.IA3Config(target_modules=[*TARGETS, "mlp.fc2"], feedforward_modules=["mlp.fc2"]),
        "LNTuning": lambda: peft.LNTuningConfig(target_modules=["norm1", "norm2"]),
    }[method]()


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3", "LNTuning"])
def test_peft_trains_prepares_and_merges(method, model, images):
    import peft

    before = {name: p.clone() for name, p in model.named_parameters()}
    tuned = peft.get_peft_model(copy.deepcopy(model), adapter(method)).train()
    rates = {group["lr"] for group in parameter_groups(tuned, 1e-2, layer_decay=0.5)}
    assert len(rates) >= TINY.num_hidden_layers  # block by block
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        tuned(images).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = tuned.eval()(images).last_hidden_state
        assert relative_error(expected, model(images).last_hidden_state) > 1e-3
        assert relative_error(optimize_for_inference(tuned)(images).last_hidden_state, expected) < 1e-5
        merged = tuned.merge_and_unload()
        assert relative_error(merged(images).last_hidden_state, expected) < 1e-5
        assert relative_error(optimize_for_inference(merged)(images).last_hidden_state, expected) < 1e-5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def torchao_int8(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def quanto_int8(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)


@pytest.mark.parametrize("quantize", [torchao_int8, quanto_int8])
@torch.no_grad()
def test_quantised_weights_keep_the_biases(quantize, model, images):
    expected = model(images).last_hidden_state
    quantised, fast = copy.deepcopy(model), optimize_for_inference(model)
    quantize(quantised)
    out = quantised(images).last_hidden_state
    assert 0 < relative_error(out, expected) < 0.05
    assert relative_error(optimize_for_inference(quantised)(images).last_hidden_state, out) < 1e-5
    quantize(fast)
    assert relative_error(fast(images).last_hidden_state, out) < 1e-5
    assert torch.equal(model(images).last_hidden_state, expected)


def test_accelerate_prepares_and_offloads(model, images):
    accelerate = pytest.importorskip("accelerate")
    with torch.no_grad():
        expected = model(images).last_hidden_state
    hooked = copy.deepcopy(model)
    tensors = dict(hooked.named_parameters()) | dict(hooked.named_buffers())  # a state dict names the biases otherwise
    accelerate.cpu_offload(hooked, execution_device="cpu", state_dict={name: t.detach() for name, t in tensors.items()})
    fast = optimize_for_inference(model)
    accelerate.hooks.add_hook_to_module(fast.blocks[1].attn.proj, Doubles(accelerate.hooks.ModelHook))
    doubled = copy.deepcopy(model)
    doubled.blocks[1].attn.proj.register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        assert relative_error(hooked(images).last_hidden_state, expected) < 2e-6
        assert relative_error(fast(images).last_hidden_state, doubled(images).last_hidden_state) < 2e-6


def Doubles(base):
    class Hook(base):
        def post_forward(self, module, output):
            return 2 * output

    return Hook()


def test_captum_attributes_to_pixels_and_layers(model, images):
    attr = pytest.importorskip("captum.attr")

    def score(x):
        return model(x).cls_token.sum(dim=-1)

    assert attr.Saliency(score).attribute(images.requires_grad_()).abs().sum() > 0
    layer = attr.LayerActivation(score, model.blocks[1].mlp.fc1)
    with torch.no_grad():
        seen = layer.attribute(images)
        expected = []
        model.blocks[1].mlp.fc1.register_forward_hook(lambda m, args, out: expected.append(out.clone()))
        model(images)
    assert torch.equal(seen, expected[0])


def test_lightning_trains_with_averaged_weights(model, images, tmp_path):
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.teacher = model, optimize_for_inference(copy.deepcopy(model))

        def training_step(self, batch, index):
            return (self.backbone(batch).cls_token - 2 * self.teacher(batch).cls_token).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(parameter_groups(self.backbone, 1e-3), lr=1e-3)

    averaging = [callbacks.StochasticWeightAveraging(1e-3)]
    if hasattr(callbacks, "EMAWeightAveraging"):
        averaging.append(callbacks.EMAWeightAveraging(decay=0.5))
    for callback in averaging:
        net = Net()
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        before = net.teacher(images).cls_token.clone()
        trainer.fit(net, torch.utils.data.DataLoader([images[0], images[1]], batch_size=1))
        with torch.no_grad():
            assert torch.equal(net.teacher(images).cls_token, before)
        assert all((block.attn.qkv.bias[32:64] == 0).all() for block in model.blocks)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(how, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", replace(TINY, pos_embed_rescale=None))
    code = f"""
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from dinov3_lite import DINOv3ViT, parameter_groups

def step(model, images):
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, layer_decay=0.5))
    for _ in range(2):
        model(images).last_hidden_state.square().mean().backward()
        optimizer.step(); optimizer.zero_grad()

def work(rank, images):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["PORT"], RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    model = DINOv3ViT.from_pretrained({str(folder)!r}).train()
    model.mask_token.requires_grad_(False)
    if {how!r} == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        step(wrapped, images[rank::2])
        state = model.state_dict()
    else:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict, StateDictOptions
        for block in model.blocks: fully_shard(block)
        fully_shard(model)
        step(model, images[rank::2])
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(model, options=options)
        assert (model.blocks[0].attn.qkv.bias.full_tensor()[32:64] == 0).all()
    if rank == 0: torch.save(state, {str(tmp_path / "state.pt")!r})
    dist.barrier(); dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); os.environ["PORT"] = str(s.getsockname()[1])
    torch.manual_seed(0); images = torch.randn(4, 3, 16, 24)
    alone = DINOv3ViT.from_pretrained({str(folder)!r}).train(); alone.mask_token.requires_grad_(False)
    step(alone, images)
    mp.spawn(work, (images,), nprocs=2)
    state = torch.load({str(tmp_path / "state.pt")!r})
    assert state.keys() == alone.state_dict().keys(), set(state) ^ set(alone.state_dict())
    worst = max(((t - state[n]).norm() / t.norm().clamp(min=1e-6)).item() for n, t in alone.state_dict().items())
    print("worst", worst)
    other = DINOv3ViT.from_pretrained({str(folder)!r}); other.load_state_dict(state)
    assert worst < 1e-3, worst
"""
    script = tmp_path / "train.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
