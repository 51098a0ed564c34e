"""The processes of one run, as torchrun and every launcher like it tells of them: by environment variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ultravox.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine."""


def ranks_of_environment() -> Ranks:
    """What torchrun has set, or one process by itself where it has set nothing.

    Raises:
        ConfigError: some of its variables are missing, or are no such numbers.
    """
    found = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    if "WORLD_SIZE" not in found and "RANK" not in found:
        return Ranks()
    if missing := [name for name in NAMES if name not in found]:
        raise ConfigError(
            f"{', '.join(sorted(found))} are set, but {', '.join(missing)} is not: start with torchrun, which sets "
            f"all of {', '.join(NAMES)}, or unset them for one process"
        )
    try:
        rank, world_size, local_rank = (int(found[name]) for name in NAMES[:3])
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers, got {found}: {error}") from error
    if not 0 <= rank < world_size or local_rank < 0:
        raise ConfigError(f"RANK {rank}, LOCAL_RANK {local_rank} and WORLD_SIZE {world_size} do not fit together")
    return Ranks(rank, world_size, local_rank)


def is_main_process() -> bool:
    """Whether this process speaks for the run, as far as the environment says."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Meet the other processes, for the block: over NCCL on GPUs, over gloo otherwise.

    What takes longer than `timeout_seconds` in a collective call is an error on those who wait.
    """
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(seconds=timeout_seconds)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def in_turn(rank: int, world_size: int, most_seconds: float = 86_400.0) -> Iterator[None]:
    """The first rank runs the block, then the others: what it leaves in the cache they find. Waits long, by the store.

    A collective call would time out while hours of speech are encoded.
    """
    if world_size == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    name = f"ultravox/in_turn/{_next_turn()}"
    if rank:
        store.wait([name], timedelta(seconds=most_seconds))
    yield
    if not rank:
        store.set(name, "done")


_turns = 0


def _next_turn() -> int:
    """How often `in_turn` was used before in this process; the same on all ranks, which do the same."""
    global _turns
    _turns += 1
    return _turns
