"""What every variant needs: memory and time of a forward, memory of a training step, each in a process of its own.

    python benchmarks/models.py [--variants vits16 ...] [--again] [--memory-only] [--save NAME]

Forwards of one picture of 224 and 512 px in float32 and bfloat16; what a picture of 224 px adds to a training step,
with and without gradient checkpointing. The weights are made. Where a model's weights exceed the memory at hand, its
blocks share one block's: the time is measured as ever (a block is larger than any cache), the memory is what the rest
was measured to take plus the weights' bytes, and the row says `computed`.

Every row is written to benchmarks/results/NAME.json (default: models) as soon as it is there, and a later call goes on
where this one stopped. `--memory-only` leaves the times to a quiet hour. page.py makes docs/models.md of the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from typing import Any

import torch
from environment import headline, opened, save
from timing import in_a_child, once, peak_mib, process_mib
from torch import nn

from dinov3_lite import DINOv3Config, DINOv3ConvNeXt, DINOv3ConvNeXtConfig, DINOv3ViT
from dinov3_lite.checkpoint.layouts import model_tensors
from dinov3_lite.config import CONVNEXTS, config_from_name
from dinov3_lite.loading import Backbone, skeleton

VITS = ("vitt16", "vits16", "vits16plus", "vitb16", "vitl16", "vitl16plus", "vith16plus", "vitg16", "vit7b16")
VARIANTS = (*VITS, *CONVNEXTS)
RELEASED = ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")  # by Meta: what people choose among
DTYPES = ("float32", "bfloat16")
SIDES = (224, 512)
PICTURES = (2, 6)  # in a training step; the difference is what four pictures add
TRAINED = ("vits16", "vits16plus", "vitb16", "vitl16", "vitl16plus", *CONVNEXTS)
BUDGETS = (8, 12, 24, 48, 80)  # GB of memory that cards have
RESERVE = 1.0  # GB that a GPU's context and the allocator's fragments take

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--again", action="store_true", help="measure anew what the result holds already")
    parser.add_argument("--memory-only", action="store_true", help="no times: the machine is busy")
    parser.add_argument("--save", default="models", metavar="NAME", help="of the file under benchmarks/results/")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measured(json.loads(args.row), timed=not args.memory_only)))
        return

    result = opened(args.save, args.again)
    rows = {json.dumps(identity(row)): row for row in result["rows"]}
    for row in wanted(args.variants):
        key, timed = json.dumps(row), row["kind"] == "forward" and not args.memory_only
        if key in rows and (rows[key]["seconds"] or not timed):
            continue
        try:
            words = ("--row", key, *(() if timed else ("--memory-only",)))
            # glibc keeps what was freed for the next one: not where two peaks of one process are compared
            variables = {} if row["kind"] == "forward" else {"MALLOC_MMAP_THRESHOLD_": "65536"}
            rows[key] = row | json.loads(in_a_child(__file__, *words, **variables))
        except RuntimeError as error:  # killed for its memory, say: the others go on, and the next call tries it again
            print(f"{row}: failed: {(str(error).splitlines() or ['killed'])[-1]}", file=sys.stderr)
            continue
        result["rows"] = [rows[key] for key in map(json.dumps, wanted(VARIANTS)) if key in rows]
        save(args.save, result)
        print(rows[key], flush=True)
    print(headline(result), *tables(result).values(), sep="\n\n")


def wanted(variants: tuple[str, ...]) -> list[Row]:
    """What identifies each row, in the order of the result."""
    rows = [
        {"kind": "forward", "variant": variant, "dtype": dtype, "pixels": pixels, "batch": 1}
        for variant in variants
        for dtype in DTYPES
        for pixels in SIDES
    ]
    rows += [
        {"kind": kind, "variant": variant, "dtype": "bfloat16", "pixels": 224, "batch": PICTURES[1]}
        for variant in variants
        if variant in TRAINED
        for kind in ("training", "training, checkpointed")
    ]
    return rows


def identity(row: Row) -> Row:
    return {key: row[key] for key in ("kind", "variant", "dtype", "pixels", "batch")}


# ---- one row, in a process of its own


def measured(row: Row, timed: bool) -> Row:
    """Peak MiB above the imports, the weights included; seconds of forwards, where asked for."""
    base = process_mib("VmHWM")
    if row["kind"] != "forward":
        each = training(row)
        return {"peak MiB": process_mib("VmHWM") - base, "MiB a picture": each, "computed": False, "seconds": []}
    dtype = getattr(torch, row["dtype"])
    weights = parameters(row["variant"]) * dtype.itemsize / 2**20
    fits = weights + 2048 < available_mib()
    model = made(row["variant"], dtype, shared=not fits)
    images = torch.zeros(row["batch"], 3, row["pixels"], row["pixels"], dtype=dtype)
    with torch.inference_mode():
        model(images[..., :64, :64])  # pages in the code, which the first call pays for otherwise
        seconds = timings(lambda: model(images)) if timed else []
        if not timed:
            model(images)
    held = 0 if fits else weights - sum(p.nbytes for p in model.parameters()) / 2**20
    return {"peak MiB": process_mib("VmHWM") - base + held, "computed": not fits, "seconds": seconds}


def made(variant: str, dtype: torch.dtype, shared: bool = False) -> Backbone:
    """A model of the variant's shapes: of a ViT one block of made weights, then its copies, or the same one all over.

    Raises ValueError for a ConvNeXt whose blocks are to be shared: they have many shapes, and fit.
    """
    config = config_from_name(variant)
    if isinstance(config, DINOv3ConvNeXtConfig):
        if shared:
            raise ValueError(f"{variant} does not fit into memory: free some")
        model = skeleton(config).to(dtype).to_empty(device="cpu")  # made in float32, it would peak so
        model.init_weights()
        return model.eval()
    model = DINOv3ViT.from_name(variant, num_hidden_layers=1).to(dtype).eval()
    block = model.blocks[0]
    more = range(config.num_hidden_layers - 1)
    model.blocks = nn.ModuleList([block, *(block if shared else copy.deepcopy(block) for _ in more)])
    return model


def timings(call: Any, seconds: float = 5.0) -> list[float]:
    """The first call warms up, unless it takes so long that it doesn't matter; then as many as fit into `seconds`."""
    first = once(call)
    if first > 20:
        return [first, once(call)]
    return [once(call) for _ in range(min(max(3, round(seconds / first)), 15))]


