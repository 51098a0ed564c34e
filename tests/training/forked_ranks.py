"""Two ranks and more of a toy run that is sharded, as forks of the test's process: no interpreter has to start."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # so that no fork has to
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch import nn

from ultravox.config.checkpoints import CheckpointsConfig
from ultravox.errors import UltravoxError
from ultravox.training.checkpoint import Checkpoint, list_checkpoints
from ultravox.training.engines.base import Engine
from ultravox.training.engines.fully_sharded import FullyShardedEngine
from ultravox.training.engines.ranks import Ranks
from ultravox.training.engines.shards import assign
from ultravox.training.optim import Optimizer, ParameterGroup
from ultravox.training.sharded_store import load_for_engine, open_store, parts_like

STEPS = 6
TIMEOUT_SECONDS = 20.0
TOLD = 2


def on_ranks(meeting: Path, world_size: int, work: Callable[[Engine], None]) -> list[int]:
    """Do it on each of so many ranks; how each ended: 0, TOLD of an UltravoxError, 1 of another, or minus a signal."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _as_rank(meeting, Ranks(rank, world_size, rank), work)
                code = 0
            except UltravoxError as error:
                code = TOLD
                print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    ends = []
    for child in children:
        _, status = os.waitpid(child, 0)
        ends.append(os.waitstatus_to_exitcode(status))
    meeting.unlink(missing_ok=True)
    return ends


def _as_rank(meeting: Path, ranks: Ranks, work: Callable[[Engine], None]) -> None:
    signal.alarm(120)  # a test that hangs ends
    torch.set_num_threads(1)
    if ranks.world_size == 1:
        return work(Engine())
    dist.init_process_group("gloo", f"file://{meeting}", rank=ranks.rank, world_size=ranks.world_size)
    work(FullyShardedEngine(ranks, TIMEOUT_SECONDS, torch.device("cpu")))
    dist.destroy_process_group()


class ToyModel(nn.Module):
    """Layers to shard, and two parameters that stay whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 5)])
        self.whole = nn.Linear(5, 3).to(torch.bfloat16)

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.whole(x.to(torch.bfloat16)).float()


class ToyRun:
    """A model on an engine, with an optimizer; each step's data are a function of the step, and the same everywhere."""

    def __init__(self, engine: Engine, dtype: torch.dtype = torch.float32) -> None:
        self.engine, self.model = engine, ToyModel()
        self.model.layers[0].to(dtype)
        engine.prepare(self.model)
        self.named = dict(self.model.named_parameters())
        self.optimizer = Optimizer(
            [ParameterGroup("projector", self.named, 1e-2)],
            weight_decay=0.01,
            betas=(0.9, 0.99),
            eps=1e-8,
            sum_over_ranks=engine.sum,
        )

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        self.engine.backward(self.model(x).square().sum())
        self.engine.reduce(self.named.values())
        self.optimizer.step(divisor=4.0 * self.engine.world_size, max_grad_norm=1.0, lr_factor=1.0)

    def checkpoint(self, number: int) -> Checkpoint:
        state = {name: parameter.detach() for name, parameter in self.named.items()}
        return Checkpoint(state, self.optimizer.state_dict(), {"step": number, "metrics": {}})

    def restore(self, folder: Path) -> int:
        """Go to where a checkpoint stands: its step."""
        saved = load_for_engine(folder, self.engine)
        targets = {name: parameter.detach() for name, parameter in self.named.items()}
        for name, tensor in parts_like(saved.trainable, targets).items():
            assign(targets[name], tensor)
        self.optimizer.load_state_dict(parts_like(saved.optimizer, self.optimizer.targets()))
        return saved.state["step"]


def train(
    engine: Engine, run_dir: Path, steps: int = STEPS, at_step: Callable[[int], None] = lambda step: None, keep: int = 2
) -> None:
    """From the newest checkpoint to a step, with a checkpoint after each."""
    run = ToyRun(engine)
    found = engine.gather(list_checkpoints(run_dir, ["toy"]))[0]
    begin = run.restore(found[-1]) if found else 0
    with open_store(run_dir, ["toy"], CheckpointsConfig(keep_last=keep), engine) as store:
        for number in range(begin, steps):
            run.step(number)
            at_step(number + 1)
            if engine.is_main or engine.is_sharded:
                store.save("toy", number + 1, run.checkpoint(number + 1))
            store.settle()
