import math
from collections import Counter

import numpy as np
import pytest

from ultravox.data.mixture import Mixture
from ultravox.data.permutation import Permutation
from ultravox.errors import ConfigError, DataError


def rows_of(mixture, epoch):
    return mixture.draw(epoch, 0, mixture.num_places(epoch)).rows


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 31, 64, 65, 1000, 70_000])
def test_a_permutation_has_each_thing_once(size):
    for seed in range(3):
        found = Permutation(size, [seed])(np.arange(size))
        assert np.array_equal(np.sort(found), np.arange(size))


def test_every_order_of_a_few_things_is_as_likely():
    counts = Counter(tuple(Permutation(4, [seed])(np.arange(4)).tolist()) for seed in range(480))
    chi_square = sum((count - 20) ** 2 / 20 for count in counts.values()) + 20 * (24 - len(counts))
    assert chi_square < 55  # 23 degrees of freedom: one in 5000 by chance


def test_neighbours_in_a_permutation_have_nothing_in_common():
    found = Permutation(200_000, [4])(np.arange(200_000)).astype(float)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.01
    steps = np.histogram(np.diff(found) % 200_000, bins=20, range=(0, 200_000))[0]
    assert abs(steps - 10_000).max() < 500


def test_a_place_is_computed_alone_among_100_million():
    mixture = Mixture({"a": 60_000_000, "b": 40_000_000}, repeats={"a": 0.5, "b": 2}, seed=0)
    assert mixture.num_places(0) == 110_000_000
    middle = mixture.draw(0, 70_000_000, 70_001_000)
    assert np.array_equal(mixture.draw(0, 70_000_500, 70_000_600).rows, middle.rows[500:600])
    assert len(set(zip(middle.rows.tolist(), middle.copies.tolist(), strict=True))) == 1000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repeats": {"a": 1, "b": 2, "c": 3}},
        {"repeats": {"a": 0.5, "b": 1.3, "c": 0.07}},
        {"weights": {"a": 1, "b": 2, "c": 0.5}},
        {"temperature": 1.0},
        {"temperature": 5.0},
    ],
)
def test_after_any_number_of_epochs_rows_of_a_source_have_come_equally_often(options):
    mixture = Mixture({"a": 37, "b": 100, "c": 51}, seed=3, **options)
    seen = np.zeros(188, dtype=int)
    for epoch in range(12):
        draws = mixture.draw(epoch, 0, mixture.num_places(epoch))
        for row, copy in sorted(zip(draws.rows.tolist(), draws.copies.tolist(), strict=True), key=lambda pair: pair[1]):
            assert copy == seen[row], "a copy's number is how often its row came before"
            seen[row] += 1
        for part in np.split(seen, [37, 137]):
            assert part.max() - part.min() <= 1
        assert np.array_equal(np.bincount(draws.rows, minlength=188), mixture.row_counts(epoch))


def test_half_the_rows_now_and_the_other_half_next_time():
    mixture = Mixture({"a": 10, "b": 11}, repeats={"a": 0.5, "b": 1}, seed=1)
    first, second = (set(rows_of(mixture, epoch)[rows_of(mixture, epoch) < 10].tolist()) for epoch in (0, 1))
    assert len(first) == len(second) == 5
    assert first | second == set(range(10))
    assert all(mixture.num_places(epoch) == 16 for epoch in range(4))


@pytest.mark.parametrize("epoch", range(5))
def test_with_weights_every_source_is_seen_entirely_in_each_epoch(epoch):
    mixture = Mixture({"a": 100, "b": 30, "c": 5}, weights={"a": 0.5, "b": 0.3, "c": 0.2}, seed=0)
    assert set(rows_of(mixture, epoch).tolist()) == set(range(135))
    assert mixture.num_places(epoch) == 200  # max(100 / 0.5, 30 / 0.3, 5 / 0.2)
    assert mixture.realised(epoch) == mixture.requested == {"a": 0.5, "b": 0.3, "c": 0.2}


def test_realised_shares_are_within_one_row_of_the_requested():
    mixture = Mixture({"a": 997, "b": 311, "c": 53}, weights={"a": 1, "b": math.pi, "c": 0.1}, seed=0)
    for epoch in range(6):
        for name, share in mixture.realised(epoch).items():
            assert abs(share - mixture.requested[name]) * mixture.num_places(epoch) <= 2


def test_a_temperature_evens_sizes_out():
    sizes = {"a": 10_000, "b": 100}
    assert Mixture(sizes, temperature=1, seed=0).counts(0) == [10_000, 100]
    assert Mixture(sizes, temperature=2, seed=0).requested == pytest.approx({"a": 10 / 11, "b": 1 / 11})
    assert Mixture(sizes, temperature=1e9, seed=0).requested == pytest.approx({"a": 0.5, "b": 0.5})


def test_places_of_an_epoch_mix_the_sources():
    rows = rows_of(Mixture({"a": 1000, "b": 1000}, seed=0), 0)
    assert 400 < (rows[:1000] < 1000).sum() < 600
    other = rows_of(Mixture({"a": 1000, "b": 1000}, seed=1), 0)
    assert (rows == other).sum() < 20


def test_another_epoch_another_order_and_the_same_again():
    mixture, again = (Mixture({"a": 500}, seed=9) for _ in range(2))
    assert (rows_of(mixture, 0) == rows_of(mixture, 1)).sum() < 10
    assert np.array_equal(rows_of(mixture, 1), rows_of(again, 1))


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ConfigError, {"repeats": {"a": 1, "b": 0}}, "the repeat of source 'b' is 0, expected a number above 0"),
        (ConfigError, {"weights": {"a": -1, "b": 1}}, "the weight of source 'a' is -1"),
        (ConfigError, {"weights": {"a": math.nan, "b": 1}}, "the weight of source 'a' is nan"),
        (ConfigError, {"weights": {"a": 1, "b": math.inf}}, "the weight of source 'b' is inf"),
        (ConfigError, {"weights": {"a": 1}}, "source 'b' has no weight"),
        (ConfigError, {"weights": {"a": 1, "b": 1, "c": 1}}, "'c', which is no source"),
        (ConfigError, {"temperature": 0}, "the temperature is 0"),
        (ConfigError, {"temperature": 1, "weights": {"a": 1, "b": 1}}, "choose one way"),
        (DataError, {"sizes": {"a": 3, "b": 0}}, "source 'b' has no rows"),
        (DataError, {"sizes": {}}, r"check data\.sources"),
        (DataError, {"repeats": {"a": 0.1, "b": 0.1}}, "an epoch would hold no example"),
    ],
)
def test_errors_name_the_source(error, options, message):
    with pytest.raises(error, match=message):
        Mixture(**{"sizes": {"a": 3, "b": 4}, "seed": 0} | options)


def test_places_outside_of_the_epoch_are_refused():
    with pytest.raises(ValueError, match="of an epoch of 3"):
        Mixture({"a": 3}, seed=0).draw(0, 0, 4)
