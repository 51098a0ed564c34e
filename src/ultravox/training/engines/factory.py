"""From the configuration and the environment to an engine."""

from collections.abc import Iterator
from contextlib import contextmanager

from ultravox.config.engine import EngineConfig
from ultravox.errors import ConfigError
from ultravox.training.engines.base import Engine
from ultravox.training.engines.device import choose_device
from ultravox.training.engines.ranks import process_group, ranks_of_environment


@contextmanager
def build_engine(config: EngineConfig, device_name: str = "cpu") -> Iterator[Engine]:
    """The engine, in company for the block.

    Raises:
        ConfigError: the processes that there are do not fit the kind that is asked for; or see `choose_device`.
    """
    ranks = ranks_of_environment()
    device = choose_device(device_name, ranks.local_rank)
    kind = ("single" if ranks.world_size == 1 else "ddp") if config.kind == "auto" else config.kind
    if kind == "single":
        if ranks.world_size > 1:
            raise ConfigError(
                f"engine.kind is single, but the launcher started {ranks.world_size} processes, each of which would "
                "train all by itself: choose ddp, fsdp2, zero2 or zero3, or start one process"
            )
        engine = Engine()
        engine.device = device
        yield engine
        return
    if ranks.world_size == 1:
        raise ConfigError(
            f"engine.kind {kind} shares a run between processes, but there is one: start it with `torchrun "
            "--nproc-per-node N -m ultravox train …`, or choose single"
        )
    with process_group(ranks, device, config.timeout_seconds):
        if kind == "ddp":
            from ultravox.training.engines.data_parallel import DataParallelEngine

            yield DataParallelEngine(ranks, config.timeout_seconds, device)
        elif kind in ("zero2", "zero3"):
            from ultravox.training.engines.zero import ZeroEngine

            yield ZeroEngine(ranks, config.timeout_seconds, device, stage=kind)
        else:
            from ultravox.training.engines.fully_sharded import FullyShardedEngine

            yield FullyShardedEngine(
                ranks, config.timeout_seconds, device, reshard_after_forward=config.reshard_after_forward
            )
