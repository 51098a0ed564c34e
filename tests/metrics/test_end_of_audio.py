"""Decisions and latencies, by hand."""

import numpy as np
import pytest

from ultravox.metrics.end_of_audio import decision_metrics, latency_metrics, length_only_accuracy


def test_decisions():
    scores, whole = np.array([0.9, 0.2, 0.6, 0.1, 0.3]), np.array([True, True, False, False, False])
    assert decision_metrics(scores, whole) == {"accuracy": 0.6, "false_cut_offs": pytest.approx(1 / 3)}
    assert decision_metrics(scores[:2], whole[:2]) == {"accuracy": 0.5}


def test_length_alone():
    """By hand: a threshold, all cut, all whole; equal lengths cannot be told apart."""
    assert length_only_accuracy(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, False, True, True])) == 1.0
    assert length_only_accuracy(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, False])) == 0.5
    assert length_only_accuracy(np.array([4.0, 3.0, 2.0, 1.0]), np.array([False, False, False, True])) == 0.75
    assert length_only_accuracy(np.array([2.0, 2.0]), np.array([True, False])) == 0.5


def test_length_alone_against_all_thresholds():
    generator = np.random.default_rng(3)
    for _ in range(50):
        seconds, whole = generator.integers(1, 8, size=12) / 2, generator.random(12) < 0.5
        tried = [((seconds > t) == whole).mean() for t in [-1, *np.unique(seconds)]]
        assert length_only_accuracy(seconds, whole) == pytest.approx(max(tried))


def test_latency_is_from_the_end_of_speech():
    """Positions of 0.1 s. Two whole clips whose speech ends at 0.3 s, one cut clip."""
    scores = [np.array([0.1, 0.2, 0.3, 0.6, 0.9]), np.array([0.1, 0.7, 0.2, 0.3, 0.8]), np.array([0.5, 0.4])]
    found = latency_metrics(scores, [0.3, 0.3, None], 0.1, rates=(0.0, 0.34, 1.0))
    # nobody interrupted: above 0.7. Each fires at its fifth position, 0.5 s.
    assert found["latency_at_0"] == pytest.approx(0.2)
    assert found["missed_at_0"] == 0
    # one clip may be: above 0.5. The first fires at its fourth position, the second still at its fifth.
    assert found["latency_at_34"] == pytest.approx(0.15)
    # at any price: at the first position that is not before the end of speech
    assert found["latency_at_100"] == pytest.approx(0.0)


def test_what_never_fires_is_missed():
    found = latency_metrics([np.array([0.9, 0.1, 0.1])], [0.2], 0.1, rates=(0.0,))
    assert found == {"missed_at_0": 1.0}
