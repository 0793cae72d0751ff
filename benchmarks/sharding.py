"""A model over 2 and 4 processes: its errors against the model in one, and what each process reads and holds.

    python benchmarks/sharding.py [--variants vits16 ...] [--sparse]

Every variant's widths at depth 1, gloo on one machine, several draws of weights and of four pictures of 64 px. Errors
are relative, against float64 on the same weights: of the output and the worst of the gradients of all tensors, beside
the whole model's own in the same draw. Reading and memory are those of `from_pretrained` in the process that has most,
over the whole's.
`--sparse` loads a file of the 7B's full shapes, 27 GB of holes, as the first and as the last of eight processes.

Every row is written to benchmarks/results/sharding.json as soon as it is there, and a later call goes on from there.
page.py makes the tables in docs/sharding.md of the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from environment import RESULTS, environment, headline, save
from timing import in_a_child, peak_mib, relative_difference
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.checkpoint.layouts import TRANSFORMERS
from dinov3_lite.sharding.parameters import held_by, local_part

VARIANTS = ("vits16", "vits16plus", "vitb16", "vitl16", "vitl16plus", "vith16plus", "vit7b16")
MESHES = ("fsdp 2", "tp 2", "fsdp 4", "tp 4", "fsdp 2, tp 2")
DTYPES = ("float32", "bfloat16")
DRAWS = 2
EIGHT = 8  # processes that share the sparse file

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="scratch space; with --rank that of the sparse file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as each process of a mesh has: other numbers of threads give other last bits
    if args.rank is not None:
        print(json.dumps(load_as(args.rank, args.folder)))
        return
    file = RESULTS / "sharding.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": [], "sparse": []}
    result["environment"] = environment()
    for variant in args.variants:
        missing = [(m, d) for m in MESHES for d in DTYPES if fits(variant, m) and not find(result, variant, m, d)]
        if missing:
            result["rows"] += measured(variant, missing, args.folder)
            save("sharding", result)
    if args.sparse:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            size = write_sparse(Path(scratch), DINOv3Config.from_name("vit7b16"))
            result["sparse"] = []
            for rank in (0, EIGHT - 1):
                found = json.loads(in_a_child(__file__, "--rank", rank, "--folder", scratch))
                result["sparse"].append({"rank": rank, "bytes": size, **found})
            save("sharding", result)
    print(headline(result))
    print(table(result), sparse_table(result), sep="\n\n")


def measured(variant: str, missing: list[tuple[str, str]], folder: Path | None) -> list[Row]:
    """A row for each mesh and dtype, with the errors of every draw."""
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for draw in range(DRAWS):
            prepare(Path(scratch) / str(draw), variant, draw)
        for world in (2, 4):
            cases = [case for case in missing if math.prod(sizes(case[0])) == world]
            if cases:
                mp.spawn(measure, (world, Path(scratch), cases), nprocs=world)
                rows += json.loads((Path(scratch) / "rows.json").read_text())
    return [{"variant": variant, **row} for row in rows]


def sizes(mesh: str) -> list[int]:
    return [int(dim.split()[1]) for dim in mesh.split(", ")]


def names(mesh: str) -> tuple[str, ...]:
    return tuple(dim.split()[0] for dim in mesh.split(", "))


def fits(variant: str, mesh: str) -> bool:
    """Six heads don't divide by four."""
    return "tp 4" not in mesh or DINOv3Config.from_name(variant).num_attention_heads % 4 == 0


def find(result: Row, *key: str) -> Row | None:
    return next((row for row in result["rows"] if (row["variant"], row["mesh"], row["dtype"]) == key), None)


# ---- values


