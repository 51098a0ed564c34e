"""What the training loop asks of a task. The task knows the model and the data; the loop knows neither."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ultravox.metrics.token_predictions import PredictionCounts
from ultravox.training.optim import ParameterGroup


@dataclass(slots=True)
class LossOutput:
    """One batch's loss as a sum and what it is a sum over; never an average, so that batches of any size add up."""

    sum: Tensor
    """Scalar with a gradient."""
    count: float
    audio_seconds: float
    num_tokens: int
    """Positions without padding."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further sums over the same count, for the log."""
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Further sums, each with a count of its own, for the log."""
    predictions: PredictionCounts | None = None
    """The best tokens against the labels, where the objective predicts tokens."""
    num_positions: int = 0
    """With padding."""
    flops: float = 0.0
    """Of the model's matrix products with its weights, forwards and backwards, for the positions without padding."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """What an evaluation has made of one clip."""

    id: str
    reference: str
    hypothesis: str
    load: Callable[[], np.ndarray | None]
    """Decodes the recording, float32 [sample] at 16 kHz; None where the row has none, or several."""


class Batch(Protocol):
    """Anything with the ids of its examples; they are recorded when a step goes wrong."""

    @property
    def ids(self) -> Sequence[str]: ...


class LoadedBatch(Protocol):
    """A batch and its place, as the data's loader has made it."""

    @property
    def batch(self) -> Any: ...

    @property
    def index(self) -> int: ...

    @property
    def worker(self) -> int: ...

    @property
    def position(self) -> tuple[int, int, int]: ...


class LoadedStep(Protocol):
    """The batches of one step, and where the next one begins."""

    @property
    def batches(self) -> Sequence[LoadedBatch]: ...

    @property
    def after(self) -> tuple[int, int, int]: ...


class Task(Protocol):
    """One objective. Its batches are pure functions of their place in the plan, so that resuming repeats them."""

    def loss(self, batch: Any) -> LossOutput:
        """Forward pass."""
        ...

    def halves(self, batch: Any) -> Sequence[Any]:
        """A batch of several examples as two, for when it does not fit into memory."""
        ...

    def parameter_groups(self) -> list[ParameterGroup]:
        """What trains, with unique names."""
        ...

    def train_mode(self) -> None:
        """Before the first step and after each evaluation."""
        ...

    def evaluate(self) -> dict[str, float]:
        """A quick look at progress on clips that are neither trained on nor held out; at least `wer`, if it has one."""
        ...

    def transcripts(self) -> Sequence[Transcript]:
        """Of each clip of the last `evaluate`, what it was about; none where nothing was written down."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that differs from the base models, by name."""
        ...

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `trainable_state`. CheckpointError when the names or shapes do not fit."""
        ...
