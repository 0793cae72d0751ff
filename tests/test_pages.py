"""Where Linux gives pages of 2 MiB to who asks, packed weights and activations lie in them, and nothing else does."""

from __future__ import annotations

import mmap
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, run_python, write_checkpoint

from dinov3_lite import pages
from dinov3_lite.pages import HUGE, HUGE_PAGES, to_huge_pages

# where it is "always", what is asked for can't be told from what is not
pytestmark = pytest.mark.skipif(
    not (HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text() and mmap.PAGESIZE == 4096),
    reason="asks Linux for huge pages, which here it gives to nobody, or unasked",
)

HEAP = f"""
import re, sys, torch
sys.path[:0] = {sys.path!r}
def huge(heap=True):
    "MiB of huge pages in the C library's heap, or in all that is no file's."
    text = open("/proc/self/smaps").read()
    sizes = re.findall(r"^[0-9a-f]+-.*?(\\[heap\\])?$(?:\\n\\w+: .*)*?\\nAnonHugePages: +(\\d+)", text, re.M)
    return sum(int(size) for name, size in sizes if name or not heap) / 1024
"""


def huge_mib() -> float:
    """How much of this process's memory lies in huge pages."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"AnonHugePages: +(\d+)", text)[1]) / 1024


def moved(address: int, size: int, expected: float) -> bool:
    """Whether so many MiB are in huge pages then; the system may refuse what is in use at that moment."""
    for _ in range(10):
        to_huge_pages(address, size)
        if huge_mib() == expected:
            return True
    return False


def test_blocks_that_lie_in_memory_move_into_huge_pages():
    """Four blocks of 2 MiB: one whole, one half there, one with 20 pages missing, one whole again. Of the last, the
    range has the first byte alone.
    """
    memory = mmap.mmap(-1, 6 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    start = -data.data_ptr() % HUGE
    for first, last in ((0, HUGE), (HUGE, HUGE + HUGE // 2), (2 * HUGE + 20 * 4096, 4 * HUGE)):
        data[start + first : start + last] = 7
    for block, added in enumerate((2.0, 0.0, 2.0)):
        already = huge_mib()
        assert moved(data.data_ptr() + start + block * HUGE + 5, HUGE - 10, already + added), block
    assert moved(data.data_ptr() + start + 3 * HUGE, 1, already + 4.0)
    expected = torch.full((4 * HUGE,), 7, dtype=torch.uint8)
    expected[HUGE + HUGE // 2 : 2 * HUGE + 20 * 4096] = 0
    assert torch.equal(data[start : start + 4 * HUGE], expected)


def test_a_system_that_gives_none_is_not_asked(tmp_path, monkeypatch):
    never = tmp_path / "enabled"
    never.write_text("always madvise [never]\n")
    monkeypatch.setattr(pages, "HUGE_PAGES", never)
    pages._gives_huge_pages.cache_clear()
    monkeypatch.setattr(pages, "_advise", lambda *_: pytest.fail("the system was asked"))
    data = torch.zeros(4 * HUGE, dtype=torch.uint8)
    to_huge_pages(data.data_ptr(), 4 * HUGE)
    pages.huge_pages_ahead()
    pages._gives_huge_pages.cache_clear()


def test_addresses_that_nothing_lies_at():
    to_huge_pages(0, 1)
    to_huge_pages(1 << 46, HUGE)


@pytest.mark.parametrize(("grad", "least", "most"), [(False, 10.0, 64.0), (True, 0.0, 0.0)])
def test_activations_lie_in_huge_pages_where_nobody_differentiates(grad, least, most, tmp_path):
    folder = write_checkpoint(tmp_path / "model", replace(TINY, hidden_size=384, num_attention_heads=6))
    code = f"""{HEAP}
import dinov3_lite
model = dinov3_lite.load({str(folder)!r})
with torch.set_grad_enabled({grad}):
    model(torch.randn(4, 3, 256, 256))
print(huge())
"""
    for _ in range(3):  # the system may refuse a huge page for a moment
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        if float(done.stdout) >= least:
            break
    assert least <= float(done.stdout) <= most


def test_packed_weights_lie_in_huge_pages(tmp_path):
    config = replace(TINY, hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=4)
    folder = write_checkpoint(tmp_path / "model", config)
    code = f"""{HEAP}
import dinov3_lite
if not hasattr(torch.ops.mkldnn, "data_ptr"):
    sys.exit()
class Packed(dict):
    def get(self, question, default=None):
        return "onednn" if question.startswith("product") else default
fast = dinov3_lite.optimize_for_inference(dinov3_lite.load({str(folder)!r}), choices=Packed())
with torch.no_grad():
    fast(torch.randn(1, 3, 32, 32))
weights = 4 * 12 * 768 * 768 * 4 / 2**20
assert huge(heap=False) > 0.8 * weights, (huge(heap=False), weights)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
