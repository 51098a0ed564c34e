import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from ultravox.data.fingerprint import fingerprint, uid
from ultravox.data.mixture import Mixture
from ultravox.data.order import DataOrder, rank_slice
from ultravox.data.plan import Limits
from ultravox.errors import ConfigError, DataError


def order(seed=0, window_rows=1 << 22, limits=None, **changes):
    random = np.random.default_rng(0)
    audio, text = random.integers(5, 60, (50, 3)), random.integers(5, 9, (50, 1))
    mixture = changes.pop("mixture", None) or Mixture({"a": 40, "b": 10}, repeats={"a": 1, "b": 2}, seed=seed)
    values = {"audio_tokens": audio, "text_tokens": text, "limits": limits or Limits(300), "fingerprint": "x"} | changes
    return DataOrder(mixture=mixture, seed=seed, window_rows=window_rows, **values)


def batches_of(order, epoch):
    windows = range(order.num_windows(epoch))
    return [
        order.batch(epoch, window, index) for window in windows for index in range(order.num_batches(epoch, window))
    ]


def items_of(order, epoch):
    fields = ("rows", "versions", "prompts", "copies")
    return [
        item
        for batch in batches_of(order, epoch)
        for item in zip(*(getattr(batch, field).tolist() for field in fields), strict=True)
    ]


@pytest.mark.parametrize("window_rows", [1 << 22, 17])
def test_every_example_as_often_as_it_repeats_in_each_epoch(window_rows):
    for epoch in range(4):
        counts = Counter(row for row, *_ in items_of(order(window_rows=window_rows), epoch))
        assert counts == {**dict.fromkeys(range(40), 1), **dict.fromkeys(range(40, 50), 2)}


def test_every_speed_in_as_few_epochs_as_possible():
    seen = Counter((row, version) for epoch in range(3) for row, version, *_ in items_of(order(), epoch))
    assert all(seen[row, version] == 1 for row in range(40) for version in range(3))
    assert all(seen[row, version] == 2 for row in range(40, 50) for version in range(3))


def test_not_all_at_the_same_speed():
    versions = Counter(version for _, version, *_ in items_of(order(), 0))
    assert min(versions.values()) > 8


@pytest.mark.parametrize(("num_versions", "num_prompts"), [(3, 3), (2, 3), (2, 4), (1, 4)])
def test_speeds_and_prompts_meet_in_all_pairs(num_versions, num_prompts):
    audio, text = np.full((6, num_versions), 7), np.full((6, num_prompts), 5)
    paired = DataOrder(audio, text, Mixture({"a": 6}, seed=0), Limits(100), seed=0)
    seen = {row: [] for row in range(6)}
    for epoch in range(num_versions * num_prompts):
        for row, version, prompt, copy in items_of(paired, epoch):
            assert copy == epoch
            seen[row].append((version, prompt))
    for pairs in seen.values():
        assert len(set(pairs)) == num_versions * num_prompts
        assert len({prompt for _, prompt in pairs[:num_prompts]}) == num_prompts
    assert len({tuple(pairs) for pairs in seen.values()}) > 1  # out of step with one another


def test_what_does_not_exist_is_never_drawn():
    audio, text = np.array([[10, 0, 12]] * 5 + [[0, 0, 0]]), np.array([[0, 3, 4]] * 5 + [[0, 6, 0]])
    partial = DataOrder(audio, text, Mixture({"a": 6}, seed=0), Limits(100), seed=0)
    found = [(row, version, prompt) for epoch in range(8) for row, version, prompt, _ in items_of(partial, epoch)]
    assert {version for row, version, _ in found if row < 5} == {0, 2}
    assert {prompt for row, _, prompt in found if row < 5} == {1, 2}
    assert {(version, prompt) for row, version, prompt in found if row == 5} == {(0, 1)}  # text alone


def test_what_fits_into_no_batch_is_refused_before_any_epoch_draws_it():
    with pytest.raises(DataError, match="the longest example has 101 tokens, but max_batch_tokens is 100"):
        order(audio_tokens=np.array([[10, 0]] * 49 + [[20, 93]]), text_tokens=np.full((50, 1), 8), limits=Limits(100))
    with pytest.raises(DataError, match="example 49 has neither audio nor text"):
        order(audio_tokens=np.array([[1]] * 49 + [[0]]), text_tokens=np.zeros((50, 1), dtype=int))
    with pytest.raises(ValueError, match="expected"):
        order(audio_tokens=np.ones((49, 1), dtype=int))


def test_pure_function_without_state():
    forward, backward = order(window_rows=20), order(window_rows=20)
    first = [items_of(forward, epoch) for epoch in range(5)]
    assert first == [items_of(backward, epoch) for epoch in reversed(range(5))][::-1]
    assert first[0] != items_of(order(seed=1, window_rows=20), 0)
    assert [item[0] for item in first[0]] != [item[0] for item in first[1]]
    scattered = order(window_rows=20)
    last_first = [scattered.batch(2, window, 0).rows.tolist() for window in (2, 0, 1, 2)]
    assert last_first == [forward.batch(2, window, 0).rows.tolist() for window in (2, 0, 1, 2)]


