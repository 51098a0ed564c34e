"""A task that is small enough to reason about: fit a linear map, with seeded noise on its inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ultravox.audio.augment import generator_for
from ultravox.data.loader import Loader
from ultravox.data.order import Position
from ultravox.data.plan import plan_batches
from ultravox.training.optim import Optimizer, ParameterGroup
from ultravox.training.task import LossOutput
from ultravox.training.trainer import LoopState


@dataclass
class ToyBatch:
    ids: list[str]
    x: Tensor
    y: Tensor


class ToyOrder:
    """One window an epoch, of batches of `budget` examples."""

    def __init__(self, num_examples: int, budget: int) -> None:
        self.num_examples, self.budget = num_examples, budget

    def _batches(self, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in plan_batches([1] * self.num_examples, self.budget, seed=3, epoch=epoch)]

    def num_windows(self, epoch: int) -> int:
        return 1

    def num_batches(self, epoch: int, window: int) -> int:
        return len(self._batches(epoch))

    def batch(self, epoch: int, window: int, index: int) -> list[int]:
        return self._batches(epoch)[index]


class ToyTask:
    def __init__(
        self, budget: int = 4, noise: float = 0.1, nan_at: frozenset[str] = frozenset(), num_examples: int = 24
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.2 if noise else 0.0), nn.Linear(7, 2))
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(num_examples, 5, generator=generator)
        self.y = self.x @ torch.randn(5, 2, generator=generator)
        self.order = ToyOrder(num_examples, budget)
        self.noise, self.nan_at, self.num_evaluations = noise, nan_at, 0
        self.seen: list[list[str]] = []

    def load(self, state: LoopState, batches_per_step: int = 1):
        loader = Loader(self.order, self.make_batch, batches_per_step=batches_per_step)
        return loader.steps(Position(state.epoch, state.window, state.batch))

    def make_batch(self, index: list[int], position: Position) -> ToyBatch:
        generator = generator_for(0, "toy", *position)
        noise = self.noise * torch.randn(len(index), 5, generator=generator)
        ids = [f"clip-{i}" for i in index]
        x = self.x[index] + noise
        if self.nan_at & set(ids):
            x = x * float("nan")
        return ToyBatch(ids, x, self.y[index])

    def loss(self, batch: ToyBatch) -> LossOutput:
        self.seen.append(batch.ids)
        error = (self.model(batch.x) - batch.y).square()
        total = error.sum()
        return LossOutput(total, error.numel(), 0.5 * len(batch.x), 3 * len(batch.x), {"error": total.item()})

    def halves(self, batch: ToyBatch) -> list[ToyBatch]:
        cut = len(batch.ids) // 2
        parts = [slice(cut), slice(cut, None)]
        return [ToyBatch(batch.ids[part], batch.x[part], batch.y[part]) for part in parts]

    def parameter_groups(self) -> list[ParameterGroup]:
        first, last = self.model[0], self.model[2]
        return [
            ParameterGroup("projector", {f"first.{n}": p for n, p in first.named_parameters()}, 1e-2),
            ParameterGroup("language_model", {f"last.{n}": p for n, p in last.named_parameters()}, 5e-3),
        ]

    def train_mode(self) -> None:
        self.model.train()

    def evaluate(self) -> dict[str, float]:
        self.num_evaluations += 1
        torch.rand(17)  # must not disturb training
        self.model.eval()
        return {"wer": 0.5}

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(dict(state))


def toy_optimizer(task: ToyTask) -> Optimizer:
    return Optimizer(task.parameter_groups(), weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8)


class Recorder:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.records = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []

    def on_step(self, record) -> None:
        self.losses.append(record.loss)
        self.records.append(record)

    def on_evaluation(self, stage, step, metrics) -> None:
        self.evaluations.append((step, metrics))


def spiking_task(step: int = 25) -> ToyTask:
    """Its loss is a hundred times as large in one step, which counts from 1."""
    task = ToyTask(noise=0.0)
    inner = task.loss

    def loss(batch):
        output = inner(batch)
        if len(task.seen) == step:
            output.sum = output.sum * 100
        return output

    task.loss = loss
    return task
