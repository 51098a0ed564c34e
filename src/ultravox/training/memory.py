"""What the C library does with memory that is freed: training frees and wants the same gigabytes in every step."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

#: Blocks from this size on are mapped anew each time; the largest that the library takes.
_LARGEST_HEAP_BLOCK = 32 * 1024 * 1024


def keep_freed_memory() -> None:
    """Keep what is freed for the next step: the system takes up to a fifth of a step to hand the pages out again.

    Does nothing where the C library is not GNU's. `release_freed_memory` gives the pages back when that is wanted.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Give all pages that are not in use back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
