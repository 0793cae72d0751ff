"""What memory is made of: mapped files, what goes back to the system, and pages of 2 MiB where Linux gives them."""

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
OF_A_FILE, PRESENT = 1 << 61 - 56, 1 << 63 - 56  # Documentation/admin-guide/mm/pagemap.rst
MADV_DONTNEED, MADV_HUGEPAGE, MADV_COLLAPSE = 4, 14, 25
HUGE = 1 << 21  # bytes of a huge page
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAP_NORESERVE = 0x4000  # Python's mmap has no name for it
LARGE = 1 << 17  # bytes, as of the C library's own mappings
# bytes of a block whose end still raises the C library's bounds, with its own beside it
LARGEST = (1 << 25) - (1 << 13)
AHEAD = (LARGEST, 3 << 23)  # together less than the 64 MiB that the heap keeps free at its end


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
    # a page that was written to is private memory, not the file's; one that is absent may be in the swap
    flags = set(_page_flags(first, last)) - {0}
    return bool(flags) and all(flag & OF_A_FILE for flag in flags) and _advise(first * page, last * page, MADV_DONTNEED)


def _page_flags(first: int, last: int) -> bytes:
    """Those of each page from the first up to the last, by numbers of pages; none where the system does not tell."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            flags = file.read(8 * max(last - first, 0))[TOP]
    except OSError:
        return b""
    return flags if len(flags) == last - first else b""


def _advise(start: int, stop: int, advice: int) -> bool:
    """madvise(2) for the whole pages between two addresses: whether the system takes it."""
    page = mmap.PAGESIZE
    start, stop = -(-start // page) * page, stop // page * page
    return not _c_library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


def give_back_heap() -> None:
    """Have the C library return to the system what lies free between what is in use, where it can (glibc)."""
    if sys.platform.startswith("linux") and (trim := getattr(_c_library(), "malloc_trim", None)) is not None:
        trim(0)


@functools.cache
def keep_heap() -> None:
    """Have the C library keep up to 64 MiB that are freed at its heap's end for what comes next, where it can (glibc).

    It keeps little unless a program has freed larger blocks before: between two blocks of a network gigabytes a second
    would go to the system and come back page by page. What raises its bounds is one freed block of 32 MiB, which takes
    no memory, since nobody writes to it. Bounds that the user has set (`MALLOC_TRIM_THRESHOLD_`) stay.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")


def huge_pages_ahead() -> None:
    """Have what this thread takes next from the C library's heap, up to 56 MiB, lie in pages of 2 MiB.

    Linux gives them to who asks where `HUGE_PAGES` says "madvise". A processor knows the places of some thousand pages,
    and looks up those of the others: of small pages, for every 4 KiB that a product reads, and in a virtual machine in
    the tables of two systems. Nothing is taken now.
    """
    if _gives_huge_pages():
        malloc, free = _c_library().malloc, _c_library().free
        blocks = [(malloc(ctypes.c_size_t(size)), size) for size in AHEAD]
        for address, size in blocks:
            if address:
                _advise(address, address + size, MADV_HUGEPAGE)
            free(ctypes.c_void_p(address))


def to_huge_pages(address: int, size: int) -> None:
    """Move into huge pages, now, those blocks of 2 MiB that a range has a part in and that lie in memory.

    Of such a block a sixteenth may be missing, so that little memory is added. Each takes the system some milliseconds.
    """
    if not _gives_huge_pages():
        return
    each = HUGE // mmap.PAGESIZE
    first, last = address // HUGE, -(-(address + size) // HUGE)
    flags = _page_flags(first * each, last * each)
    for i in range(len(flags) // each):
        present = sum(flag & PRESENT > 0 for flag in flags[i * each : (i + 1) * each])
        start = (first + i) * HUGE
        if 16 * present >= 15 * each and _advise(start, start + HUGE, MADV_HUGEPAGE):
            _advise(start, start + HUGE, MADV_COLLAPSE)


@functools.cache
def _gives_huge_pages() -> bool:
    """Whether there are huge pages for who asks: a system may be told to give none, which not all requests respect."""
    return HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text()


@functools.cache
def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc"):
        library.malloc.restype = ctypes.c_void_p
    return library


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of the CPU whose memory the system has back with the last reference.

    What the C library's heap has back lies between what came later, and fits nothing of another size.
    """
    count = math.prod(shape)
    if not hasattr(mmap, "MAP_ANONYMOUS") or count * dtype.itemsize < LARGE:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))
