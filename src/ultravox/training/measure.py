"""Memory, and the machine's own matrix-multiplication rate, which training speed is held against."""

import itertools
import math
import os
import resource
import sys
import time
from collections.abc import Callable

import torch

from ultravox.model.kernels import matmul_transposed, uses_onednn

#: Matrices of the rate's measurement: large enough to be bound by arithmetic, not by memory.
MATMUL_SIZE = 1536


def memory_bytes() -> int:
    """Resident memory of this process now, in bytes (its peak where the system tells no more)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def matmul_flop_rate(seconds: float = 0.5) -> float:
    """FLOP per second of an fp32 matrix product on this machine: the best of about `seconds`, by the faster library.

    The best, since other processes can only slow it down: what training is held against should not profit from them.
    """
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
    if uses_onednn(a):
        products.append(lambda: matmul_transposed(a, b))
    best = math.inf
    for product in products:
        product()
        end = time.perf_counter() + seconds / len(products)
        for count in itertools.count():
            if count >= 3 and time.perf_counter() >= end:
                break
            start = time.perf_counter()
            product()
            best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best
