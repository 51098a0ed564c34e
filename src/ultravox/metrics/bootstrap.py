"""Bootstrap intervals of pooled rates, and the paired test between two systems on the same clips.

Percentile bootstrap (Bisani & Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation"):
whole clips are drawn with replacement, because the errors inside one clip depend on each other. Where many speakers are
known, whole speakers are drawn. A share (of answers that are right) is the same thing with length 1 for each clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_SAMPLES = 1000
CONFIDENCE = 0.95
MIN_GROUPS = 10  # with fewer speakers than this, drawing speakers says nothing: clips are drawn instead


@dataclass(frozen=True, slots=True)
class Difference:
    """Rate of the second system minus rate of the first, on the same clips."""

    value: float
    interval: tuple[float, float]
    p_value: float  # two-sided, at least 1 / (samples + 1): a bootstrap cannot say "zero"

    def as_dict(self) -> dict:
        return {"value": self.value, "interval": list(self.interval), "p_value": self.p_value}


def resampling_unit(groups: Sequence[str | None] | None) -> str:
    """ "speaker" where at least MIN_GROUPS speakers are known for all clips, else "clip"."""
    if groups and all(groups) and len(set(groups)) >= MIN_GROUPS:
        return "speaker"
    return "clip"


def _weights(num_clips: int, groups: Sequence[str | None] | None, num_samples: int, seed: int) -> np.ndarray:
    """How often each clip is drawn: [sample, clip]."""
    rng = np.random.default_rng(seed)
    if resampling_unit(groups) == "clip":
        return rng.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size=num_samples)
    _, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    num_groups = int(member.max()) + 1
    return rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_samples)[:, member]


def _rates(weights: np.ndarray, errors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return (weights @ errors) / np.maximum(1, weights @ lengths)


def _percentiles(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_interval(
    errors: Sequence[int],
    lengths: Sequence[int],
    *,
    groups: Sequence[str | None] | None = None,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """Interval of sum(errors) / sum(lengths); one entry for each clip. Raises ValueError for no clips."""
    if not len(errors):
        raise ValueError("an interval needs at least one clip")
    weights = _weights(len(errors), groups, num_samples, seed)
    return _percentiles(_rates(weights, np.asarray(errors), np.asarray(lengths)), confidence)


def paired_bootstrap(
    first_errors: Sequence[int],
    second_errors: Sequence[int],
    lengths: Sequence[int],
    *,
    groups: Sequence[str | None] | None = None,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Difference (second − first) of two systems' pooled rates, both resampled on the same clips.

    Args:
        first_errors, second_errors: errors of each clip, in the same order.
        lengths: reference length of each clip.
    """
    first, second, length = np.asarray(first_errors), np.asarray(second_errors), np.asarray(lengths)
    if not len(first) == len(second) == len(length) > 0:
        raise ValueError(f"a paired test needs the same clips: got {len(first)}, {len(second)} and {len(length)}")
    weights = _weights(len(first), groups, num_samples, seed)
    samples = _rates(weights, second, length) - _rates(weights, first, length)
    tail = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    value = float((second.sum() - first.sum()) / max(1, length.sum()))
    p_value = min(1.0, 2 * (tail + 1) / (num_samples + 1))
    return Difference(value, _percentiles(samples, confidence), p_value)
