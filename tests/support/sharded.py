"""What the tests of sharding run in several processes: a function a subject, which all processes of a mesh run together.

`run` starts them and returns what each function returned in the first process, or the exception that it raised. Most
return relative errors against the unsharded model on the same weights.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import TINY, TINY_GATED, relative_error
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import dinov3_lite
from dinov3_lite import DINOv3ViT, DINOv3ViTBackbone, FeaturesOnly, optimize_for_inference, sharding
from dinov3_lite.encoder import PyramidEncoder
from dinov3_lite.sharding.data_parallel import METHODS
from dinov3_lite.sharding.mesh import check_mesh

CONFIGS = {
    "plain": replace(TINY, num_attention_heads=4, num_hidden_layers=4, hidden_size=64),
    "gated": replace(TINY_GATED, num_attention_heads=4, num_hidden_layers=4, hidden_size=64, value_bias=True),
}
SHAPES = {"fsdp": (2,), "tp": (2,), "fsdp, tp": (2, 2)}
FSDP_RUNS = hasattr(torch.cpu.Stream, "record_event")  # on CPUs; that of PyTorch 2.6 does not


class Rig(NamedTuple):
    """What a subject works with."""

    folder: Path
    mesh: DeviceMesh

    @property
    def dims(self) -> str:
        return ", ".join(self.mesh.mesh_dim_names)

    def load(self, name: str = "plain", **options: Any) -> DINOv3ViT:
        return DINOv3ViT.from_pretrained(self.folder / name, mesh=self.mesh, **options)

    def whole(self, name: str = "plain", **options: Any) -> DINOv3ViT:
        return DINOv3ViT.from_pretrained(self.folder / name, **options)

    @property
    def first(self) -> bool:
        return not any(self.mesh.get_coordinate())


Subject = Callable[[Rig], Any]
SUBJECTS: dict[str, tuple[Subject, tuple[str, ...]]] = {}


def subject(*dims: str) -> Callable[[Subject], Subject]:
    """Register a function, for meshes of these dims, or of any."""

    def register(function: Subject) -> Subject:
        SUBJECTS[function.__name__] = function, dims or tuple(SHAPES)
        return function

    return register


def run(folder: Path, *meshes: str) -> dict[tuple[str, str], Any]:
    """What every subject returned, by the mesh and its name."""
    with tempfile.TemporaryDirectory() as scratch:
        world = torch.Size(SHAPES[meshes[0]]).numel()
        mp.spawn(_process, (world, folder, Path(scratch), meshes), nprocs=world)
        return torch.load(Path(scratch) / "results.pt", weights_only=False)


def _process(rank: int, world: int, folder: Path, scratch: Path, meshes: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(scratch / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=100))
    results: dict[tuple[str, str], Any] = {}
    for dims in meshes:
        rig = Rig(folder, init_device_mesh("cpu", SHAPES[dims], mesh_dim_names=tuple(dims.split(", "))))
        for name, (function, where) in SUBJECTS.items():
            if dims in where:
                torch.manual_seed(0)
                try:
                    results[dims, name] = function(rig)
                except Exception:
                    results[dims, name] = AssertionError(traceback.format_exc())
    if rank == 0:
        torch.save(results, scratch / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def images(seed: int = 0, size: tuple[int, int] = (16, 24), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """As the unsharded model has them."""
    return {
        name: whole(tensor.grad).view(shape)
        for name, tensor, shape in sharding.parameters.held_by(model)
        if tensor.grad is not None
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """As the unsharded model has them."""
    return {name: whole(t).detach().view(shape) for name, t, shape in sharding.parameters.held_by(model)}


def errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert actual.keys() == truth.keys()
    return {name: relative_error(actual[name], truth[name]) for name in truth if truth[name].any()}


def flat(output: Any) -> list[Tensor]:
    """The tensors of an output."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