def prepare(folder: Path, variant: str, draw: int) -> None:
    """A checkpoint of one block with the statistics of trained weights, and the whole model's outputs and gradients."""
    folder.mkdir()
    torch.manual_seed(draw)
    model = DINOv3ViT(replace(DINOv3Config.from_name(variant), num_hidden_layers=1)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(0, 0.7).exp_()
            elif "gamma" in name:
                parameter.uniform_(-2, 0).copy_(10**parameter)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.ndim > 1:
                parameter.normal_(0, 1 if "token" in name else parameter[0].numel() ** -0.5)
    model.save_pretrained(folder / "float32.safetensors")
    model.save_pretrained(folder / "bfloat16.safetensors", dtype=torch.bfloat16)
    for dtype in DTYPES:
        truth = model = None
        truth = gone_through(DINOv3ViT.from_pretrained(folder / f"{dtype}.safetensors").double(), draw)
        model = gone_through(DINOv3ViT.from_pretrained(folder / f"{dtype}.safetensors"), draw)
        own = worst(model, truth)
        torch.save({"truth": truth, "own": own}, folder / f"{dtype}.pt")


def gone_through(model: Any, draw: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden state of four pictures, and the gradients of its mean square, by the names in a state dict."""
    pictures = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1 + draw)).bfloat16()
    out = model(pictures.to(model.dtype)).last_hidden_state
    out.square().mean().backward()
    found = {}
    for name, tensor, shape in held_by(model):
        if tensor.grad is not None:
            grad = tensor.grad
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).view(shape)
            tensor.grad = None
    return out.detach(), found


def worst(found: tuple[Tensor, dict[str, Tensor]], truth: tuple[Tensor, dict[str, Tensor]]) -> list[float]:
    """The relative error of the output, and the worst of the gradients'."""
    gradients = [relative_difference(found[1][name], grad) for name, grad in truth[1].items() if grad.any()]
    return [relative_difference(found[0], truth[0]), max(gradients)]


def measure(rank: int, world: int, folder: Path, cases: list[tuple[str, str]]) -> None:
    """One of the processes: a row a case, which the first writes down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"{world}"), world), rank=rank, world_size=world)
    rows = []
    for mesh_name, dtype in cases:
        mesh = init_device_mesh("cpu", tuple(sizes(mesh_name)), mesh_dim_names=names(mesh_name))
        mine = loading(folder / "0" / f"{dtype}.safetensors", mesh)
        everybody: list[Any] = [None] * world
        dist.all_gather_object(everybody, mine)
        errors = []
        for draw in range(DRAWS):
            source = folder / str(draw) / f"{dtype}.safetensors"
            found = gone_through(DINOv3ViT.from_pretrained(source, mesh=mesh), draw)
            if rank == 0:
                kept = torch.load(source.with_suffix(".pt"), mmap=True)
                errors.append({"sharded": worst(found, kept["truth"]), "own": kept["own"]})
        if rank == 0:
            ranks = {name: [each[name] for each in everybody] for name in mine}
            rows.append({"mesh": mesh_name, "dtype": dtype, "errors": errors, **ranks})
            print(json.dumps(rows[-1]), file=sys.stderr)
        dist.barrier()
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


# ---- bytes


def loading(source: Path, mesh: DeviceMesh) -> Row:
    """What this process reads of the file, and holds and needs at the peak; and how much the whole model is."""
    DINOv3ViT.from_pretrained(source, mesh=mesh)  # what is imported at the first is no part of it
    loaded: list[DINOv3ViT] = []
    read, peak = reading(lambda: loaded.append(DINOv3ViT.from_pretrained(source, mesh=mesh)))
    held = list(held_by(loaded[0]))
    whole = sum(each.tensor.nbytes for each in held)
    return {"read": read, "peak": peak, "held": sum(local_part(each.tensor).nbytes for each in held), "whole": whole}


def reading(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that this process reads during a call, and by how many its memory's peak rises (Linux)."""

    def so_far() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().removeprefix("rchar: "))

    before = so_far()
    peak = int(peak_mib(call) * 2**20)
    return so_far() - before, peak


def write_sparse(folder: Path, config: DINOv3Config) -> int:
    """A checkpoint in transformers' layout, float32, whose data is a hole; its bytes."""
    header, offset = {}, 0
    for equation in TRANSFORMERS.table(config).equations(config):
        for name, shape in equation.theirs:
            end = offset + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return offset


def load_as(rank: int, folder: Path) -> Row:
    """Load the sparse file as one of eight, alone: loading sends nothing, so that PyTorch's fake group will do."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=EIGHT)
    mesh = init_device_mesh("cpu", (EIGHT,), mesh_dim_names=("tp",))
    loaded: list[nn.Module] = []
    start = time.perf_counter()
    read, peak = reading(lambda: loaded.append(DINOv3ViT.from_pretrained(folder, mesh=mesh)))
    seconds = time.perf_counter() - start
    held = sum(local_part(held.tensor).nbytes for held in held_by(loaded[0]))
    return {"read": read, "peak": peak, "held": held, "seconds": seconds}


# ---- tables


def table(result: Row) -> str:
    lines = [
        "| mesh | dtype | error of the output | over the whole's | of gradients | over the whole's | read | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mesh in MESHES:
        for dtype in DTYPES:
            rows = [row for row in result["rows"] if (row["mesh"], row["dtype"]) == (mesh, dtype)]
            if not rows:  # a run that was stopped
                continue
            cells = [cell for kind in (0, 1) for cell in compared([e for row in rows for e in row["errors"]], kind)]
            big = [row for row in rows if row["variant"] == "vit7b16"]
            cells += [
                f"{max(max(row[name]) / row['whole'][0] for row in big or rows):.1%}" for name in ("read", "peak")
            ]
            lines.append(f"| {mesh} | {dtype} | {' | '.join(cells)} |")
    run = [variant for variant in VARIANTS if any(row["variant"] == variant for row in result["rows"])]
    return "\n".join([*lines, "", f"Widths of {', '.join(run)}; {DRAWS} draws of each."])


def compared(errors: list[Row], kind: int) -> tuple[str, str]:
    """The worst error, and how many times the whole model's they are: their geometric mean, least and most."""
    ratios = [each["sharded"][kind] / each["own"][kind] for each in errors]
    worst_error = max(each["sharded"][kind] for each in errors)
    return f"{worst_error:.1e}", f"{geometric_mean(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


def sparse_table(result: Row) -> str:
    lines = ["| process | reads | holds | peak | seconds |", "|---|---|---|---|---|"]
    for row in result["sparse"]:
        sizes_ = (f"{row[name] / 1e9:.2f} GB" for name in ("read", "held", "peak"))
        lines.append(f"| {row['rank'] + 1} of {EIGHT} | {' | '.join(sizes_)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
