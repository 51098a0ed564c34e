"""The seam between training and the processes that share it. What an engine does not say, the loop need not know.

A step is the same everywhere: each rank runs its micro-batches forwards and backwards (`backward`), which adds up sums
of losses; what the ranks counted is put together (`gather`); their gradients are added (`reduce`); and each rank
divides by the common count and updates what it holds. So the number of ranks changes no number beyond rounding.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Engine:
    """One process by itself. The others change what differs."""

    kind = "single"
    device = torch.device("cpu")
    rank = 0
    world_size = 1
    timeout_seconds = 600.0
    """Longest wait for another rank, and longest step, where there are others."""
    is_sharded = False
    """Whether forward passes are collective: each rank must run as many, in the same order, or all hang."""

    saves_parts = False
    """Whether each rank writes its own part of a checkpoint."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and speaks."""
        return self.rank == 0

    def prepare(self, model: nn.Module) -> None:
        """Take over a model that is built and has its weights, before anything is trained."""

    def backward(self, total: Tensor) -> None:
        """Add the gradient of a scalar sum to what is there."""
        total.backward()

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """After the last micro-batch of a step: make each gradient the sum over all ranks, of what this rank holds."""

    def gather(self, value: T) -> list[T]:
        """What each rank gave, in the ranks' order. All ranks must call it."""
        return [value]

    def sum(self, value: float) -> float:
        """The sum over all ranks, in the same order everywhere, so that all get the same bits."""
        return float(sum(self.gather(value)))

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside the block each rank has all weights, and its forward passes are its own affair."""
        yield

    def snapshot(self, read: Callable[[], dict[str, Tensor]], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
        """What `read` gives, which looks at these parameters: while it does, they are there, as shards or whole."""
        return read()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around what must not take for ever: a step's batches, passes and exchanges."""
        yield


def describe(engine: Engine) -> dict[str, Any]:
    """For a run's summary."""
    return {"kind": engine.kind, "world_size": engine.world_size, "device": engine.device.type}
