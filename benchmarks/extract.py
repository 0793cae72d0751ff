"""Pictures a second from JPEG files to features on disk: `extract` beside other ways, and with two workers.

    python benchmarks/extract.py [--variants vits16 vitb16] [--pictures 512] [--rounds 3] [--dtype bfloat16] [--workers]

Every contender runs in a process of its own, in turn, on one core with one thread, from files that the system has in
memory; start-up is left out, and so is each model's first run: of `extract` the first shard of three. `transformers` is
its model behind a DataLoader with its image processor, `timm` its model behind its own transform and a DataLoader, as
its inference.py does it, `a bare loop` our model and image processor, a batch at a time, nothing ahead. All three run
in batches of 8, in which a CPU is faster than in 32 (transformers in both); `extract` is asked for batches of 32.
Pictures are made (noise in several frequencies, as large as photographs). `--workers` measures two workers against one
instead, by torchrun, by --part and by Ray. Writes benchmarks/results/extract.json, extract_bfloat16.json or
extract_workers.json; `--add` keeps what is there and adds other rows and contenders.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import RESULTS, environment, headline, save
from peers import REFERENCES, import_timm, write_checkpoint
from PIL import Image
from timing import in_a_child, turns

SIZES = {"500 x 375": (500, 375), "4000 x 3000": (4000, 3000)}
BATCH, OTHERS_BATCH = 32, 8
SHARES = ("read", "decode", "resize", "forward", "write")


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs with detail at all scales; of large ones a few, under many names."""
    folder.mkdir()
    rng, distinct = np.random.default_rng(0), 64 if size[0] < 1000 else 8
    for i in range(count):
        file = folder / f"{i:05d}.jpg"
        if i >= distinct:
            os.link(folder / f"{i % distinct:05d}.jpg", file)
            continue
        layers = []
        for scale in (2, 8, 32, 128):
            small = rng.integers(0, 256, (max(2, size[1] // scale), max(2, size[0] // scale), 3), np.uint8)
            layers.append(np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.float32))
        Image.fromarray(np.average(layers, axis=0, weights=(1, 1, 2, 3)).astype(np.uint8)).save(file, quality=90)


# ---- contenders: seconds for all pictures


def counted(photos: Path) -> list[Path]:
    """The files whose time counts: all but a first third."""
    files = sorted(photos.iterdir())
    return files[len(files) // 3 :]


def by_extract(photos: Path, checkpoint: Path, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    from dinov3_lite.extraction.engines import extract

    with tempfile.TemporaryDirectory() as output:
        extract(
            photos,
            checkpoint,
            output,
            dtype=dtype,
            batch_size=BATCH,
            shard_size=len(list(photos.iterdir())) // 3,
            decode_threads=1,
            progress=False,
            device="cpu",
            **options,
        )
        lines = [json.loads(line) for file in Path(output, "log").iterdir() for line in file.read_text().splitlines()]
    return {name: sum(line["seconds"][name] for line in lines if line["shard"]) for name in ("whole", *SHARES)}


def by_a_bare_loop(photos: Path, checkpoint: Path, dtype: torch.dtype) -> dict[str, Any]:
    from dinov3_lite import DINOv3ViT, ImageProcessor, optimize_for_inference

    model = optimize_for_inference(DINOv3ViT.from_pretrained(checkpoint, dtype=dtype), dynamic=False)
    processor, files = ImageProcessor(), counted(photos)
    model(torch.zeros(OTHERS_BATCH, 3, 224, 224))
    start, rows = time.perf_counter(), []
    for i in range(0, len(files), OTHERS_BATCH):
        images = processor([str(file) for file in files[i : i + OTHERS_BATCH]])["pixel_values"]
        rows.append(model(images).cls_token.half().numpy())
    with tempfile.TemporaryFile() as file:
        np.save(file, np.concatenate(rows))
    return {"whole": time.perf_counter() - start}


def by_transformers(
    photos: Path, checkpoint: Path, dtype: torch.dtype, batch_size: int = OTHERS_BATCH
) -> dict[str, Any]:
    sys.path += [str(REFERENCES), str(Path(__file__).parent.parent / "tests" / "support")]
    import torchvision_shim  # noqa: F401

    # isort: split
    from transformers import AutoModel
    from transformers.models.dinov3_vit import DINOv3ViTImageProcessor

    model, processor = AutoModel.from_pretrained(checkpoint, dtype=dtype).eval(), DINOv3ViTImageProcessor()
    files = counted(photos)

    class Photos(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> torch.Tensor:
            return processor(Image.open(files[i]).convert("RGB"), return_tensors="pt")["pixel_values"][0]

    return _by_a_loader(Photos(), lambda x: model(pixel_values=x.to(dtype)).pooler_output, batch_size)


def by_timm(photos: Path, checkpoint: Path, dtype: torch.dtype) -> dict[str, Any]:
    timm = import_timm()
    name = {"vits16": "small", "vitb16": "base"}[checkpoint.name]
    model = timm.create_model(f"vit_{name}_patch16_dinov3", pretrained=False, num_classes=0, global_pool="token").eval()
    dataset = timm.data.create_dataset("", root=str(photos), is_training=False)
    dataset.transform = timm.data.create_transform((3, 224, 224), crop_pct=1.0, interpolation="bilinear")
    dataset = torch.utils.data.Subset(dataset, range(len(counted(photos))))
    model = model.to(dtype)
    return _by_a_loader(dataset, lambda x: model(x.to(dtype)))


def _by_a_loader(dataset: Any, model: Any, batch_size: int = OTHERS_BATCH) -> dict[str, Any]:
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=1)
    with torch.inference_mode():
        model(torch.zeros(batch_size, 3, 224, 224))
        start, rows = time.perf_counter(), []
        for batch in loader:
            rows.append(model(batch[0] if isinstance(batch, (list, tuple)) else batch).half().numpy())
    with tempfile.TemporaryFile() as file:
        np.save(file, np.concatenate(rows))
    return {"whole": time.perf_counter() - start}


CONTENDERS = {
    "extract": by_extract,
    "extract, --resize uint8": lambda *job: by_extract(*job, resize="uint8"),
    "extract, --scaled-decoding": lambda *job: by_extract(*job, scaled_decoding=True),
    "a bare loop": by_a_bare_loop,
    "transformers": by_transformers,
    "transformers, batches of 32": lambda *job: by_transformers(*job, batch_size=BATCH),
    "timm": by_timm,
}


def measure(
    root: Path, variants: list[str], counts: dict[str, int], names: list[str], rounds: int, dtype: str
) -> list[dict[str, Any]]:
    rows = []
    for size, count in counts.items():
        write_photos(root / size, count * 3 // 2, SIZES[size])
        for variant in variants:
            checkpoint = write_checkpoint(root / variant, variant)
            (checkpoint / "preprocessor_config.json").write_text('{"size": {"height": 224, "width": 224}}')
            times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _, name in turns(names, rounds):
                printed = in_a_child(__file__, "--dtype", dtype, "--run", name, root / size, checkpoint)
                times[name].append(json.loads(printed))
            row: dict[str, Any] = {
                "variant": variant,
                "size": size,
                "pictures": count,
                "dtype": dtype,
                "seconds": times,
            }
            row["ratios"] = {
                name: statistics.median(
                    a["whole"] / b["whole"] for a, b in zip(times[name], times["extract"], strict=True)
                )
                for name in names
            }
            rows.append(row)
    return rows


def add(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The rows and contenders of this result, and those of another that it has not; all in one order."""
    rows = {(row["variant"], row["size"]): row for row in other["rows"]}
    for row in result["rows"]:
        before = rows.get((row["variant"], row["size"]), {})
        before = before if before.get("pictures") == row["pictures"] else {}  # seconds of as many pictures alone
        both = {name: {**before.get(name, {}), **row[name]} for name in ("seconds", "ratios")}
        rows[row["variant"], row["size"]] = {**row, **both}
    in_order = [(variant, size) for variant in ("vits16", "vitb16") for size in SIZES]
    return {**result, "rows": [rows[key] for key in in_order if key in rows]}


def table(result: dict[str, Any]) -> str:
    """Pictures a second; in brackets, how many times as long as `extract` it takes. Then where the time of it went."""
    head = ["", *(f"{row['variant']}, {row['size']}" for row in result["rows"])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in CONTENDERS:
        cells = []
        for row in result["rows"]:
            if name in row["ratios"]:
                seconds = statistics.median(t["whole"] for t in row["seconds"][name])
                cells.append(f"{row['pictures'] / seconds:.1f} ({row['ratios'][name]:.2f})")
            else:
                cells.append("")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for share in SHARES:
        cells = []
        for row in result["rows"]:
            of_all = statistics.median(t[share] / sum(t[name] for name in SHARES) for t in row["seconds"]["extract"])
            cells.append(f"{of_all:.0%}".replace("%", " %"))
        lines.append(f"| of extract: {share} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- two workers against one


def workers(root: Path, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of the shards' work by one worker and by two, from the first shard's start to the last one's end."""
    write_photos(root / "photos", count, SIZES["500 x 375"])
    checkpoint = write_checkpoint(root / "vits16", "vits16")
    (checkpoint / "preprocessor_config.json").write_text('{"size": {"height": 224, "width": 224}}')
    seconds: dict[str, list[float]] = {}
    for i, name in turns([f"{how}, {n}" for how in ("torchrun", "--part", "ray") for n in (1, 2)], rounds):
        how, n = name.split(", ")
        seconds.setdefault(name, []).append(_by_workers(root, checkpoint, root / f"out{i}{name}", how, int(n)))
    return {
        "seconds": seconds,
        "ratios": {
            how: statistics.median(a / b for a, b in zip(seconds[f"{how}, 1"], seconds[f"{how}, 2"], strict=True))
            for how in ("torchrun", "--part", "ray")
        },
    }


def workers_table(result: dict[str, Any]) -> str:
    lines = ["| | one worker, pictures a second | two workers | times as many |", "|---|---|---|---|"]
    for how, ratio in result["ratios"].items():
        rates = [result["pictures"] / statistics.median(result["seconds"][f"{how}, {n}"]) for n in (1, 2)]
        lines.append(f"| {how} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def _by_workers(root: Path, checkpoint: Path, output: Path, how: str, n: int) -> float:
    extract = ["-m", "dinov3_lite", "extract", root / "photos", "--model", checkpoint, "--output", output]
    extract += ["--shard-size", "32", "--batch-size", "16", "--decode-threads", "1", "--quiet"]
    pinned = ["taskset", "-c", "0" if n == 1 else "0,1", sys.executable]
    commands = {
        "torchrun": [["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, *extract]],
        "--part": [[*extract, "--part", f"{i}/{n}"] for i in range(n)],
        "ray": [[*extract, "--engine", "ray", "--workers", n]],
    }[how]
    processes = [
        subprocess.Popen([str(word) for word in (*pinned, *command)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command in commands
    ]  # fmt: skip
    for process in processes:
        _, error = process.communicate()
        if process.returncode:
            raise RuntimeError(error.decode())
    lines = [json.loads(line) for file in (output / "log").iterdir() for line in file.read_text().splitlines()]
    return max(line["at"] for line in lines) - min(line["at"] - line["seconds"]["whole"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["vits16", "vitb16"])
    parser.add_argument("--pictures", type=int, default=512, help="small ones; a quarter as many large ones")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="add rows and contenders to those that are there")
    parser.add_argument("--workers", action="store_true", help="measure two workers against one instead")
    parser.add_argument("--dry", action="store_true", help="print only, write no results")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {0})
        name, photos, checkpoint = args.run
        print(json.dumps(CONTENDERS[name](Path(photos), Path(checkpoint), getattr(torch, args.dtype))))
        return
    name = "extract" if args.dtype == "float32" else f"extract_{args.dtype}"
    with tempfile.TemporaryDirectory() as folder:
        if args.workers:
            result = {"environment": environment("ray"), "pictures": args.pictures}
            result |= workers(Path(folder), args.pictures, args.rounds)
            print(headline(result), workers_table(result), sep="\n\n")
        else:
            counts = {size: args.pictures if size == "500 x 375" else args.pictures // 4 for size in args.sizes}
            result = {"environment": environment("timm", "pillow", "simplejpeg")}
            result["rows"] = measure(Path(folder), args.variants, counts, args.contenders, args.rounds, args.dtype)
            if args.add and (before := RESULTS / f"{name}.json").exists():
                result = add(result, json.loads(before.read_text()))
            print(headline(result), table(result), sep="\n\n")
    if not args.dry:
        save("extract_workers" if args.workers else name, result)


if __name__ == "__main__":
    main()
