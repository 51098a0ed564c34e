"""What the C library does with memory that is freed: training frees and wants the same gigabytes in every step."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Keep what is freed for the next step: the system takes a good part of a step to hand the pages out again.

    Does nothing where the C library is not GNU's. `release_freed_memory` gives the pages back when that is wanted.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)  # or large blocks, such as logits, would be mapped anew each time
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Give all pages that are not in use back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
