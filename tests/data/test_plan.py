import time

import numpy as np
import pytest

from ultravox.data.plan import plan_batches
from ultravox.errors import DataError


@pytest.fixture
def lengths():
    return np.random.default_rng(0).gamma(2.5, 16, 2000).astype(int) + 5


@pytest.mark.parametrize("budget", [200, 1000, 8000])
def test_every_item_once_within_the_budget(lengths, budget):
    lengths = np.minimum(lengths, 200)
    batches = plan_batches(lengths, budget, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) * lengths[batch].max() <= budget for batch in batches)


def test_pure_function_and_new_order_each_epoch(lengths):
    asked = [(1, 3), (1, 3), (1, 4), (2, 3)]
    first, again, later, other = (plan_batches(lengths, 1000, seed, epoch) for seed, epoch in asked)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert {tuple(b) for b in first}.isdisjoint({tuple(b) for b in later})
    assert {tuple(b) for b in first}.isdisjoint({tuple(b) for b in other})


def test_little_padding(lengths):
    for epoch in range(5):
        batches = plan_batches(lengths, 1000, seed=0, epoch=epoch)
        padded = sum(len(batch) * lengths[batch].max() for batch in batches)
        assert 1 - lengths.sum() / padded <= 0.05


@pytest.mark.parametrize("budget", [400, 1200, 8000])
def test_packed_batches_count_no_padding(lengths, budget):
    lengths = np.minimum(lengths, 200)
    batches = plan_batches(lengths, budget, seed=1, epoch=0, count_padding=False)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(lengths[batch].sum() for batch in batches) <= budget
    assert len(batches) <= len(plan_batches(lengths, budget, seed=1, epoch=0))
    assert len(batches) <= np.ceil(lengths.sum() / (budget - 100))


def test_batches_are_not_needlessly_small(lengths):
    batches = plan_batches(lengths, 1000, seed=0, epoch=0)
    assert len(batches) <= 1.2 * lengths.sum() / 1000


def test_no_small_leftover_batch():
    lengths = np.random.default_rng(0).integers(20, 60, 310)
    for epoch in range(4):
        sizes = [lengths[batch].sum() for batch in plan_batches(lengths, 3000, seed=0, epoch=epoch)]
        assert min(sizes) > 0.75 * max(sizes)


def test_a_million_items_in_seconds():
    lengths = np.random.default_rng(0).integers(10, 300, 1_000_000)
    start = time.process_time()
    plan_batches(lengths, 4000, seed=0, epoch=0)
    assert time.process_time() - start < 10


def test_errors_say_what_to_change():
    with pytest.raises(DataError, match="max_batch_tokens is 10"):
        plan_batches([3, 11], 10, 0, 0)
    with pytest.raises(DataError, match="example 1 has length 0"):
        plan_batches([3, 0], 10, 0, 0)
    with pytest.raises(DataError, match="no examples"):
        plan_batches([], 10, 0, 0)
