"""Memory, and the machine's own matrix-multiplication rate, which training speed is held against."""

import itertools
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

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


def memory_in_use() -> dict[str, int]:
    """Resident memory of this process, and the most that was allocated on its GPU, for the log; in bytes."""
    found = {"memory_bytes": memory_bytes()}
    if torch.cuda.is_initialized():
        found["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def matmul_flop_rate(seconds: float = 0.5) -> float:
    """FLOP per second of an fp32 matrix product on this machine: the best of about `seconds`, by the faster library."""
    return MatmulRate(seconds).best


class MatmulRate:
    """FLOP per second of an fp32 matrix product, at its best and over a stretch of time.

    A machine that others share, or that grows warm, is not equally fast all the time. What training is held against is
    therefore the rate of the same minutes: a sample every few steps.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)  # a generator of its own: the run's draws nothing for this
        a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, generator=generator)
        products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
        if uses_onednn(a):
            products.append(lambda: matmul_transposed(a, b))
        bests = []
        for product in products:
            product()
            end = time.perf_counter() + seconds / len(products)
            best = _seconds(product)
            for count in itertools.count(1):
                if count >= 3 and time.perf_counter() >= end:
                    break
                best = min(best, _seconds(product))
            bests.append(best)
        self._fastest = min(bests)
        self._product = products[bests.index(self._fastest)]
        self._samples: list[float] = []

    def sample(self) -> None:
        """Look at the rate now; takes the time of four products, the first of which brings the matrices near."""
        self._product()
        times = [_seconds(self._product) for _ in range(3)]
        self._samples.append(statistics.median(times))
        self._fastest = min(self._fastest, *times)

    @property
    def best(self) -> float:
        """Of the fastest product."""
        return 2 * MATMUL_SIZE**3 / self._fastest

    @property
    def usual(self) -> float:
        """Over all samples: what they computed by the time that it took. ValueError before the first."""
        return 2 * MATMUL_SIZE**3 / statistics.mean(self._samples)

    def shares(self, num_parameters: int, num_tokens: int, seconds: float) -> dict[str, float]:
        """What train.json says of a stage that read so many tokens through a frozen model of so many parameters."""
        self.sample()
        # 2 N for the forward pass and 2 N for the gradient of its input; a frozen weight has no gradient of its own.
        rate = 4 * num_parameters * num_tokens / max(seconds, 1e-9)
        return {
            "num_matmul_parameters": num_parameters,
            "matmul_flop_rate": self.best,
            "matmul_utilisation": rate / self.best,
            "usual_matmul_flop_rate": self.usual,
            "utilisation_of_usual": rate / self.usual,
            "num_matmul_samples": len(self._samples),
        }


class MatmulSamples:
    """Looks at the machine's own rate while a stage runs: now and then, for less than 1% of its time."""

    EVERY = 10  # steps

    def __init__(self, matmul: MatmulRate) -> None:
        self.matmul = matmul

    def on_step(self, record: Any) -> None:
        if record.step % self.EVERY == 0:
            self.matmul.sample()

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        pass


def _seconds(product: Callable[[], object]) -> float:
    start = time.perf_counter()
    product()
    return time.perf_counter() - start
