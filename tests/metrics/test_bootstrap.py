"""Intervals: seeded, of the right width, and paired where they should be."""

import numpy as np
import pytest

from ultravox.metrics.bootstrap import bootstrap_interval, paired_bootstrap, resampling_unit


def test_same_seed_same_interval():
    errors, lengths = [1, 0, 3, 2], [5, 4, 6, 7]
    assert bootstrap_interval(errors, lengths, seed=3) == bootstrap_interval(errors, lengths, seed=3)
    assert bootstrap_interval(errors, lengths, seed=3) != bootstrap_interval(errors, lengths, seed=4)


def test_interval_covers_the_true_rate():
    # 200 corpora of 150 clips with a known rate: a 95% interval misses it in about 5% of them.
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        lengths = rng.integers(1, 15, size=150)
        errors = rng.binomial(lengths, 0.3)
        low, high = bootstrap_interval(errors, lengths, num_samples=500, seed=seed)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_narrows_with_more_clips():
    few = bootstrap_interval([0, 1] * 10, [2] * 20)
    many = bootstrap_interval([0, 1] * 1000, [2] * 2000)
    assert many[1] - many[0] < (few[1] - few[0]) / 5


def test_paired_is_sharper_than_unpaired():
    # The second system makes one error more in every third clip; clips differ far more than the systems do.
    rng = np.random.default_rng(1)
    lengths = np.full(90, 10)
    first = rng.integers(0, 9, size=90)
    second = first + (np.arange(90) % 3 == 0)
    difference = paired_bootstrap(first, second, lengths)
    assert difference.value == pytest.approx(1 / 30)
    assert difference.interval[0] > 0
    assert difference.p_value < 0.01
    one, other = bootstrap_interval(first, lengths), bootstrap_interval(second, lengths)
    assert other[0] < one[1]  # unpaired intervals overlap


def test_equal_systems_do_not_differ():
    difference = paired_bootstrap([1, 2, 0], [1, 2, 0], [3, 3, 3])
    assert difference.interval == (0.0, 0.0)
    assert difference.p_value == 1.0


def test_speakers_are_drawn_where_there_are_enough():
    speakers = [f"s{i % 12}" for i in range(120)]
    assert resampling_unit(speakers) == "speaker"
    assert resampling_unit(["one"] * 120) == "clip"
    assert resampling_unit([*speakers[:-1], ""]) == "clip"
    assert resampling_unit(None) == "clip"
    # all errors belong to one speaker: drawing speakers must show far more doubt than drawing clips
    errors = [5 if s == "s0" else 0 for s in speakers]
    by_speaker = bootstrap_interval(errors, [10] * 120, groups=speakers)
    by_clip = bootstrap_interval(errors, [10] * 120)
    assert by_speaker[1] - by_speaker[0] > 1.5 * (by_clip[1] - by_clip[0])


def test_no_clips_is_an_error():
    with pytest.raises(ValueError, match="at least one clip"):
        bootstrap_interval([], [])
    with pytest.raises(ValueError, match="same clips"):
        paired_bootstrap([1], [1, 2], [3, 3])