# What models are asked for, of which each process holds no more than its own parts.
x, keep = images(), torch.tensor([[5, 0, 2], [1, 3, 4]])
mask = torch.tensor([[True, False, False, True, False, False], [False] * 6])
CALLS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda m: m(x, mask, output_hidden_states=True),
    "a tuple": lambda m: m(x, return_dict=False),
    "keep_indices": lambda m: m(x, keep_indices=keep),
    "get_intermediate_layers": lambda m: m.get_intermediate_layers(x, 2, reshape=True, return_class_token=True),
    "forward_features": lambda m: m.forward_features(x, mask),
    "a list": lambda m: m.forward_features([x, images(1, (8, 8))], [mask, None]),
    "forward_intermediates": lambda m: m.forward_intermediates(x, [0, 2], return_prefix_tokens=True),
    "forward_packed": lambda m: m.forward_packed([x[0], x[1, :, :8], x[1]]),
    "attention_maps": lambda m: [m.attention_maps(x, block) for block in (0, -1)],
    "embed": lambda m: m.embed(x)[0],
    "embed_patches": lambda m: m.embed_patches(x),
    "run_blocks": lambda m: m.run_blocks(m.embed(x)[0], [1]),
    "run_packed": lambda m: m.run_packed([m.embed(x)[0], m.embed(images(1, (8, 8)))[0]], [0, 3]),
    "run_prefix": lambda m: m.run_prefix(m.embed(x)[0], [0, 2]),
    "the backbone": lambda m: DINOv3ViTBackbone(m, out_indices=(0, 2, 4), return_class_token=True)(x),
    "timm's features": lambda m: FeaturesOnly(m, norm=True)(x),
    "the encoder": lambda m: PyramidEncoder(m)(x),
    "windows": lambda m: dinov3_lite.sliding_window_features(m, images(2, (24, 40), 1), window=16, stride=8),
}
assert set(CALLS) >= set(METHODS)


@subject()
def outputs(rig: Rig) -> dict[str, float]:
    result = {}
    for name in CONFIGS:
        model, truth = rig.load(name), rig.whole(name)
        for call, function in CALLS.items():
            with torch.no_grad():
                pairs = zip(flat(function(sharding.parameters.resharded(model))), flat(function(truth)), strict=True)
                result[f"{name}: {call}"] = max(relative_error(actual, true) for actual, true in pairs)
    return result


@subject()
def maps_in_float64(rig: Rig) -> float:
    """Attention maps are a softmax of large scores: in float32 the whole model's own error is 1e-6."""
    maps = (load(dtype=torch.float64).attention_maps(x.double(), 1) for load in (rig.load, rig.whole))
    with torch.no_grad():
        return relative_error(*maps)


@subject("fsdp", "tp")
def in_inference_mode(rig: Rig) -> float:
    model, truth = rig.load(), rig.whole()
    with torch.inference_mode():
        return relative_error(model(x)[0], truth(x)[0])


@subject()
def gradients_of_all(rig: Rig) -> dict[str, float]:
    """Also with blocks computed again in the backward pass, and of the float64 model: what is measured is rounding."""
    result = {}
    for name in CONFIGS:
        for recompute in (False, True) if name == "plain" else (False,):
            model, truth = rig.load(name, dtype=torch.float64), rig.whole(name, dtype=torch.float64)
            for each in (model, truth):
                each.gradient_checkpointing = recompute
                out = each(x.double(), mask)
                (out.patch_tokens.square().mean() + out.pooler_output.square().mean()).backward()
            result |= {f"{name} {n}": e for n, e in errors(gradients(model), gradients(truth)).items()}
    return result


@subject("fsdp", "tp")
def gradients_in_float32(rig: Rig) -> dict[str, tuple[float, float]]:
    """Against float64: the sharded model's error and the unsharded one's."""
    models = rig.load("gated"), rig.whole("gated"), rig.whole("gated", dtype=torch.float64)
    for model in models:
        model(x.to(model.dtype)).patch_tokens.square().mean().backward()
    sharded, own, truth = (gradients(model) for model in models)
    return {
        n: (relative_error(sharded[n], truth[n]), relative_error(own[n], truth[n])) for n in truth if truth[n].any()
    }


