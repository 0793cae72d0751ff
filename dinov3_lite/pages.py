"""Mapped files, and memory that goes back to the system: their pages, short-lived copies, a heap's holes."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

TOP = slice(7 if sys.byteorder == "little" else 0, None, 8)  # of each entry of a pagemap the byte with its flags
OF_A_FILE = 1 << 61 - 56  # Documentation/admin-guide/mm/pagemap.rst
MADV_DONTNEED = 4
MAP_NORESERVE = 0x4000  # Python's mmap has no name for it
LARGE = 1 << 17  # bytes, as of the C library's own mappings


def mapped(file: Path) -> mmap.mmap:
    """The bytes of a file as memory: pages are read when first used, and what is written to them stays in memory.

    On Linux the file may be larger than the memory.
    """
    with file.open("rb") as f:
        if sys.platform.startswith("linux"):
            flags, prot = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(f.fileno(), 0, flags=flags, prot=prot)
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)


def view(data: mmap.mmap, dtype: torch.dtype, start: int, count: int) -> Tensor:
    """The `count` numbers from byte `start` of a mapped file on; copied where they are at no multiple of their size."""
    if not count:
        return torch.empty(0, dtype=dtype, device="cpu")
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start)
    return flat.clone() if start % dtype.itemsize else flat


def give_back(tensor: Tensor) -> bool:
    """Let go of the whole pages that a tensor lies in, if all are of a mapped file and none was written to.

    Returns whether they are: such a tensor takes no memory until it is read again. Memory of any other kind, and
    all of it outside Linux, stays as it is.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    page = mmap.PAGESIZE
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // page), stop // page  # the pages at both ends may hold other tensors
    if first >= last:
        return False
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            entries = file.read(8 * (last - first))
    except OSError:
        return False
    # a page that was written to is private memory, not the file's; one that is absent may be in the swap
    flags = set(entries[TOP]) - {0}
    if len(entries) < 8 * (last - first) or not flags or not all(flag & OF_A_FILE for flag in flags):
        return False
    address, size = ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page)
    return not _c_library().madvise(address, size, MADV_DONTNEED)


def give_back_heap() -> None:
    """Have the C library return to the system what lies free between what is in use, where it can (glibc)."""
    if sys.platform.startswith("linux") and (trim := getattr(_c_library(), "malloc_trim", None)) is not None:
        trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of the CPU whose memory the system has back with the last reference.

    What the C library's heap has back lies between what came later, and fits nothing of another size.
    """
    count = math.prod(shape)
    if not hasattr(mmap, "MAP_ANONYMOUS") or count * dtype.itemsize < LARGE:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))
