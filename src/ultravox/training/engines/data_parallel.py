"""Data parallel: each rank holds everything, and gradients are added up once a step.

They are added after the last micro-batch and not while it runs backwards, as
`torch.nn.parallel.DistributedDataParallel` does, which wraps one forward function and wants as many passes on every
rank, with the same parameters in use. Here a rank may have text alone, nothing at all, or a batch in halves, and an
adapter's gradients are soon sent. Sums travel in float32, in buckets.
"""

import faulthandler
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultravox.errors import UltravoxError
from ultravox.training.engines.base import Engine
from ultravox.training.engines.ranks import Ranks
from ultravox.training.engines.shards import is_shard

T = TypeVar("T")

BUCKET_NUMBERS = 1 << 23
"""32 MB of float32 in one message."""


class DataParallelEngine(Engine):
    """Replicas, whose gradients are added."""

    kind = "ddp"

    def __init__(self, ranks: Ranks, timeout_seconds: float, device: torch.device) -> None:
        """Args:
        ranks: the processes.
        device: of this one.
        timeout_seconds: a step that takes longer ends this process, and so the run.
        """
        self.rank, self.world_size, self.timeout_seconds = ranks.rank, ranks.world_size, timeout_seconds
        self.device = device

    def prepare(self, model: nn.Module) -> None:
        """See `Engine`; the replicas must begin alike.

        Raises:
            UltravoxError: they do not.
        """
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sums = self.gather([float(parameter.detach().double().sum()) for parameter in trainable])
        if any(found != sums[0] for found in sums):
            raise UltravoxError(
                "the ranks begin with different weights: do all read the same configuration and models?"
            )

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Engine`. What a rank has no gradient of counts as zeros, unless no rank has one."""
        plain = [parameter for parameter in parameters if not is_shard(parameter)]
        here = [parameter.grad is not None for parameter in plain]
        there = self.gather(here)
        used = [parameter for index, parameter in enumerate(plain) if any(flags[index] for flags in there)]
        for bucket in _buckets(used):
            flat = torch.cat([_gradient(parameter).float().reshape(-1) for parameter in bucket])
            with self._company():
                dist.all_reduce(flat)
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def gather(self, value: T) -> list[T]:
        """See `Engine`."""
        found: list[T | None] = [None] * self.world_size
        with self._company():
            dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    @contextmanager
    def _company(self) -> Iterator[None]:
        """Around an exchange. UltravoxError: another rank is gone, or does not come."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UltravoxError(
                f"rank {self.rank} waited in vain for the other ranks, one of which has ended or is stuck; see what "
                f"they said ({reason})"
            ) from error

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Engine`: past the timeout the stacks of all threads are printed, and this process ends.

        Of a rank that is stuck outside of an exchange, the others would only tell that they wait.
        """
        faulthandler.dump_traceback_later(self.timeout_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, each of at most `BUCKET_NUMBERS` numbers or of a single parameter."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
