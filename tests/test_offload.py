"""A model larger than its device in one process: accelerate's dispatch over a mapped file. docs/distributed.md shows it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from convnexts import made
from helpers import TINY, TINY_GATED, write_checkpoint

from convert import convert
from dinov3_lite import DINOv3ViT, optimize_for_inference

accelerate = pytest.importorskip("accelerate")


def dispatched(model: torch.nn.Module, kept: int) -> torch.nn.Module:
    """The last blocks, beyond `kept` bytes, stay in the file."""
    device_map = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": kept, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    return accelerate.dispatch_model(model, device_map, state_dict=dict(model.named_parameters()), offload_index={})


@pytest.fixture(params=["lite", "transformers"])
def source(request, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", replace(TINY, num_hidden_layers=4))
    return folder if request.param == "transformers" else convert(folder, tmp_path / "x.safetensors")


@torch.no_grad()
def test_every_method_of_a_dispatched_model(source):
    images = torch.randn(2, 3, 32, 48)
    whole, model = (DINOv3ViT.from_pretrained(source) for _ in range(2))
    model = dispatched(model, 80_000)
    assert sum(parameter.is_meta for parameter in model.parameters()) > len(list(model.parameters())) // 3
    for run in (
        lambda m: m(images, output_hidden_states=True),
        lambda m: m(images[:, :, :16], keep_indices=torch.tensor([[1, 3], [5, 0]])),
        lambda m: m.get_intermediate_layers(images, n=range(4), reshape=True, return_class_token=True),
        lambda m: m.forward_features(images),
        lambda m: m.forward_packed([images[0], images[1, :, :16]]),
        lambda m: m.attention_maps(images),
    ):
        torch.testing.assert_close(run(model), run(whole), rtol=0, atol=0)
    assert model.weights_id == whole.weights_id
    assert all(parameter.is_meta for parameter in model.blocks[3].parameters())  # nothing stays behind


@torch.no_grad()
def test_blocks_run_on_the_mapped_pages(tmp_path):
    """Where they run on the CPU: a GPU gets a copy, of one block at a time."""
    folder = write_checkpoint(tmp_path / "checkpoint", TINY)
    model = DINOv3ViT.from_pretrained(convert(folder, tmp_path / "x.safetensors"))
    mapped = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model, seen = dispatched(model, 80_000), {}
    for name, module in model.named_modules():
        if name.startswith("blocks.2.") and list(module.parameters(recurse=False)):
            forward = module._old_forward  # which the hook calls with the weights in place
            module._old_forward = lambda *args, name=name, module=module, forward=forward: (
                seen.update({f"{name}.{n}": p.data_ptr() for n, p in module.named_parameters(recurse=False)}),
                forward(*args),
            )[1]
    model(torch.randn(1, 3, 32, 32))
    names = {name for name in mapped if name.startswith("blocks.2.") and "qkv.bias" not in name}
    assert names <= seen.keys() and {name: seen[name] for name in names} == {name: mapped[name] for name in names}


class AsTheModel(dict):
    """Choices by which a prepared model attends as the model does: what is fastest here may round otherwise."""

    def get(self, question, default=None):
        return "sdpa" if question.startswith("attention") else default


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY_GATED, replace(TINY, query_bias=False, value_bias=False)])
def test_other_blocks_and_half_precision(config, tmp_path):
    """Blocks that a hook fetches the weights of run as they are, in a prepared model too."""
    source = write_checkpoint(tmp_path / "checkpoint", config)
    images = torch.randn(2, 3, 32, 48)
    for dtype in (torch.bfloat16, torch.float16):
        whole, model = (DINOv3ViT.from_pretrained(source, dtype=dtype) for _ in range(2))
        expected = whole(images).last_hidden_state
        model = dispatched(model, 50_000)
        assert torch.equal(model(images).last_hidden_state, expected)
        prepared = optimize_for_inference(model, choices=AsTheModel())
        assert torch.equal(prepared(images).last_hidden_state, expected)
        assert not [question for question in prepared.choices if question.startswith("product")]


@torch.no_grad()
def test_a_convnext():
    images = torch.randn(1, 3, 64, 64)
    whole, model = made(), made()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert torch.equal(dispatched(model, size // 2)(images).last_hidden_state, whole(images).last_hidden_state)


@torch.no_grad()
def test_taking_the_hooks_off_gives_the_model_back(source, tmp_path):
    model = dispatched(DINOv3ViT.from_pretrained(source), 80_000)
    with pytest.raises(ValueError, match=r"blocks\.\d\..* is on the meta device .*remove_hook_from_submodules"):
        model.save_pretrained(tmp_path / "saved")
    accelerate.hooks.remove_hook_from_submodules(model)
    path, whole = model.save_pretrained(tmp_path / "saved"), DINOv3ViT.from_pretrained(source)
    for name, tensor in DINOv3ViT.from_pretrained(path).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, TINY_GATED, None], ids=["plain", "gated", "convnext"])
@pytest.mark.parametrize("where", ["cpu", "disk", "disk, half"])
def test_offloaded_as_any_model(config, where, tmp_path):
    """By the names of its state dict alone."""
    if config is None:
        model, images = made(), torch.randn(1, 3, 64, 64)
    else:
        model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path / "checkpoint", config))
        images = torch.randn(2, 3, 32, 48)
    model = model.to(torch.bfloat16) if "half" in where else model
    expected = model(images).last_hidden_state
    if where == "cpu":
        accelerate.cpu_offload(model)
    else:
        accelerate.disk_offload(model, str(tmp_path / "offloaded"))
    assert all(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        assert torch.equal(model(images).last_hidden_state, expected)
    assert all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def test_loading_by_the_names_of_a_file(tmp_path):
    """What torch and accelerate make of them before they load holds the fused bias beside its thirds."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    for i, config in enumerate((TINY, TINY_GATED)):
        source = write_checkpoint(tmp_path / str(i), config)
        file = convert(source, tmp_path / f"{i}.safetensors")
        expected = dict(DINOv3ViT.from_pretrained(source).named_parameters())
        for full in (True, False):
            model = DINOv3ViT(config)
            set_model_state_dict(model, load_file(file), options=StateDictOptions(full_state_dict=full, strict=True))
            assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
        accelerate.load_checkpoint_in_model(model := DINOv3ViT(config), str(file))
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_what_accelerate_saves_of_a_state_dict_is_whole(tmp_path):
    """It removes what shares a storage with another tensor, and so must get the parameters."""
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path / "checkpoint", TINY))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text(json.dumps(model.config.to_dict()))
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "saved"))
    saved = DINOv3ViT.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
