"""A model over two and four processes: the same numbers as the model in one, from its own bytes alone.

The subjects run in tests/support/sharded.py, all of a mesh in the same processes.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, trained_like, write_checkpoint
from launch import FOUR, OVER_FOUR
from sharded import CONFIGS, FSDP_RUNS, SHAPES, SUBJECTS, run

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ConvNeXt, DINOv3ConvNeXtConfig, DINOv3ViT
from dinov3_lite.sharding.data_parallel import METHODS
from dinov3_lite.sharding.parameters import Region

FOR_TIMM = replace(TINY, hidden_size=128, num_attention_heads=2, pos_embed_rescale=None)
BIG = DINOv3Config(patch_size=16, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints, in every layout."""
    folder = tmp_path_factory.mktemp("sharding")
    for name, config in CONFIGS.items():
        write_checkpoint(folder / name, config)
    weights = trained_like(FOR_TIMM)
    weights["embeddings.mask_token"].zero_()
    write_checkpoint(folder / "for timm", FOR_TIMM, weights)
    write_checkpoint(folder / "three heads", replace(TINY, hidden_size=48, num_attention_heads=3))
    write_checkpoint(folder / "odd units", replace(TINY, intermediate_size=63))
    DINOv3ConvNeXt(DINOv3ConvNeXtConfig(hidden_sizes=(8, 8, 8, 8), depths=(1, 1, 1, 1))).save_pretrained(
        folder / "convnext"
    )
    layouts, big = folder / "layouts", folder / "big"
    for to in ("lite", "transformers", "meta"):
        options: dict[str, Any] = {"max_shard_size": 40_000} if to == "transformers" else {}
        convert(folder / "gated", layouts / to, to=to, **options)
    convert(folder / "for timm", layouts / "timm", to="timm")
    write_checkpoint(folder / "made big", BIG)
    for to in ("lite", "transformers", "meta"):
        convert(folder / "made big", big / to, to=to)
    (folder / "file").touch()
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[tuple[str, str], Any]:
    """Of every subject on every mesh. Four processes first: two read what they have written."""
    over_four = run(folder, "fsdp, tp") if OVER_FOUR and FSDP_RUNS else {}
    return over_four | run(folder, *(["fsdp", "tp"] if FSDP_RUNS else ["tp"]))


@pytest.fixture
def result(results, request) -> Any:
    found = results[request.param]
    if isinstance(found, Exception):
        raise found
    return found


def on(name: str, *dims: str) -> pytest.MarkDecorator:
    """The result of a subject on each of its meshes, or on these."""
    keys = [(mesh, name) for mesh in SHAPES if mesh in (dims or SUBJECTS[name][1])]
    old = pytest.mark.skipif(not FSDP_RUNS, reason=f"FSDP of PyTorch {torch.__version__} does not run on CPUs")
    marks = {"fsdp": [old], "tp": [], "fsdp, tp": [old, FOUR]}
    params = [pytest.param(key, id=key[0], marks=marks[key[0]]) for key in keys]
    return pytest.mark.parametrize("result", params, indirect=True)


def limit(request) -> float:
    """Relative error in float32: nothing by FSDP, rounding by tensor parallelism."""
    return 0.0 if request.node.callspec.id == "fsdp" else 1e-6


def test_every_subject_is_asked_after():
    asked = {
        param.values[0][1]
        for function in globals().values()
        for mark in getattr(function, "pytestmark", ())
        if mark.name == "parametrize"
        for param in mark.args[1]
    }
    assert asked == set(SUBJECTS)


def test_every_method_that_computes_fetches_the_weights():
    quiet = {"from_name", "from_pretrained", "from_checkpoint", "forward", "init_weights", "save_pretrained"}
    quiet |= {"block_indices", "check_images", "forget_origin", "extra_repr", "grid_of"}
    ours = [cls for cls in DINOv3ViT.__mro__ if cls.__module__.startswith("dinov3_lite")]
    public = {
        name
        for cls in ours
        for name, value in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)))
    }
    assert public - quiet == set(METHODS)


