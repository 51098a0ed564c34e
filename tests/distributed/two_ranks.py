"""Runs a function of this folder's modules on several gloo processes, as torchrun would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
DEEPSPEED = str(Path(sys.prefix) / "deepspeed")
"""It lies there: see the Makefile."""
TRAINING = HERE.parent / "training"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments: list[str], world_size: int, cwd: Path | None = None, **more_env: str) -> list[subprocess.Popen]:
    """A process for each rank, `python ARGUMENTS`; all of their output in pipes."""
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(TRAINING), os.environ.get("PYTHONPATH", ""), DEEPSPEED]),
            **more_env,
        }
        if world_size == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                env.pop(name)
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env=env,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def train(config: Path, world_size: int, *more: str, timeout: float = 240, **env: str) -> list[tuple[int, str]]:
    """`ultravox train CONFIG` on so many ranks."""
    return finish(start(["-m", "ultravox", "train", str(config), *more], world_size, **env), timeout)
