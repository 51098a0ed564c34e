"""A batch that does not fit into memory is cut in two, and each half again if need be, and nothing is counted twice."""

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from ultravox.errors import DataError
from ultravox.training.memory import make_room
from ultravox.training.task import Batch

B = TypeVar("B", bound=Batch)
T = TypeVar("T")

#: How libraries say that there is no memory, where they have no error of their own for it.
_SAYINGS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "out_of_memory",
    "std::bad_alloc",
    "can't start new thread",
    "could not create a primitive",  # oneDNN, which gives no other reason; its shapes were right in smaller batches
    "could not create a memory object",
    "could not execute a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's, NumPy's, PyTorch's on a CPU or GPU, oneDNN's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(saying in str(error).lower() for saying in _SAYINGS)


def run_with_splitting(
    loss_and_backward: Callable[[B], T],
    batch: B,
    split: Callable[[B], Sequence[B]],
    on_split: Callable[[B, Sequence[B]], None],
    *,
    parameters: Iterable[nn.Parameter],
) -> list[T]:
    """Run a batch forwards and backwards; out of memory, do its halves one after the other instead.

    Losses and counts are sums, so that those of the halves add up to those of the batch, and so do the gradients. What
    a failed attempt has put into some of them is thrown away: gradients from before are laid aside during each attempt,
    and added only once it is through. That needs no copy of them, and rounds as adding them in place does.

    Args:
        loss_and_backward: adds to the gradients and returns what is to be kept, with no graph behind it.
        batch: of at least one example.
        split: a batch → two or more with the same examples in the same order; one example alone is never given to it.
        on_split: is told of each split, before the parts run.
        parameters: all whose gradients `loss_and_backward` adds to.

    Returns: what it returned for the batch, or for each part in order.

    Raises:
        DataError: a single example does not fit; names it.
    """
    parameters = list(parameters)
    waiting, done = [batch], []
    while waiting:
        part = waiting.pop(0)
        results = _attempt(loss_and_backward, part, parameters)
        if results:
            done += results
            continue
        _collect()
        if len(part.ids) == 1:
            raise DataError(
                f"{part.ids[0]} alone does not fit into memory: lower data.max_audio_seconds so that it is left out, "
                f"or train on a machine with more memory"
            )
        parts = list(split(part))
        on_split(part, parts)
        waiting = parts + waiting
    return done


def _attempt(loss_and_backward: Callable[[B], T], batch: B, parameters: Sequence[nn.Parameter]) -> list[T]:
    """One result; none where memory ran out, the gradients then being what they were before.

    A function of its own: with the error go its frames, which hold the graph.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        result = loss_and_backward(batch)
    except Exception as error:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        if not is_out_of_memory(error):
            raise
        return []
    with torch.no_grad():
        for parameter, gradient in zip(parameters, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
    return [result]


def _collect() -> None:
    """Give back what the failed attempt has left."""
    gc.collect()
    make_room()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
