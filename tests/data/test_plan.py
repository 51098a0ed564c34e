import time

import numpy as np
import pytest

from ultravox.data.packing import pack
from ultravox.data.plan import Limits, plan, plan_batches
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


# Two dimensions, memory, packing


def speech(count, seed=0):
    """Audio and text tokens of read speech: most clips of 10 to 16 s, some shorter."""
    random = np.random.default_rng(seed)
    seconds = np.interp(random.random(count), [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], [1, 3.5, 9.8, 13.4, 15.1, 17.2, 19])
    text = 25 + np.round(3.65 * seconds * random.normal(1, 0.15, count).clip(0.5, 2))
    return np.ceil(10 * seconds).astype(int), text.astype(int)


def waste(values, batches):
    """Share of padding, where each batch is padded to its largest value."""
    padded = sum(len(batches[i]) * values[batches[i]].max() for i in range(len(batches)))
    return 1 - values.sum() / padded


def test_little_padding_of_audio_and_of_the_whole_sequence():
    audio, text = speech(30_000)
    batches = plan(audio, text, Limits(4000), [0])
    assert waste(audio + text, batches) < 0.04
    assert waste(audio, batches) < 0.04
    one_dimensional = plan_batches(audio + text, 4000, 0, 0)
    assert waste(audio, one_dimensional) > 2 * waste(audio, batches)


@pytest.mark.parametrize("mode", ["padded", "packed", "best_fit"])
def test_batches_come_in_random_order(mode):
    audio, text = speech(5000)
    batches = plan(audio, text, Limits(1500, mode), [0])
    means = [(audio + text)[batches[i]].mean() for i in range(len(batches))]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15


def test_few_examples_are_sorted_by_length_alone():
    audio, text = speech(400)
    batches = plan(audio, text, Limits(3000), [0])
    assert waste(audio + text, batches) < 0.05
    assert len(batches) <= 1 + 1.06 * (audio + text).sum() / 3000


class Linear:
    """A gigabyte for the model, then so much for each padded token of audio and text."""

    def predict(self, num_rows, audio_tokens, text_tokens):
        return 1e9 + num_rows * (2e6 * audio_tokens + 1e6 * text_tokens)


@pytest.mark.parametrize("mode", ["padded", "packed", "best_fit"])
@pytest.mark.parametrize("max_batch_bytes", [2e9, 3e9])
def test_batches_respect_tokens_and_memory(mode, max_batch_bytes):
    audio, text = speech(3000)
    limits = Limits(4000, mode, Linear(), max_batch_bytes)
    batches = plan(audio, text, limits, [0])
    needed = [
        Linear().predict(len(b), audio[b].max(), text[b].max()) for b in map(batches.__getitem__, range(len(batches)))
    ]
    tokens = [batch_tokens(audio + text, batches[i], mode) for i in range(len(batches))]
    assert max(tokens) <= 4000
    assert max(needed) <= max_batch_bytes
    assert np.array_equal(np.sort(batches.items), np.arange(3000))
    assert len(batches) > len(plan(audio, text, Limits(4000, mode), [0]))
    if mode != "best_fit":
        assert np.median(needed) > 0.9 * max_batch_bytes


def batch_tokens(total, batch, mode):
    return len(batch) * total[batch].max() if mode == "padded" else total[batch].sum()


def test_an_example_that_takes_too_much_memory_alone_is_refused():
    with pytest.raises(
        DataError, match=r"300 tokens of audio, 4 of text\) needs 1.60 GB, but a batch may take 1.50 GB"
    ):
        plan(np.array([100, 300]), np.array([4, 4]), Limits(1000, memory=Linear(), max_batch_bytes=int(1.5e9)), [0])


@pytest.mark.parametrize("capacity", [1024, 2048, 8192])
def test_packed_sequences_are_full(capacity):
    audio, text = speech(20_000)
    total = audio + text
    batches = plan(audio, text, Limits(capacity, "best_fit"), [0])
    loads = np.array([total[batches[i]].sum() for i in range(len(batches))])
    assert np.array_equal(np.sort(batches.items), np.arange(20_000))
    assert loads.max() <= capacity
    assert loads.mean() >= 0.98 * capacity
    assert loads.min() >= 0.8 * capacity


def test_packed_sequences_hold_all_lengths_and_mix_anew():
    audio, text = speech(5000)
    total = audio + text
    first, second = (plan(audio, text, Limits(4096, "best_fit"), [epoch]) for epoch in (0, 1))
    assert all(total[first[i]].max() > 1.3 * total[first[i]].min() for i in range(len(first)))
    together = [
        {tuple(sorted(pair)) for i in range(len(b)) for pair in zip(b[i][:-1], b[i][1:], strict=True)}
        for b in (first, second)
    ]
    assert len(together[0] & together[1]) < 0.02 * len(together[0])


@pytest.mark.parametrize(("lengths", "capacity"), [([9] * 7, 10), ([10] * 5, 10), ([1], 10), ([6, 5, 5, 4, 7, 3], 10)])
def test_packing_of_a_few(lengths, capacity):
    items, ends = pack(np.array(lengths), capacity, np.random.default_rng(0))
    parts = np.split(np.array(lengths)[items], ends[:-1])
    assert sorted(items.tolist()) == list(range(len(lengths)))
    assert all(0 < part.sum() <= capacity for part in parts)
    assert len(parts) == {70: 7, 63: 7, 50: 5, 1: 1, 30: 3}[sum(lengths)]


def test_long_ones_that_share_with_none_still_get_a_place():
    lengths = np.random.default_rng(0).integers(55, 100, 3000)
    items, ends = pack(lengths, 100, np.random.default_rng(0))
    assert sorted(items.tolist()) == list(range(3000))
    assert len(ends) == 3000


def test_a_plan_of_any_mode_is_pure():
    audio, text = speech(2000)
    for mode in ("padded", "packed", "best_fit"):
        first, again, other = (plan(audio, text, Limits(3000, mode), seed) for seed in ([1, 2], [1, 2], [1, 3]))
        assert np.array_equal(first.items, again.items)
        assert np.array_equal(first.ends, again.ends)
        assert not np.array_equal(first.items, other.items)
        with pytest.raises(IndexError, match="batch"):
            first[len(first)]
