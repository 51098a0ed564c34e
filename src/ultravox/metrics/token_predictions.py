"""How far a teacher-forced model's best tokens are from the labels, position by position, shifted, and aligned.

Two families are needed. Edit distances forgive a shift: a model whose labels are off by one reads 98%. Accuracies at a
fixed place do not, and taken at several shifts they tell by how much the labels are off. All are sums over the
positions that are supervised; nothing is compared across two rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rapidfuzz.distance import Levenshtein

MAX_SHIFT = 4
#: A shift other than 0 is an alarm when its accuracy is more than so many times what permuted labels would give …
ALARM_RATIO = 2.0
#: … over at least so many positions: fewer prove nothing.
ALARM_POSITIONS = 50


@dataclass(slots=True)
class PredictionCounts:
    """Counts over supervised positions; they add up over rows and batches.

    With y the labels, p_t the best token FOR position t, and M the supervised positions:
    """

    num_positions: int = 0
    """|M|."""
    hits: np.ndarray = field(default_factory=lambda: np.zeros(2 * MAX_SHIFT + 1, dtype=np.int64))
    """For each shift s from -4 to 4: positions t of M with t + s in M and p_t = y_{t+s}."""
    pairs: np.ndarray = field(default_factory=lambda: np.zeros(2 * MAX_SHIFT + 1, dtype=np.int64))
    """For each shift: positions t of M with t + s in M."""
    near_hits: np.ndarray = field(default_factory=lambda: np.zeros(MAX_SHIFT + 1, dtype=np.int64))
    """For each k from 0 to 4: positions whose p_t is among the supervised y_{t-k} … y_{t+k}."""
    near_floor: np.ndarray = field(default_factory=lambda: np.zeros(MAX_SHIFT + 1))
    """The same, expected of labels in random order."""
    floor: float = 0.0
    """Expected hits at a shift, of |M|, if each row's labels stood in random order."""
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    """Of the alignment of each row's best tokens with its labels."""

    def __add__(self, other: "PredictionCounts") -> "PredictionCounts":
        return PredictionCounts(
            self.num_positions + other.num_positions,
            self.hits + other.hits,
            self.pairs + other.pairs,
            self.near_hits + other.near_hits,
            self.near_floor + other.near_floor,
            self.floor + other.floor,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    def accuracy(self, shift: int = 0) -> float:
        """acc_s: share of the positions whose best token is the label `shift` places on. 0 where there is none."""
        return float(self.hits[shift + MAX_SHIFT] / max(1, self.pairs[shift + MAX_SHIFT]))

    @property
    def best_shift(self) -> int:
        """s*, the shift with the highest accuracy; 0 where it ties."""
        shifts = sorted(range(-MAX_SHIFT, MAX_SHIFT + 1), key=abs)
        return max(shifts, key=self.accuracy)  # the first of equals

    @property
    def accuracy_floor(self) -> float:
        """What accuracy labels in random order would give, at any shift."""
        return self.floor / max(1, self.num_positions)

    def near_accuracy(self, k: int) -> float:
        """acc_tol(k)."""
        return float(self.near_hits[k] / max(1, self.num_positions))

    def near_accuracy_floor(self, k: int) -> float:
        """acc_tol(k) of labels in random order."""
        return float(self.near_floor[k] / max(1, self.num_positions))

    @property
    def aligned_accuracy(self) -> float:
        """acc_aligned = 1 - (S + D) / N. Forgives shifts: never read it alone."""
        return 1 - (self.substitutions + self.deletions) / max(1, self.num_positions)

    @property
    def token_error_rate(self) -> float:
        """ter_tf: (S + D + I) / N of the teacher-forced best tokens."""
        return (self.substitutions + self.deletions + self.insertions) / max(1, self.num_positions)

    @property
    def shift_alarm(self) -> str:
        """One line when the labels look off by some places, else empty.

        A tied-embedding model that has learnt nothing copies its input (s* = -1), so this is for trained ones.
        """
        best = self.best_shift
        reached, floor = self.accuracy(best), self.accuracy_floor
        if best == 0 or self.num_positions < ALARM_POSITIONS or reached <= ALARM_RATIO * floor:
            return ""
        return (
            f"the best tokens fit the labels {abs(best)} {'later' if best > 0 else 'earlier'} ({reached:.1%} at shift "
            f"{best:+d}, {self.accuracy():.1%} at 0, {floor:.1%} by chance): the labels are off by {abs(best)}"
        )


def count_predictions(predictions: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> PredictionCounts:
    """Counts of one row.

    Args:
        predictions: the best token for each supervised position, int [position].
        labels: the token that is there, int [position].
        positions: where each stands in the row, ascending, int [position].

    Raises:
        ValueError: shapes that differ, or positions that do not rise.
    """
    if not predictions.shape == labels.shape == positions.shape or (np.diff(positions) <= 0).any():
        raise ValueError(
            f"expected predictions, labels and rising positions of one length, got {predictions.shape}, "
            f"{labels.shape} and {positions.shape}"
        )
    counts = PredictionCounts(num_positions=len(labels))
    if not len(labels):
        return counts
    near = np.zeros((2 * MAX_SHIFT + 1, len(labels)), dtype=bool)
    exists = np.zeros_like(near)
    for index, shift in enumerate(range(-MAX_SHIFT, MAX_SHIFT + 1)):
        place = np.searchsorted(positions, positions + shift).clip(max=len(labels) - 1)
        exists[index] = positions[place] == positions + shift
        near[index] = exists[index] & (predictions == labels[place])
        counts.hits[index], counts.pairs[index] = near[index].sum(), exists[index].sum()
    tokens, frequency = np.unique(labels, return_counts=True)
    found = np.searchsorted(tokens, predictions).clip(max=len(tokens) - 1)
    # the share of the row's labels that a prediction would meet at a random place
    chance = np.where(tokens[found] == predictions, frequency[found] / len(labels), 0.0)
    counts.floor = float(chance.sum())
    for k in range(MAX_SHIFT + 1):
        middle = slice(MAX_SHIFT - k, MAX_SHIFT + k + 1)
        counts.near_hits[k] = near[middle].any(axis=0).sum()
        counts.near_floor[k] = _chance_of_any(chance * len(labels), exists[middle].sum(axis=0), len(labels)).sum()
    for operation in Levenshtein.editops(labels.tolist(), predictions.tolist()):
        if operation.tag == "replace":
            counts.substitutions += 1
        elif operation.tag == "delete":
            counts.deletions += 1
        else:
            counts.insertions += 1
    return counts


def _chance_of_any(matching: np.ndarray, drawn: np.ndarray, total: int) -> np.ndarray:
    """Chance that, of `total` labels in random order, at least one of `drawn` places holds one of the `matching`."""
    missed = np.ones(len(matching))
    for step in range(int(drawn.max(initial=0))):
        left = np.where(step < drawn, (total - matching - step) / max(1, total - step), 1.0)
        missed *= left.clip(min=0)
    return 1 - missed


def shift_metrics(counts: PredictionCounts) -> dict[str, float]:
    """What a log shows of them, by the names of the definitions."""
    return {
        "token_accuracy": counts.accuracy(),
        "token_accuracy_floor": counts.accuracy_floor,
        "best_shift": counts.best_shift,
        "best_shift_accuracy": counts.accuracy(counts.best_shift),
        "acc_tol_1": counts.near_accuracy(1),
        "acc_tol_1_floor": counts.near_accuracy_floor(1),
        "acc_aligned": counts.aligned_accuracy,
        "ter_tf": counts.token_error_rate,
    }


def pool_predictions(counts: Sequence[PredictionCounts]) -> PredictionCounts:
    """Sum over rows."""
    return sum(counts, PredictionCounts())
