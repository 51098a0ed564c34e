"""How well a stage tells the end of speech by now, on the clips that are kept out: each whole, and each cut short."""

from typing import Any

import numpy as np
import torch

from ultravox.audio.endpoints import ClipCutter, speech_end
from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.metrics.end_of_audio import decision_metrics, latency_metrics, length_only_accuracy
from ultravox.tokens import IGNORE_INDEX
from ultravox.training.examples import Example
from ultravox.training.rows import load_within


def end_of_audio_metrics(task: Any, examples: list[Example]) -> dict[str, float]:
    """Accuracy, false cut-offs, what the lengths alone tell, and (where each position is judged) latencies.

    Args:
        task: a `TuneTask` with an `ending`.
        examples: of one recording each.
    """
    scores: list[np.ndarray] = []
    whole: list[bool] = []
    seconds: list[float] = []
    ends: list[float | None] = []
    limits = (task.data.min_audio_seconds, task.data.max_audio_seconds)
    known = {e.id: speech_end(load_within(e.recordings[0], *limits)) / SAMPLE_RATE for e in examples}
    for share in (0.0, 1.0):
        maker = task._maker(examples, from_cache=False)
        maker.cutter = ClipCutter(share, task.ending.options.pause_share)
        batch = maker.first()
        for row, found in enumerate(_scores(task, batch)):
            if share and batch.whole[row]:  # too short to be cut: it is there once already
                continue
            scores.append(found)
            whole.append(batch.whole[row])
            seconds.append(batch.seconds[row])
            ends.append(known[batch.ids[row]] if batch.whole[row] else None)
    at_end, is_whole = np.array([found[-1] for found in scores]), np.array(whole)
    metrics = decision_metrics(at_end, is_whole)
    metrics["length_only_accuracy"] = length_only_accuracy(np.array(seconds), is_whole)
    if task.ending.options.variant != "late":
        per_position = task.model.config.stack_factor / task.model.audio_tower.frames_per_second
        metrics |= latency_metrics(scores, ends, per_position)
    return {f"end_of_audio_{name}": value for name, value in metrics.items()}


def _scores(task: Any, batch: Any) -> list[np.ndarray]:
    """Of each row: the probability that the speaker has finished, at each audio position or (late) once."""
    states = task._states(task.prepared(batch), training=False)
    if task.ending.options.variant == "late":
        first = (states.labels != IGNORE_INDEX).int().argmax(1)
        hidden = states.hidden[torch.arange(len(first)), first - 1]
        return [np.array([score]) for score in task.ending.answer_scores(task.model.logits_of(hidden)).tolist()]
    found = task.ending.scores(task._of_audio(states)).cpu().numpy()
    return np.split(found, np.cumsum([sum(row) for row in batch.audio_tokens])[:-1])
