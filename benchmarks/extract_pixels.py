"""What the faster ways to a resized picture change in features: against float32 resizing of the whole picture.

    python benchmarks/extract_pixels.py [--variants vits16 vitb16]

For pictures of three sizes, resized to 224 px, the relative difference of the CLS token and of the patch tokens (median
of the pictures) and the least cosine between CLS tokens. Beside them, what storing in float16 and computing in bfloat16
change. Writes benchmarks/results/extract_pixels.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment, headline, save
from extract import write_photos
from peers import write_checkpoint
from timing import relative_difference

from dinov3_lite.extraction.engines import extract

SIZES = {"500 x 375": (500, 375), "1600 x 1200": (1600, 1200), "4000 x 3000": (4000, 3000)}
WAYS: dict[str, dict[str, Any]] = {
    "--store float16": {"store": "float16"},
    "--resize uint8": {"resize": "uint8"},
    "--scaled-decoding": {"scaled_decoding": True},
    "--dtype bfloat16": {"dtype": "bfloat16"},
}
OUTPUTS = ("cls_token", "patch_tokens")


def measure(root: Path, variants: list[str], pictures: int) -> list[dict[str, Any]]:
    rows = []
    for size, pixels in SIZES.items():
        write_photos(root / size, pictures, pixels)
    for variant in variants:
        checkpoint = write_checkpoint(root / variant, variant)
        (checkpoint / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 224, "width": 224}}))
        for size in SIZES:

            def features(size: str = size, checkpoint: Path = checkpoint, **options: Any) -> list[torch.Tensor]:
                with tempfile.TemporaryDirectory() as output:
                    options = {"store": "float32", "device": "cpu", "progress": False, "batch_size": 8, **options}
                    store = extract(root / size, checkpoint, output, outputs=OUTPUTS, **options)
                    return [torch.from_numpy(np.asarray(store[name]).astype(np.float32)) for name in OUTPUTS]

            exact = features()
            for way, options in WAYS.items():
                found = features(**options)
                differences = [
                    statistics.median(relative_difference(a, b) for a, b in zip(some, others, strict=True))
                    for some, others in zip(found, exact, strict=True)
                ]
                cosine = torch.nn.functional.cosine_similarity(found[0].double(), exact[0].double()).min().item()
                rows.append(
                    {"variant": variant, "size": size, "way": way, "cls_token": differences[0],
                     "patch_tokens": differences[1], "least_cosine": cosine}
                )  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    lines = ["| | picture | option | CLS token | patch tokens | least cosine |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['variant']} | {row['size']} | `{row['way']}` | {row['cls_token']:.1e} | {row['patch_tokens']:.1e} "
            f"| {row['least_cosine']:.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["vits16", "vitb16"])
    parser.add_argument("--pictures", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {"environment": environment("pillow", "simplejpeg"), "pictures": args.pictures}
        result["rows"] = measure(Path(folder), args.variants, args.pictures)
    save("extract_pixels", result)
    print(headline(result), table(result), sep="\n\n")


if __name__ == "__main__":
    main()
