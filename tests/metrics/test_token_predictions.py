"""Against the golden vectors of the definitions, and against counting by hand."""

import numpy as np
import pytest

from ultravox.metrics.token_predictions import (
    PredictionCounts,
    count_predictions,
    pool_predictions,
    shift_metrics,
)

LABELS = np.arange(100, 150)  # 50 distinct tokens
POSITIONS = np.arange(7, 57)


def counted(predictions: np.ndarray) -> PredictionCounts:
    return count_predictions(predictions, LABELS, POSITIONS)


@pytest.mark.parametrize(
    ("name", "predictions", "accuracy", "shift", "shifted", "aligned", "error_rate"),
    [
        ("perfect", LABELS, 1.0, 0, 1.0, 1.0, 0.0),
        ("insertion at 10", np.insert(LABELS, 10, 999)[:50], 0.20, -1, 39 / 49, 0.98, 0.04),
        ("deletion at 10", np.append(np.delete(LABELS, 10), 999), 0.20, 1, 39 / 49, 0.98, 0.04),
        ("double shift", np.append(LABELS[1:], 999), 0.0, 1, 1.0, 0.98, 0.04),
    ],
)
def test_golden_vectors(name, predictions, accuracy, shift, shifted, aligned, error_rate) -> None:
    counts = counted(predictions)
    assert counts.accuracy() == pytest.approx(accuracy), name
    assert counts.best_shift == shift, name
    assert counts.accuracy(shift) == pytest.approx(shifted), name
    assert shifted == pytest.approx(0.80, abs=0.02) or shifted == 1.0
    assert counts.aligned_accuracy == pytest.approx(aligned), name
    assert counts.token_error_rate == pytest.approx(error_rate), name


def test_alarm_where_labels_are_off_and_only_there() -> None:
    assert counted(LABELS).shift_alarm == ""
    assert "off by 1" in counted(np.append(LABELS[1:], 999)).shift_alarm
    assert "1 later" in counted(np.append(LABELS[1:], 999)).shift_alarm
    assert "1 earlier" in counted(np.append([999], LABELS[:-1])).shift_alarm
    # one token over and over: every shift is as good, and no better than chance
    same = np.full(60, 5)
    assert count_predictions(same, same, np.arange(60)).shift_alarm == ""
    few = LABELS[:10]
    assert count_predictions(np.append(few[1:], 9), few, np.arange(10)).shift_alarm == ""  # too few to prove anything


def test_gaps_between_turns_are_not_crossed_and_rows_are_not_mixed() -> None:
    labels = np.array([1, 2, 3, 4])
    positions = np.array([5, 6, 20, 21])
    counts = count_predictions(np.array([2, 3, 4, 9]), labels, positions)
    # the second prediction is the third label, but that one stands 14 places on
    assert counts.hits.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0]
    assert counts.pairs.tolist() == [0, 0, 0, 2, 4, 2, 0, 0, 0]
    two = pool_predictions([counts, count_predictions(np.array([7]), np.array([7]), np.array([22]))])
    assert two.hits.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0]
    assert two.num_positions == 5


def test_floors_are_what_permuted_labels_give() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 6, 40)
    predictions = generator.integers(0, 6, 40)
    counts = count_predictions(predictions, labels, np.arange(40))
    shuffled = [count_predictions(predictions, generator.permutation(labels), np.arange(40)) for _ in range(2000)]
    assert counts.accuracy_floor == pytest.approx(np.mean([one.accuracy() for one in shuffled]), abs=0.005)
    for k in (0, 1, 2):
        expected = np.mean([one.near_accuracy(k) for one in shuffled])
        assert counts.near_accuracy_floor(k) == pytest.approx(expected, abs=0.005), k
    by_hand = [labels[max(0, t - 2) : t + 3] for t in range(40)]
    assert counts.near_accuracy(2) == np.mean([p in near for p, near in zip(predictions, by_hand, strict=True)])


def test_nothing_supervised_and_bad_shapes() -> None:
    nothing = count_predictions(*(np.zeros(0, dtype=int),) * 3)
    assert shift_metrics(nothing)["token_accuracy"] == 0
    assert nothing.shift_alarm == ""
    with pytest.raises(ValueError, match="rising positions"):
        count_predictions(LABELS, LABELS, POSITIONS[::-1])
    with pytest.raises(ValueError, match="of one length"):
        count_predictions(LABELS[1:], LABELS, POSITIONS)