def test_runs_of_a_box():
    whole = torch.arange(3 * 4 * 5)
    for offsets, sizes in (
        ((0, 1, 0), (3, 2, 5)),
        ((0, 0, 2), (3, 4, 2)),
        ((1, 0, 0), (2, 4, 5)),
        ((1, 2, 3), (0, 1, 1)),
    ):
        box = whole.view(3, 4, 5)[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        runs = list(Region((3, 4, 5), offsets, sizes).runs())
        assert torch.equal(torch.cat([whole[:0], *(whole[start:stop] for start, stop in runs)]), box.flatten())
    assert list(Region((3, 4, 5), (0, 1, 0), (3, 2, 5)).runs()) == [(5, 15), (25, 35), (45, 55)]
    assert list(Region((4, 5), (1, 0), (2, 5)).runs()) == [(5, 15)]
    assert list(Region((), (), ()).runs()) == [(0, 1)]


# ---- values


@on("outputs")
def test_outputs_are_those_of_the_whole_model(result, request):
    rounded_more = "attention_maps" if limit(request) else "nothing"  # see maps_in_float64
    errors = {name: error for name, error in result.items() if rounded_more not in name}
    assert max(errors.values()) <= limit(request), max(errors.items(), key=lambda item: item[1])


@on("maps_in_float64")
def test_attention_maps_are_those_of_the_whole_model(result, request):
    assert result <= min(1e-13, limit(request))


@on("in_inference_mode")
def test_inference_mode(result, request):
    assert result <= limit(request)


@on("gradients_of_all")
def test_gradients_are_those_of_the_whole_model(result, request):
    assert max(result.values()) <= min(1e-13, limit(request)), max(result.items(), key=lambda item: item[1])


@on("gradients_in_float32")
def test_gradients_in_float32_err_as_those_of_the_whole_model(result, request):
    if request.node.callspec.id == "fsdp":
        assert all(sharded == own for sharded, own in result.values())
    sharded, own = (max(errors) for errors in zip(*result.values(), strict=True))
    assert sharded <= 1.5 * own


@on("in_bfloat16")
def test_bfloat16_is_no_worse_than_the_whole_model(result):
    """Where a product is rounded once, its parts are, once each: other roundings, of the same size on average."""
    sharded, own = (sum(errors) for errors in zip(*result.values(), strict=True))
    assert sharded <= 1.05 * own, result


@on("sums_in_bfloat16")
def test_no_sum_over_processes_is_rounded(result):
    assert result == (True, torch.float32, torch.bfloat16)


@on("in_float16")
def test_float16(result, request):
    error, of_tokens = result
    assert error <= (0.0 if request.node.callspec.id == "fsdp" else 1e-3) and of_tokens == torch.float32


@on("under_autocast")
def test_autocast(result):
    sharded, own = result
    assert sharded <= 1.1 * own


@on("under_mixed_precision")
def test_mixed_precision_is_a_model_in_bfloat16(result, request):
    difference, own, dtype, of_gradients = result
    assert difference <= (0.0 if request.node.callspec.id == "fsdp" else 1.5 * own)
    assert dtype == of_gradients == torch.float32


@on("with_our_kernels")
def test_our_kernels_take_local_heads(result):
    assert result <= 1e-6


@on("clipping")
def test_gradients_are_clipped_by_their_whole_norm(result):
    assert max(result.values()) <= 1e-13, result


@on("compiled")
def test_compiled_blocks(result):
    assert max(result.values()) <= 2e-6, result


@on("augmented")
def test_processes_of_one_model_augment_alike(result, request):
    """Each group along "tp" is one model; along "fsdp" are others' batches."""
    alike, error = result
    assert error <= limit(request)
    assert (
        alike
        == {"fsdp": [True, False], "tp": [True, True], "fsdp, tp": [True, True, False, False]}[request.node.callspec.id]
    )


@on("key_biases")
def test_key_biases_are_never_born(result):
    query, key, value = result
    assert key == 0.0 and query > 0.0 and value > 0.0


@on("names_of_parameters")
def test_a_state_dict_names_what_the_parameters_are(result):
    assert result == {"own": True, "distributed": True}


@on("decaying")
def test_what_decays_in_a_whole_model_does_in_a_sharded_one(result):
    sharded, whole = result
    assert sharded == whole


@on("names_of_weights")
def test_weights_know_that_they_have_changed(result):
    sharded, whole, after_a_forward, after_a_step = result
    assert sharded == whole == after_a_forward and after_a_step.endswith("changed since it was loaded")


@on("after_a_refusal")
def test_a_refused_image_leaves_no_trace(result, request):
    assert result <= limit(request)


# ---- loading


@on("loading")
def test_every_layout_loads_bit_for_bit(result):
    assert result == dict.fromkeys(("lite", "meta", "timm", "transformers"), True)


@on("adapted_channels")
def test_other_channels(result, request):
    assert result <= limit(request)


@on("sharded_with_weights")
def test_a_model_with_weights_is_sharded(result, request):
    error, frozen_alike, keeps_its_part_alone = result
    assert error <= limit(request) and frozen_alike and keeps_its_part_alone


@on("sharded_by_the_user")
def test_models_that_users_have_sharded_are_filled(result):
    assert set(result.values()) == {0.0} and len(result) == 7


@on("offloaded")
def test_offloaded_parameters(result):
    assert max(result.values()) == 0.0


@on("bytes_read")
def test_each_process_reads_what_it_holds(result):
    for read, held, whole in result.values():
        assert held < 0.6 * whole and read < held + 0.05 * whole


@on("a_second_opinion")
def test_pytorchs_own_reader_agrees(result):
    assert result


# ---- saving


@on("saving")
def test_files_are_those_of_the_whole_model(result):
    assert result == dict.fromkeys(("lite", "transformers", "meta", "timm"), True)


@on("failing_to_save")
def test_what_can_not_be_saved_is_an_error_in_every_process(result):
    layout, lost, place = result
    assert layout == "layout is 'onnx': expected one of lite, transformers, meta, timm"
    assert lost.startswith("the timm layout can't hold ") and "/file" in place


@on("distributed_checkpoint")
def test_training_goes_on_from_a_distributed_checkpoint(result):
    assert max(result.values()) == 0.0


@FOUR
@on("distributed_checkpoint_of_another_world")
def test_training_goes_on_in_another_world(result):
    assert max(result.values()) <= 1e-4, result


@on("lora")
def test_lora_learns_what_it_does_in_one_process(result):
    assert max(result.values()) <= 1e-6, result


# ---- refusals


@on("refusals")
def test_refusals(result):
    expected = {
        "optimize": "the model is sharded, 'cls_token' lies in parts on several devices: expected a whole one; compile the "
        "sharded one's blocks by torch.compile",
        "no names": "mesh has no names for its dims: expected ('fsdp',), ('tp',) or ('fsdp', 'tp'), in this order",
        "other names": "mesh has dims ('dp',): expected ('fsdp',), ('tp',) or ('fsdp', 'tp'), in this order",
        "no mesh": "mesh is a tuple: expected a DeviceMesh, which init_device_mesh makes",
        "device": "device is 'cuda' and the mesh is of 'cpu': leave device out, or make a mesh of it",
        "an old PyTorch": f"mesh has dims ('fsdp',) of CPUs, on which FSDP of PyTorch {torch.__version__} does not run: expected "
        "a newer PyTorch, a mesh of GPUs, or ('tp',)",
        "no model": "model is a Linear: expected a DINOv3ViT; what stands around it you shard by torch's fully_shard, after "
        "this",
        "heads": "'tp' of the mesh is 2 and the model has num_attention_heads 3: expected a number of processes that "
        "divides it",
        "units": "'tp' of the mesh is 2 and the model has intermediate_size 63: expected a number of processes that "
        "divides it",
        "a replaced part": "blocks.1.mlp.fc2 is a torch.nn.modules.container.Sequential, which tensor parallelism can't "
        "cut: expected Linear; merge adapters first, or shard over 'fsdp' alone",
        "a policy": "reshard_after_forward is for FSDP, and the mesh has dims ('tp',): expected one named 'fsdp'",
    }
    beginnings = {
        "optimize": "the model is sharded, ",
        "another model": "/gated: lacks 'blocks.0.mlp.fc1.bias'",
        "another size": "/for timm: lacks 'blocks.3.attn.proj.bias'",
        "a ConvNeXt": "mesh is given and ",
        "lora": "Target module ColumnParallelQKV",
        "lora behind": "Target module RowParallel",
    }
    for name, said in result.items():
        if name in beginnings:
            assert beginnings[name] in said, said
        else:
            assert said == expected[name]


def test_without_processes(tmp_path):
    """In a process that is alone: a mesh whose group is gone, and one of another rank."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    folder = write_checkpoint(tmp_path / "checkpoint", TINY)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        alone = DINOv3ViT.from_pretrained(folder, mesh=mesh)
        images = torch.randn(1, 3, 16, 16)
        torch.testing.assert_close(alone(images)[0], DINOv3ViT.from_pretrained(folder)(images)[0], rtol=0, atol=0)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"mesh is \(1,\) and there is no process group \(any more\)"):
        DINOv3ViT.from_pretrained(folder, mesh=mesh)