@subject()
def in_bfloat16(rig: Rig) -> dict[str, tuple[float, float]]:
    """Against float64 on the same rounded weights: the sharded model's error and the unsharded one's, over 16 images."""
    result = {}
    for name in CONFIGS:
        half = rig.whole(name, dtype=torch.bfloat16)
        truth = rig.whole(name, dtype=torch.bfloat16).double()
        pictures = images(3, (32, 32), 16).bfloat16()
        with torch.no_grad():
            outs = [
                m(pictures.to(m.dtype), output_hidden_states=True)
                for m in (rig.load(name, dtype=torch.bfloat16), half, truth)
            ]
        for state in (2, 4):
            sharded, own, true = (out.hidden_states[state] for out in outs)
            result[f"{name} {state}"] = relative_error(sharded, true), relative_error(own, true)
        result[f"{name} last"] = relative_error(outs[0][0], outs[2][0]), relative_error(outs[1][0], outs[2][0])
    return result


@subject("tp")
def sums_in_bfloat16(rig: Rig) -> tuple[bool, torch.dtype, torch.dtype]:
    """Is a sum of addends in bfloat16 exact? And the dtype that gradients come back in, and of what is normed without."""
    block = rig.load(dtype=torch.bfloat16).blocks[0]
    proj, group = block.attn.proj, rig.mesh.get_group()
    mine = torch.randn(3, 32, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    addends = [torch.empty(3, 64) for _ in range(2)]
    dist.all_gather(addends, F.linear(mine, proj.weight.to_local()).float().detach(), group)
    exact = torch.equal(proj(mine), sum(addends) + proj.bias.float())
    normed = block.norm1(torch.randn(2, 64))
    with torch.no_grad():
        return exact, normed.dtype, block.norm1(torch.randn(2, 64)).dtype


@subject("fsdp", "tp")
def in_float16(rig: Rig) -> tuple[float, torch.dtype]:
    model = rig.load(dtype=torch.float16)
    return relative_error(model(x)[0], rig.whole(dtype=torch.float16)(x)[0]), model.cls_token.dtype


@subject("fsdp", "tp")
def under_autocast(rig: Rig) -> tuple[float, float]:
    with torch.no_grad():
        truth = rig.whole()(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            return relative_error(rig.load()(x)[0], truth), relative_error(rig.whole()(x)[0], truth)


@subject("fsdp", "fsdp, tp")
def under_mixed_precision(rig: Rig) -> tuple[float, float, torch.dtype, torch.dtype]:
    """float32 weights that compute in bfloat16: as a model in bfloat16 does. Against its own error."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    model = sharding.shard(rig.whole(), rig.mesh, mp_policy=policy)
    out, halfs = (
        model(x)[0],
        rig.whole(dtype=torch.bfloat16)(x)[0],
    )  # with gradients: without, a CPU may attend otherwise
    out.square().mean().backward()
    with torch.no_grad():
        truth = rig.whole(dtype=torch.bfloat16).double()(x.double())[0]
        errors_ = relative_error(out, halfs), relative_error(halfs, truth)
    return *errors_, out.dtype, model.norm.weight.grad.dtype


@subject("tp")
def with_our_kernels(rig: Rig) -> float:
    """Attention, LayerNorm and SwiGLU by triton's interpreter, on this process's heads and units."""
    model, truth = rig.load("gated", attention="triton"), rig.whole("gated")
    for each in (model, truth):
        del each.blocks[1:]
    with torch.no_grad():
        return relative_error(model(x)[0], truth(x)[0])


@subject()
def clipping(rig: Rig) -> dict[str, float]:
    model, truth = rig.load(dtype=torch.float64), rig.whole(dtype=torch.float64)
    for each in (model, truth):
        each(x.double()).patch_tokens.square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), 1.0)
    result = {"norm": relative_error(sharding.clip_grad_norm_(model.parameters(), 1.0), norm)}
    return result | errors(gradients(model), gradients(truth))


@subject("tp")
def compiled(rig: Rig) -> dict[str, float]:
    model, truth = rig.whole("gated"), rig.whole("gated")
    for each in (model, truth):
        del each.blocks[1:]
    sharding.shard(model, rig.mesh)
    model.blocks[0].compile(backend="aot_eager", dynamic=False)
    outs = [each(x).patch_tokens for each in (model, truth)]
    for out in outs:
        out.square().mean().backward()
    return {"outputs": relative_error(*outs), **errors(gradients(model), gradients(truth))}


@subject()
def augmented(rig: Rig) -> tuple[list[bool], float]:
    """In training, of processes that draw other random numbers: do those of one model see the same, and others other?

    And how far is the first group from the whole model that draws what the first process draws?
    """

    def output(model: DINOv3ViT, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            model.train().embed(x)
            return model(x)[0]

    out = output(rig.load(), dist.get_rank())
    mine = out.flatten()[:100]
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, mine)
    is_first_group = torch.equal(everybody[0], mine)
    return [torch.equal(everybody[0], other) for other in everybody], (
        relative_error(out, output(rig.whole(), 0)) if is_first_group else 0.0
    )


@subject("fsdp", "tp")
def key_biases(rig: Rig) -> list[float]:
    """The largest bias of queries, keys and values after training with weight decay."""
    model = rig.load()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p is not model.mask_token], lr=0.1, weight_decay=0.5
    )
    for _ in range(2):
        model(x).patch_tokens.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    biases = torch.stack([t.view(3, -1) for name, t in weights(model).items() if name.endswith("qkv.bias")])
    return biases.abs().amax(dim=(0, 2)).tolist()


@subject("fsdp", "tp")
def names_of_parameters(rig: Rig) -> dict[str, bool]:
    """Whether a state dict, PyTorch's and its distributed one, has them and the buffers, and names as a whole model."""
    model, state = rig.load(), rig.whole().state_dict()
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    found = {"own": model.state_dict(), "distributed": get_model_state_dict(model)}
    return {name: each.keys() == own.keys() == state.keys() for name, each in found.items()}


@subject("fsdp", "tp")
def decaying(rig: Rig) -> list[dict[str, int]]:
    """How many numbers each group has that gets weight decay, of the sharded model and of the whole one."""
    groups = [dinov3_lite.parameter_groups(model, 1.0) for model in (rig.load("gated"), rig.whole("gated"))]
    return [{g["name"]: sum(p.numel() for p in g["params"]) for g in each if g["weight_decay"]} for each in groups]


@subject("fsdp", "tp")
def names_of_weights(rig: Rig) -> list[str]:
    model = rig.load()
    found = [model.weights_id, rig.whole().weights_id]
    with torch.no_grad():
        model(x)
    found.append(model.weights_id)
    model(x).patch_tokens.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return [*found, model.weights_id]


@subject("fsdp")
def after_a_refusal(rig: Rig) -> float:
    model = rig.load()
    for call in (lambda: model(x[..., :-1]), lambda: model.get_intermediate_layers(x, 99), lambda: model.embed(x[0])):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("nothing was refused")
    return relative_error(model(x)[0], rig.whole()(x)[0])


# ---- loading


@subject()
def loading(rig: Rig) -> dict[str, bool]:
    """From every layout, are all tensors the file's, bit for bit?"""
    result = {}
    for source in sorted(path.name for path in (rig.folder / "layouts").iterdir()):
        model = rig.load(f"layouts/{source}")
        found, truth = weights(model), rig.whole(f"layouts/{source}").state_dict()
        result[source] = found.keys() == truth.keys() and all(torch.equal(found[n], truth[n]) for n in truth)
    return result


@subject("fsdp", "tp")
def adapted_channels(rig: Rig) -> float:
    pictures = torch.randn(2, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    return relative_error(rig.load(num_channels=5)(pictures)[0], rig.whole(num_channels=5)(pictures)[0])


@subject()
def sharded_with_weights(rig: Rig) -> tuple[float, bool, bool]:
    """The error; whether what was frozen is, and alone; whether parts by tensor parallelism keep nothing of the whole."""
    model = rig.whole()
    model.blocks[0].requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model = sharding.shard(model, rig.mesh)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    parts = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    apart = rig.dims != "tp" or all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
    return relative_error(model(x)[0], rig.whole()(x)[0]), frozen == still, bool(parts) and apart


@subject("fsdp")
def sharded_by_the_user(rig: Rig) -> dict[str, float]:
    """With torch's own functions, on the meta device and off it, by another dim; and not at all."""
    result = {}
    for place in ("meta", "cpu"):
        for kind in ("fsdp", "whole", "columns"):
            with torch.device(place):
                model = DINOv3ViT(CONFIGS["plain"]).eval()
            if kind == "fsdp":
                for block in model.blocks:
                    fully_shard(block, mesh=rig.mesh)
                fully_shard(model, mesh=rig.mesh)
            if kind == "columns":
                fully_shard(model, mesh=rig.mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
            dinov3_lite.load_weights(model, rig.folder / "plain")
            result[f"{kind} on {place}"] = relative_error(model(x)[0], rig.whole()(x)[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    dinov3_lite.load_weights(model, rig.folder / "plain")  # what ran already, with weights fetched
    result["again"] = relative_error(model(x)[0], rig.whole()(x)[0])
    return result


@subject("fsdp")
def offloaded(rig: Rig) -> dict[str, float]:
    """CPUOffloadPolicy, as far as a CPU shows it."""
    with torch.device("meta"):
        model = DINOv3ViT(CONFIGS["plain"]).eval()
    sharding.shard(model, rig.mesh, offload_policy=CPUOffloadPolicy(pin_memory=False), reshard_after_forward=False)
    dinov3_lite.load_weights(model, rig.folder / "plain", device="cpu")
    truth = rig.whole()
    for each in (model, truth):
        each(x).patch_tokens.square().mean().backward()
    return errors(gradients(model), gradients(truth))


@subject()
def bytes_read(rig: Rig) -> dict[str, tuple[int, int, int]]:
    """Of each layout: read by this process, held by it, and in the file."""
    result = {}
    for source in ("lite", "transformers", "meta"):
        rig.load(f"big/{source}")  # whatever is imported first
        dist.barrier()
        before = _read_so_far()
        model = rig.load(f"big/{source}")
        count = _read_so_far() - before
        held = sum(sharding.parameters.local_part(p).nbytes for p in model.parameters())
        result[source] = count, held, sum(whole(p).nbytes for p in model.parameters())
    return result


def _read_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


# ---- saving


@subject()
def saving(rig: Rig) -> dict[str, bool]:
    """In every layout, are the files those of the unsharded model, byte for byte?"""
    result = {}
    for layout, name in (("lite", "plain"), ("transformers", "gated"), ("meta", "gated"), ("timm", "for timm")):
        folder = rig.folder / f"saved over {rig.dims}" / layout
        model = rig.load(name)
        with torch.no_grad():
            model(images(size=(2 * model.patch_size,) * 2))  # what FSDP keeps of the root is no obstacle
        written = model.save_pretrained(folder / "sharded", layout, dtype=torch.bfloat16)
        assert written.exists()
        if rig.first:
            rig.whole(name).save_pretrained(folder / "whole", layout, dtype=torch.bfloat16)
            pairs = [(file, folder / "whole" / file.name) for file in sorted((folder / "sharded").iterdir())]
            result[layout] = all(a.read_bytes() == b.read_bytes() for a, b in pairs)
    return result


@subject()
def failing_to_save(rig: Rig) -> list[str]:
    model, said = rig.load(), []
    for path, layout in (
        (rig.folder / "nowhere", "onnx"),
        (rig.folder / "nowhere", "timm"),
        (rig.folder / "file" / "x", "lite"),
    ):
        try:
            model.save_pretrained(path, layout)
        except (ValueError, OSError) as error:
            said.append(str(error).replace(str(rig.folder), ""))
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, said)
    assert all(each == said for each in everybody), everybody
    return said


def _trained(model: DINOv3ViT) -> torch.optim.Optimizer:
    """A step with AdamW. The mask token, which does not take part, is frozen: DCP would look for its state."""
    model.mask_token.requires_grad_(False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model(images(0)).patch_tokens.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@subject()
def distributed_checkpoint(rig: Rig) -> dict[str, float]:
    """DCP: written after a step, read into a fresh model, and a second step made by both."""
    model = rig.load()
    optimizer = _trained(model)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=rig.folder / f"dcp over {rig.dims}")
    return _second_step({"as it was": (model, optimizer), "resumed": _resumed(rig, rig.dims)})


@subject("tp")
def distributed_checkpoint_of_another_world(rig: Rig) -> dict[str, float]:
    """What four processes wrote by FSDP and tensor parallelism, read by two by tensor parallelism alone."""
    other = rig.folder / "dcp over fsdp, tp"
    assert other.exists()
    resumed = _resumed(rig, "fsdp, tp")
    truth = rig.whole()
    optimizer = _trained(truth)
    return _second_step({"as it was": (truth, optimizer), "resumed": resumed})


def _resumed(rig: Rig, dims: str) -> tuple[DINOv3ViT, torch.optim.Optimizer]:
    model = rig.load()
    model.mask_token.requires_grad_(False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=rig.folder / f"dcp over {dims}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer


def _second_step(models: dict[str, tuple[DINOv3ViT, torch.optim.Optimizer]]) -> dict[str, float]:
    for model, optimizer in models.values():
        model(images(2)).patch_tokens.square().mean().backward()
        optimizer.step()
    return errors(*(weights(model) for model, _ in models.values()))


@subject("fsdp")
def a_second_opinion(rig: Rig) -> bool:
    """PyTorch's own reader of safetensors into DTensors reads what ours does, by the names that the file has."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    model = rig.load("layouts/lite")
    truth = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    apart = ("rope_embed.periods", "qkv.bias")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(apart)}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(rig.folder / "layouts" / "lite"))
    return all(torch.equal(whole(tensor), truth[name]) for name, tensor in state.items())


# ---- adapters


@subject("fsdp")
def lora(rig: Rig) -> dict[str, float]:
    """Three steps of peft's LoRA, then merged and saved: against those of the unsharded model."""
    import peft

    merged = []
    for shards in (True, False):
        torch.manual_seed(0)
        model = rig.whole()
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv", "attn.proj", "fc1", "fc2"]))
        if shards:
            sharding.shard(model, rig.mesh)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        for seed in range(3):
            adapted(images(seed)).patch_tokens.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        merged.append(adapted.merge_and_unload())
    return errors(*map(weights, merged))


# ---- what is refused, each in a sentence


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@subject()
def refusals(rig: Rig) -> dict[str, str]:
    model, world = rig.load(), dist.get_world_size()
    unnamed = init_device_mesh("cpu", (world,))
    odd = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    said = {
        "optimize": _said(lambda: optimize_for_inference(model)),
        "no names": _said(lambda: check_mesh(unnamed)),
        "other names": _said(lambda: DINOv3ViT.from_pretrained(rig.folder / "plain", mesh=odd)),
        "no mesh": _said(lambda: DINOv3ViT.from_pretrained(rig.folder / "plain", mesh=(2,))),
        "device": _said(lambda: rig.load(device="cuda")),
        "no model": _said(lambda: sharding.shard(nn.Linear(2, 2), rig.mesh)),
        "another model": _said(lambda: dinov3_lite.load_weights(model, rig.folder / "gated")),
        "another size": _said(lambda: dinov3_lite.load_weights(model, rig.folder / "for timm")),
        "a ConvNeXt": _said(lambda: dinov3_lite.load(rig.folder / "convnext", mesh=rig.mesh)),
    }
    if "tp" in rig.dims:
        said["heads"] = _said(lambda: rig.load("three heads"))
        said["units"] = _said(lambda: rig.load("odd units"))
        replaced = rig.whole()
        replaced.blocks[1].mlp.fc2 = nn.Sequential(replaced.blocks[1].mlp.fc2)
        said["a replaced part"] = _said(lambda: sharding.shard(replaced, rig.mesh))
    if rig.dims == "fsdp":
        with patch.object(torch.cpu, "Stream", object):
            said["an old PyTorch"] = _said(lambda: rig.load())
    if rig.dims == "tp":
        import peft

        said["a policy"] = _said(lambda: sharding.shard(rig.whole(), rig.mesh, reshard_after_forward=True))
        for name, target in (("lora", "qkv"), ("lora behind", "attn.proj")):
            config = peft.LoraConfig(target_modules=[target])
            said[name] = _said(lambda: peft.get_peft_model(rig.load(), config))  # noqa: B023
    return said
