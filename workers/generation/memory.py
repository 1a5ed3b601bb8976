"""What the C library and the kernel are told about a loaded model's memory. Linux with glibc; elsewhere these do nothing."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

# glibc's mallopt(3) and the kernel's madvise(2).
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
HUGE_PAGES = 14
PAGE = 2 << 20  # bytes of a huge one
# Smaller regions are threads' stacks and Python's own.
LEAST = 32 << 20
# Most bytes that a freed block keeps for the next step; a step's logits are the largest.
KEPT = 1 << 28


def settle() -> None:
    """Make the memory of a model that has just been loaded small and fast.

    What was freed, above all the weights as they were read, goes back. What stays may go on huge pages: a step reads all of it,
    and is 3 to 10 % faster so. The kernel does that in the background: to ask for it at once (MADV_COLLAPSE) made a start of
    10 s one of 16. Blocks that a step frees are kept for the next: 25 MB of new pages cost 6,000 faults.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc, not Linux
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        for start, end in regions():
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), HUGE_PAGES)
        libc.mallopt(TRIM_THRESHOLD, KEPT)
        libc.mallopt(MMAP_THRESHOLD, KEPT)


def regions() -> Iterator[tuple[int, int]]:
    """Yield the address ranges, in whole huge pages, of this process's large private memory that is of no file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in span.split("-"))
        if access == "rw-p" and inode == "0" and end - start >= LEAST:
            yield -(-start // PAGE) * PAGE, end // PAGE * PAGE
