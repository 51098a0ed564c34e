from collections import Counter

import numpy as np
import pytest

from ultravox.data.loader import BatchOrder, fingerprint
from ultravox.errors import DataError


def items_of(order, epoch):
    return [item for index in range(order.num_batches(epoch)) for item in order.batch(epoch, index)]


def order(seed=0):
    lengths = np.random.default_rng(0).integers(5, 60, (50, 3))
    return BatchOrder(lengths, [1] * 40 + [2] * 10, max_batch_tokens=300, seed=seed)


def test_every_example_as_often_as_it_repeats_in_each_epoch():
    for epoch in range(4):
        counts = Counter(item.example for item in items_of(order(), epoch))
        assert counts == {**dict.fromkeys(range(40), 1), **dict.fromkeys(range(40, 50), 2)}


def test_every_speed_in_as_few_epochs_as_possible():
    seen = Counter((item.example, item.version) for epoch in range(3) for item in items_of(order(), epoch))
    assert all(seen[example, version] == 1 for example in range(40) for version in range(3))
    assert all(seen[example, version] == 2 for example in range(40, 50) for version in range(3))


def test_not_all_at_the_same_speed():
    versions = Counter(item.version for item in items_of(order(), 0))
    assert min(versions.values()) > 8


def test_a_version_that_does_not_exist_is_never_drawn():
    lengths = [[10, 0, 12]] * 5
    partial = BatchOrder(lengths, [1] * 5, 100, seed=0)
    assert {item.version for epoch in range(6) for item in items_of(partial, epoch)} == {0, 2}


def test_a_version_over_the_budget_is_refused_before_any_epoch_draws_it():
    with pytest.raises(DataError, match="the longest example has 101 tokens, but max_batch_tokens is 100"):
        BatchOrder([[10, 0, 12], [20, 101, 0]], [1, 1], 100, seed=0)


def test_no_examples_is_an_error_that_says_what_to_check():
    with pytest.raises(DataError, match=r"check data\.sources"):
        BatchOrder([], [], 100, seed=0).num_batches(0)


def test_pure_function_without_state():
    forward, backward = order(), order()
    first = [items_of(forward, epoch) for epoch in range(5)]
    assert first == [items_of(backward, epoch) for epoch in reversed(range(5))][::-1]
    assert first[0] != [items_of(order(seed=1), 0)]
    assert first[0] != first[1]


def test_fingerprints_tell_lists_apart():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint(["ab", "c"]) == fingerprint(["ab", "c"])
