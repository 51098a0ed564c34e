"""Training for a look: the real loop and optimizer, on the same batches again and again, with nothing written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ultravox.config.schema import StageConfig
from ultravox.training.batches import SpeechBatch
from ultravox.training.optim import Optimizer, ParameterGroup, lr_factor
from ultravox.training.speech_task import SpeechTask
from ultravox.training.task import LoadedBatch, LossOutput, Transcript
from ultravox.training.trainer import LoopSettings, LoopState, StepRecord, run_stage

#: More steps in a row without a finite loss than any practice has: what they do is looked at, and ends nothing.
_NEVER = 1 << 30
MOST_WARMUP = 10


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A batch that comes in every step."""

    batch: SpeechBatch
    index: int = 0
    worker: int = 0
    position: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Step:
    batches: Sequence[LoadedBatch]
    after: tuple[int, int, int] = (0, 0, 0)


class _Unwatched:
    """A task that is not evaluated on the way."""

    def __init__(self, task: SpeechTask) -> None:
        self._task = task

    def loss(self, batch: SpeechBatch) -> LossOutput:
        return self._task.loss(batch)

    def halves(self, batch: SpeechBatch) -> Sequence[SpeechBatch]:
        return self._task.halves(batch)

    def parameter_groups(self) -> list[ParameterGroup]:
        return self._task.parameter_groups()

    def train_mode(self) -> None:
        self._task.train_mode()

    def evaluate(self) -> dict[str, float]:
        return {}

    def transcripts(self) -> Sequence[Transcript]:
        return ()

    def trainable_state(self) -> dict[str, Tensor]:
        return self._task.trainable_state()

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        self._task.load_trainable_state(state)


class _Records:
    """Keeps what the loop tells."""

    def __init__(self, kept: list[StepRecord]) -> None:
        self.kept = kept

    def on_step(self, record: StepRecord) -> None:
        self.kept.append(record)

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Still(LoopSettings):
    """Steps that change nothing: gradients can be read afterwards."""

    def lr_factor(self, step: int) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class _Falling(LoopSettings):
    """Down to 0 at the end of all its parts."""

    total: int = 0

    def lr_factor(self, step: int) -> float:
        return lr_factor(step, warmup_steps=self.warmup_steps, max_steps=self.total, schedule="cosine", final_share=0.0)


@dataclass(frozen=True, slots=True)
class _Ramp(LoopSettings):
    """The rate grows by a factor in each step, from a factor on."""

    first: float = 1.0
    growth: float = 1.0

    def lr_factor(self, step: int) -> float:
        return self.first * self.growth**step


@dataclass(slots=True)
class Practice:
    """One task trained on the same micro-batches, a few steps at a time, at its peak rates after a short warm-up."""

    task: SpeechTask
    batches: Sequence[SpeechBatch]
    optimizer: Optimizer
    state: LoopState = field(default_factory=LoopState)
    records: list[StepRecord] = field(default_factory=list)

    @classmethod
    def of(cls, task: SpeechTask, batches: Sequence[SpeechBatch]) -> "Practice":
        """With a fresh optimizer, as the stage begins with one."""
        optim = task.stage.optim
        groups = task.parameter_groups()
        return cls(task, batches, Optimizer(groups, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps))

    def train(self, num_steps: int) -> StepRecord:
        """Some steps more; the record of the last."""
        return self._run(LoopSettings, num_steps, warmup_steps=warmup_steps(self.task.stage))

    def train_of(self, num_steps: int, total: int) -> StepRecord:
        """Some of `total` steps over which the rate falls to 0; the record of the last."""
        return self._run(_Falling, num_steps, warmup_steps=warmup_steps(self.task.stage), total=total)

    def stand_still(self) -> StepRecord:
        """One step at rate 0; its gradients, divided by the count and not clipped, stay in the parameters."""
        return self._run(_Still, 1, max_grad_norm=float("inf"))

    def ramp(self, num_steps: int, first: float, growth: float) -> list[StepRecord]:
        """Steps at a growing multiple of the peak rates."""
        self._run(_Ramp, num_steps, first=first, growth=growth)
        return self.records

    def _run(self, kind: type[LoopSettings], num_steps: int, **more: Any) -> StepRecord:
        optim = self.task.stage.optim
        settings = kind(
            self.task.stage.name,
            self.state.step + num_steps,
            **{"schedule": "constant", "max_grad_norm": optim.max_grad_norm, "max_skipped_steps": _NEVER, **more},
        )
        run_stage(
            _Unwatched(self.task),
            self.optimizer,
            settings,
            self._load,
            state=self.state,
            callbacks=[_Records(self.records)],
        )
        return self.records[-1]

    def _load(self, state: LoopState) -> Iterator[_Step]:
        while True:
            yield _Step([_Loaded(batch, index) for index, batch in enumerate(self.batches)])


def warmup_steps(stage: StageConfig) -> int:
    """Of a practice: the stage's own, but few, since a practice is short."""
    return min(stage.optim.warmup_steps, MOST_WARMUP)


def remove_dropout(model: nn.Module) -> None:
    """Training without chance: a batch can be learnt by heart, and two passes give the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):  # some layers ask their configuration each time
            for name, value in list(vars(owner).items()) if owner is not None else ():
                if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                    setattr(owner, name, 0.0)
