"""One run on a Ray cluster:

    python launch/ray_train.py configs/audiollm.yaml --num-workers 16 --run_dir /shared/runs/audiollm [--KEY VALUE …]

Ray Train places a worker on each GPU and says to it which rank it is. Each worker starts the training command as a
process of its own, so that it is the same program here as everywhere else. A run that failed, or whose machine went
away, starts again and goes on from its last checkpoint: config and `--run_dir` must be where all machines see them.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

#: What the training command reads, as torchrun would set it.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def main(words: Sequence[str] | None = None) -> None:
    """Run until the training is over, or has failed too often."""
    trainer(parse(words)).fit()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; what is not among them goes to the training, as `overrides`."""
    parser = argparse.ArgumentParser(description="One run on a Ray cluster.", allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--num-workers", type=int, required=True, help="one for each GPU")
    parser.add_argument("--run_dir", type=Path, required=True, help="the run's folder, which all machines see")
    parser.add_argument("--max-failures", type=int, default=3, help="starts after the first one")
    parser.add_argument("--cpu", action="store_true", help="workers without GPUs")
    options, options.overrides = parser.parse_known_args(words)
    return options


def trainer(options: argparse.Namespace) -> TorchTrainer:
    """The job, not yet started."""
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "config": str(Path(options.config).resolve()),
            "run_dir": str(options.run_dir.resolve()),
            "overrides": options.overrides,
        },
        # Ray's own process group carries one number: the training's is NCCL where there are GPUs
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=not options.cpu),
        run_config=RunConfig(
            name=options.run_dir.name,
            storage_path=str(options.run_dir.resolve().parent / "ray"),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )


def train_worker(job: dict) -> None:
    """In each worker: the training command with this worker's rank. Another exit code than 0 fails the worker."""
    subprocess.run(command(job), env=environment(), check=True)


def command(job: dict) -> list[str]:
    """The training command; it goes on from the last checkpoint when there is one."""
    there = any(Path(job["run_dir"]).glob("checkpoints/[!.]*-*"))
    resume = ["--resume"] if there else []
    train = [sys.executable, "-m", "ultravox", "train", job["config"], "--run_dir", job["run_dir"]]
    return [*train, *resume, *job["overrides"]]


def environment() -> dict[str, str]:
    """This worker's, with ranks and a meeting place of its own: Ray's process group holds the port of Ray's."""
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    ranks = (context.get_world_rank(), context.get_local_rank(), context.get_world_size())
    mine = (ray.util.get_node_ip_address(), _free_port()) if context.get_world_rank() == 0 else None
    address, port = broadcast_from_rank_zero(mine)
    named = dict(zip(RANKS, map(str, ranks), strict=True))
    return {**os.environ, **named, "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
