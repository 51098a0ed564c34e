"""What the C library does with memory that is freed: training frees and wants the same gigabytes in every step."""

import contextlib
import ctypes
import mmap

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8

#: Addresses that are held back for what must be made when memory runs out: compiled products, a thread's stack. No page
#: of them is ever touched, so they take no memory; they count where a process's size is bounded (`ulimit -v`).
RESERVE_BYTES = 64 << 20
_reserve: list[mmap.mmap] = []


def keep_freed_memory() -> None:
    """Keep what is freed for the next step: the system takes a good part of a step to hand the pages out again.

    Does nothing where the C library is not GNU's. `release_freed_memory` gives the pages back when that is wanted.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)  # or large blocks, such as logits, would be mapped anew each time
        library.mallopt(_M_TRIM_THRESHOLD, -1)
        if not _reserve:
            _reserve.append(mmap.mmap(-1, RESERVE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0))


def release_freed_memory() -> None:
    """Give all pages that are not in use back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def empty_cache(device: torch.device) -> None:
    """Give back what a device's allocator, or the C library, holds without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        release_freed_memory()


def make_room() -> None:
    """After memory ran out: give back what can be, and from now on large blocks as soon as they are freed.

    Kept ones would hold all the addresses that a process may have, and leave none to what is not the C library's.
    """
    while _reserve:
        _reserve.pop().close()
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_M_MMAP_MAX, 1 << 15)  # half of what Linux lets a process map
        library.mallopt(_M_TRIM_THRESHOLD, 1 << 20)
        library.mallopt(_M_ARENA_MAX, 1)  # a further one would take 64 MB of addresses for each new thread
        library.malloc_trim(0)