def test_the_same_in_a_fresh_process():
    code = (
        "import numpy as np; from ultravox.data.mixture import Mixture; from ultravox.data.order import DataOrder; "
        "from ultravox.data.plan import Limits\n"
        "r = np.random.default_rng(0); a, t = r.integers(5, 60, (50, 3)), r.integers(5, 9, (50, 1))\n"
        "m = Mixture({'a': 40, 'b': 10}, repeats={'a': 1, 'b': 2}, seed=0)\n"
        "o = DataOrder(a, t, m, Limits(300), seed=0, fingerprint='x')\n"
        "print(o.fingerprint, [o.batch(3, 0, i).rows.tolist() for i in range(o.num_batches(3, 0))])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == f"{order().fingerprint} {[batch.rows.tolist() for batch in batches_of(order(), 3)]}"


@pytest.mark.parametrize("mode", ["padded", "packed", "best_fit"])
def test_the_budget_holds_in_every_mode(mode):
    planned = order(limits=Limits(200, mode))
    random = np.random.default_rng(0)
    audio, text = random.integers(5, 60, (50, 3)), random.integers(5, 9, (50, 1))
    for batch in batches_of(planned, 0):
        total = audio[batch.rows, batch.versions] + text[batch.rows, batch.prompts]
        assert (len(batch) * total.max() if mode == "padded" else total.sum()) <= 200


class Quadratic:
    def __init__(self, factor=1.0):
        self.factor = factor

    def predict(self, num_rows, audio_tokens, text_tokens):
        return self.factor * num_rows * (audio_tokens + text_tokens).astype(float) ** 2


def test_whatever_changes_the_order_changes_the_fingerprint():
    random = np.random.default_rng(0)
    audio = random.integers(5, 60, (50, 3))
    audio[7, 1] += 1
    mixture = Mixture({"a": 40, "b": 10}, repeats={"a": 1, "b": 2.5}, seed=0)
    others = [
        order(seed=1),
        order(fingerprint="y"),
        order(audio_tokens=audio),
        order(text_tokens=np.full((50, 1), 4)),
        order(mixture=mixture),
        order(limits=Limits(301)),
        order(limits=Limits(300, "packed")),
        order(limits=Limits(300, memory=Quadratic(), max_batch_bytes=10**6)),
        order(limits=Limits(300, memory=Quadratic(), max_batch_bytes=10**6 + 1)),
        order(limits=Limits(300, memory=Quadratic(1.5), max_batch_bytes=10**6)),
        order(window_rows=30),
    ]
    assert order().fingerprint == order().fingerprint
    assert len({each.fingerprint for each in [order(), *others]}) == len(others) + 1


def test_there_is_nothing_behind_the_last_window():
    planned = order(window_rows=20)
    with pytest.raises(IndexError, match="window 3 of epoch 0, which has 3"):
        planned.batch(0, 3, 0)


def test_going_on_late_takes_one_windows_planning():
    count, width = 300_000, 20_000
    lengths = np.random.default_rng(0).integers(10, 300, (count, 1))

    def seconds(epoch, window):
        fresh = DataOrder(lengths, 0 * lengths, Mixture({"a": count}, seed=0), Limits(4000), seed=0, window_rows=width)
        start = time.process_time()
        fresh.batch(epoch, window, 3)
        assert len(fresh._windows) == 1
        return time.process_time() - start

    early, late = (min(seconds(epoch, window) for _ in range(3)) for epoch, window in ((0, 0), (4321, 14)))
    assert late < 2 * early + 0.02


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_order_is_the_same_for_every_world_size(world_size):
    steps = [[rank_slice(step, 4, rank, world_size) for rank in range(world_size)] for step in range(3)]
    assert sorted(index for step in steps for rank in step for index in rank) == list(range(12))
    assert all(
        sorted(index for rank in step for index in rank) == [*range(4 * s, 4 * s + 4)] for s, step in enumerate(steps)
    )
    assert all(len(rank) == 4 // world_size for step in steps for rank in step)


def test_ranks_that_cannot_share_evenly_are_told_so():
    with pytest.raises(ConfigError, match="4 batches per step cannot be dealt to 3 processes evenly"):
        rank_slice(0, 4, 0, 3)


def test_no_examples_is_an_error_that_says_what_to_check():
    with pytest.raises(DataError, match=r"check data\.sources"):
        Mixture({}, seed=0)


def test_fingerprints_tell_lists_apart():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint(["ab", "c"]) == fingerprint(["ab", "c"])


def test_an_example_keeps_its_name():
    assert uid("f" * 64, "clip-7") == uid("f" * 64, "clip-7")
    assert len({uid("f" * 64, "clip-7"), uid("f" * 64, "clip-8"), uid("e" * 64, "clip-7")}) == 3
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in [uid("", str(i)) for i in range(9)])