def training(row: Row) -> float:
    """MiB that a picture adds to forward and backward, under bfloat16 autocast; a step of AdamW goes before."""
    model_class = DINOv3ConvNeXt if row["variant"] in CONVNEXTS else DINOv3ViT
    model = model_class.from_name(row["variant"]).train()
    model.gradient_checkpointing = row["kind"].endswith("checkpointed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)

    def step(pictures: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(pictures, 3, row["pixels"], row["pixels"])).patch_tokens.float().square().mean()
        loss.backward()

    step(PICTURES[0])
    optimizer.step()
    few, many = (peak_mib(lambda n=n: step(n)) for n in PICTURES)
    return (many - few) / (PICTURES[1] - PICTURES[0])


def parameters(variant: str) -> int:
    """How many numbers a checkpoint of the variant holds: zeros that stand for absent key biases are not among them."""
    tensors = model_tensors(config_from_name(variant)).items()
    return sum(math.prod(shape) for name, (shape, _) in tensors if not name.startswith("rope_embed."))


def available_mib() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 1024


# ---- tables


def tables(result: Row) -> dict[str, str]:
    return {"forward": forward_table(result), "training": training_table(result), "choice": choice_table(result)}


def variants_table() -> str:
    """A line a variant: what its config says, and how large that is."""
    lines = [
        "| variant | embedding | depth | heads | MLP | parameters | float32 | bfloat16 |",
        "|---" + "|--:" * 7 + "|",
    ]
    for variant in VITS:
        config, count = DINOv3Config.from_name(variant), parameters(variant)
        mlp = f"{'SwiGLU' if config.use_gated_mlp else 'GELU'} {config.intermediate_size}"
        cells = [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, mlp, f"{count:,}"]
        lines.append(f"| {variant} | " + " | ".join(map(str, [*cells, size(4 * count), size(2 * count)])) + " |")
    return "\n".join(lines)


def convnexts_table() -> str:
    """A line a ConvNeXt: channels and blocks of its stages, and how large it is."""
    stages = " | ".join(f"stage {i}, stride {4 * 2 ** (i - 1)}" for i in (1, 2, 3, 4))
    lines = [f"| variant | {stages} | blocks | parameters | float32 | bfloat16 |", "|---" + "|--:" * 8 + "|"]
    for variant, config in CONVNEXTS.items():
        count, blocks = parameters(variant), ", ".join(map(str, config.depths))
        cells = [*config.hidden_sizes, blocks, f"{count:,}", size(4 * count), size(2 * count)]
        lines.append(f"| {variant} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def find(result: Row, **identity: Any) -> Row | None:
    return next((row for row in result["rows"] if identity.items() <= row.items()), None)


def gib(row: Row | None) -> str:
    """GiB with two digits that count; in italics where part of it was computed."""
    if row is None:
        return "-"
    text = f"{row['peak MiB'] / 1024:.2f}" if row["peak MiB"] < 10240 else f"{row['peak MiB'] / 1024:.1f}"
    return f"*{text}*" if row["computed"] else text


def milliseconds(row: Row | None) -> str:
    if row is None or not row["seconds"]:
        return "-"
    median = 1e3 * statistics.median(row["seconds"])
    return f"{median:.0f}" if median >= 10 else f"{median:.1f}"


def forward_table(result: Row) -> str:
    """A line a variant; GiB and milliseconds for each dtype and side."""
    columns = [(dtype, side) for dtype in DTYPES for side in SIDES]
    head = ["variant", *(f"{dtype}, {side} px: GiB | ms" for dtype, side in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * 2 * len(columns) + "|"]
    for variant in VARIANTS:
        found = [find(result, kind="forward", variant=variant, dtype=d, pixels=side) for d, side in columns]
        cells = [f"{gib(row)} | {milliseconds(row)}" for row in found]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def training_table(result: Row) -> str:
    """A line a variant: what AdamW holds, the peak of a step, and what each further picture adds to it."""
    kinds = ("training", "training, checkpointed")
    heads = [f"{kind}, {PICTURES[1]} pictures: GiB | MiB a picture" for kind in kinds]
    lines = [f"| variant | AdamW's state: GiB | {' | '.join(heads)} |", "|---" + "|--:" * 5 + "|"]
    for variant in VARIANTS:
        rows = [find(result, kind=kind, variant=variant) for kind in kinds]
        cells = [f"{gib(row)} | {row['MiB a picture']:.0f}" if row else "- | -" for row in rows]
        lines.append(f"| {variant} | {16 * parameters(variant) / 2**30:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def choice_table(result: Row, batch: int = 8) -> str:
    """A line a memory size: the largest variant to run, and the largest to train whole."""
    lines = ["| memory | largest to run: float32 | bfloat16 | largest to train whole, batch 8 |", "|--:|---|---|---|"]
    for gigabytes in BUDGETS:
        cells = [largest(gigabytes, {v: run_gb(result, v, dtype) for v in RELEASED}) for dtype in DTYPES]
        cells.append(largest(gigabytes, {v: train_gb(result, v, batch) for v in RELEASED}))
        lines.append(f"| {gigabytes} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_gb(result: Row, variant: str, dtype: str) -> float:
    row = find(result, kind="forward", variant=variant, dtype=dtype, pixels=512)
    return row["peak MiB"] * 2**20 / 1e9 if row else float("inf")


def train_gb(result: Row, variant: str, batch: int) -> float:
    """With gradient checkpointing: the measured step; else 18 bytes a parameter (AdamW's state, autocast's copies) and
    the pictures of the largest measured ViT, in proportion to depth times width.
    """
    row = find(result, kind="training, checkpointed", variant=variant)
    if row:
        return (row["peak MiB"] + (batch - row["batch"]) * row["MiB a picture"]) * 2**20 / 1e9
    of_vits = [row for row in result["rows"] if row["kind"] == "training, checkpointed" and row["variant"] in VITS]
    largest = of_vits[-1] if of_vits else None
    if not largest:
        return float("inf")
    share = layers_times_width(variant) / layers_times_width(largest["variant"])
    return (18 * parameters(variant) + batch * share * largest["MiB a picture"] * 2**20) / 1e9


def layers_times_width(variant: str) -> int:
    config = DINOv3Config.from_name(variant)
    return config.num_hidden_layers * config.hidden_size


def largest(gigabytes: float, needs: dict[str, float]) -> str:
    fitting = {variant: need for variant, need in needs.items() if need + RESERVE <= gigabytes}
    return max(fitting, key=lambda variant: parameters(variant)) if fitting else "none"


if __name__ == "__main__":
    main()
