"""The ways in which a CPU attends, beside each other: medians of interleaved rounds, errors against float64.

    python benchmarks/attention_ways.py [--heads 12] [--rounds 15] [--save attention_ways]

Queries and keys lie as the rotation leaves them, values as in a fused projection. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from environment import environment, headline, save
from timing import interleaved, relative_difference, spread
from torch import Tensor

from dinov3_lite.attention_ways import ATTENTIONS, ways_of_attention
from dinov3_lite.pages import keep_heap

SIZES = ((1, 201), (8, 201), (1, 581), (1, 1029), (1, 4101))  # images, tokens: 224, 384, 512 and 1024 px
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", default="attention_ways", metavar="NAME")
    args = parser.parse_args()
    keep_heap()  # as every model does
    result = {"environment": environment(), "heads": args.heads, "rows": measure(args.heads, args.rounds)}
    save(args.save, result)
    print(headline(result), table(result), sep="\n\n")


@torch.inference_mode()
def measure(heads: int, rounds: int) -> list[dict]:
    """Seconds of every way in each round, and its relative error, at each size and dtype."""
    rows = []
    for dtype in DTYPES:
        for images, tokens in SIZES:
            q, k, v = made(images, tokens, heads, dtype)
            truth = ATTENTIONS["sdpa"](q.double(), k.double(), v.double())
            calls = {way: partial(ATTENTIONS[way], q, k, v) for way in ways_of_attention(dtype)}
            errors = {way: relative_difference(call(), truth) for way, call in calls.items()}
            seconds = interleaved(calls, max(3, rounds * 1000 // max(1000, tokens)))
            name = str(dtype).removeprefix("torch.")
            rows.append({"dtype": name, "images": images, "tokens": tokens, "error": errors, "seconds": seconds})
    return rows


def made(images: int, tokens: int, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (images, tokens, heads, 64)."""
    q, k, v = torch.randn(images, tokens, 3, heads, 64, dtype=dtype).unbind(2)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    return q, k, v


def table(result: dict) -> str:
    """Milliseconds with quartiles, and in brackets the error in units of the fused kernel's."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        ways = list(rows[0]["seconds"])
        lines += [f"| {dtype} | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
        for row in rows:
            cells = [f"{spread(row['seconds'][w])} [{row['error'][w] / row['error']['sdpa']:.1f}]" for w in ways]
            lines.append(f"| {row['images']} x {row['tokens']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
