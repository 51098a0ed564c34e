"""A bound on the memory of each process, at which a run ends by itself, with a checkpoint.

The system ends a process that takes too much without a word, and what was learnt since the last checkpoint is lost.
"""

import os

import torch

from ultravox.errors import ConfigError
from ultravox.training.engines.base import Engine
from ultravox.training.measure import memory_bytes


def own_memory_bytes() -> int:
    """Resident memory of this process, in bytes, without the pages of mapped files, which the system can take back.

    All of it where the system does not tell them apart.
    """
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return memory_bytes()
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class MemoryGuard:
    """Says when a rank has more memory than it is to have."""

    def __init__(self, max_memory_gb: float | None, engine: Engine) -> None:
        """Args:
        max_memory_gb: 10^9 bytes that the process may have, and its GPU as many; None = no bound.
        engine: of the rank.
        """
        self._most, self._engine = max_memory_gb, engine

    def excess(self) -> str | None:
        """Which memory of this rank is above the bound now, in words; None = none is."""
        if self._most is None:
            return None
        found = {"": own_memory_bytes()}
        if self._engine.device.type == "cuda":
            found[" of its GPU"] = torch.cuda.memory_reserved(self._engine.device)
        who = "the process" if self._engine.world_size == 1 else f"rank {self._engine.rank}"
        for of_what, size in found.items():
            if size > self._most * 1e9:
                return f"{who} has {size / 1e9:.2f} GB{of_what}, more than engine.max_memory_gb = {self._most:g}"
        return None

    @classmethod
    def with_room(cls, max_memory_gb: float | None, engine: Engine) -> "MemoryGuard":
        """A bound that leaves room beside models and data, or each start would be one step. Collective.

        Raises:
            ConfigError: on all ranks, if one has more already.
        """
        guard = cls(max_memory_gb, engine)
        found = [text for text in engine.gather(guard.excess()) if text] if max_memory_gb is not None else []
        if found:
            raise ConfigError(f"{found[0]}, before the first step: raise it, or share the model (engine.kind fsdp2)")
        return guard
