"""Averages over the steps between two log lines."""

import math
from dataclasses import dataclass, field

from ultravox.metrics.token_predictions import PredictionCounts, shift_metrics
from ultravox.training.trainer import StepRecord

MAX_EXPONENT = 700.0  # beyond, a float is infinite


@dataclass(slots=True)
class Window:
    """Adds up step records; `flush` gives one log row and begins anew."""

    audio_seconds: float = 0.0
    num_tokens: int = 0
    num_positions: int = 0
    flops: float = 0.0
    loss: float = 0.0
    data_wait_seconds: float = 0.0
    steps: int = 0
    start: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    predictions: PredictionCounts | None = None

    def add(self, record: StepRecord) -> None:
        """Take in a step. Steps that were not taken have no loss worth averaging."""
        self.audio_seconds += record.audio_seconds
        self.num_tokens += record.num_tokens
        self.num_positions += record.num_positions
        self.flops += record.flops
        self.data_wait_seconds += record.data_wait_seconds
        if record.skipped_ids is None:
            self.steps += 1
            self.loss += record.loss
            if record.predictions is not None:
                self.predictions = record.predictions + (self.predictions or PredictionCounts())
            for name, value in record.metrics.items():
                self.metrics[name] = self.metrics.get(name, 0.0) + value

    def flush(self, record: StepRecord) -> dict[str, float]:
        """Mean loss and metrics, and rates per second of wall time, since the last call."""
        seconds = max(1e-9, record.elapsed_seconds - self.start)
        steps = max(1, self.steps)
        row = {
            "loss": self.loss / steps if self.steps else float("nan"),
            "audio_seconds_per_second": self.audio_seconds / seconds,
            "tokens_per_second": self.num_tokens / seconds,
            "data_wait_share": self.data_wait_seconds / seconds,
            **self._utilisation(record, seconds),
            **{name: value / steps for name, value in self.metrics.items()},
        }
        if self.predictions is not None:
            entropy = row.get("cross_entropy", row["loss"])  # the loss may be of more than the tokens
            row |= {"perplexity": math.exp(min(entropy, MAX_EXPONENT))} | shift_metrics(self.predictions)
        if row.get("next_frame_copied"):
            row["next_frame_skill"] = 1 - row["next_frame"] / row["next_frame_copied"]
        self.__init__(start=record.elapsed_seconds)  # type: ignore[misc]
        return row

    def _utilisation(self, record: StepRecord, seconds: float) -> dict[str, float]:
        """What of the positions was padding, and of what the device can was used, as far as they are known."""
        found = {}
        if self.num_positions:
            found["padding_share"] = 1 - self.num_tokens / self.num_positions
        if self.flops:
            found["model_tflops"] = self.flops / seconds / 1e12
            if record.peak_flops:
                found["model_flop_utilisation"] = self.flops / seconds / record.peak_flops
        return found


def row_of(window: Window, record: StepRecord) -> dict[str, float]:
    """What trackers are told at the end of a window: its means and rates, the step's norms, and the learning rates."""
    rates = {f"lr_{part}": rate for part, rate in record.lr.items()}
    return {**window.flush(record), "grad_norm": record.grad_norm, **record.of_parts, **rates}
