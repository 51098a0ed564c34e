"""A stream's windows are planned as they come: every row once an epoch, from any place on, nothing lost unseen."""

import json
import pickle
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from ultravox.data.fingerprint import uid
from ultravox.data.loader import Loader
from ultravox.data.order import Position
from ultravox.data.plan import Limits
from ultravox.data.source import SourceSpec
from ultravox.data.stream_order import Examples, StreamOrder
from ultravox.data.streaming import StreamSource
from ultravox.errors import CheckpointError, DataError

from .hub_files import write_parquet

SHARDS, EACH = 4, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("order") / "set", SHARDS, EACH)


@dataclass
class Item:
    id: str
    uid: str


@pytest.fixture
def order(folder):
    """Makes an order in which a row has two versions, three prompts, and length 8 to 13; budget 30."""

    def make(unusable=lambda clip: False, length=lambda clip: 5, window=16, seed=3, share=0.01, **limits):
        def read(found):
            left_out = [("unfit", clip.id) for clip in found.clips if unusable(clip)]
            clips = [clip for clip in found.clips if not unusable(clip)]
            items = [Item(clip.id, uid("set", clip.id)) for clip in clips]
            audio = np.array([[length(clip), length(clip) + 2] for clip in clips], dtype=np.int32).reshape(-1, 2)
            text = np.array([[3, 4, 6]] * len(clips), dtype=np.int32).reshape(-1, 3)
            places = [place for place, clip in enumerate(found.clips) if not unusable(clip)]
            return Examples(items, audio, text, left_out, np.array(places, dtype=np.int64))

        source = StreamSource(
            SourceSpec(str(folder), streaming=True), window=window, seed=seed, max_quarantine_share=share
        )
        return StreamOrder(source, read, Limits(limits.pop("budget", 30)), seed=seed, fingerprint="x", **limits)

    return make


def batches(order, windows, start=0):
    return [
        order.batch(0, window, index)
        for window in range(start, start + windows)
        for index in range(order.num_batches(0, window))
    ]


def content(batch):
    rows = zip(batch.examples, batch.versions.tolist(), batch.prompts.tolist(), batch.copies.tolist(), strict=True)
    return [(example.id, *rest) for example, *rest in rows]


def test_each_row_comes_once_in_an_epoch_and_meets_its_versions_and_prompts_in_turn(order):
    found = batches(order(), 18)  # six epochs of three windows
    assert [batch.epoch for batch in found] == sorted(batch.epoch for batch in found)
    seen = {}
    for batch in found:
        assert set(batch.copies.tolist()) == {batch.epoch}
        for name, version, prompt, copy in content(batch):
            seen.setdefault(name, {})[copy] = (version, prompt)
    assert len(seen) == SHARDS * EACH
    assert all(sorted(turns) == list(range(6)) for turns in seen.values())
    assert all(len(set(turns.values())) == 6 for turns in seen.values()), "all pairs of two versions and three prompts"
    assert len({turns[0] for turns in seen.values()}) == 6, "rows are out of step with one another"


def test_batches_keep_to_the_budget_and_mix_the_window(order):
    found = batches(order(), 3)
    assert all(len(batch) * 13 <= 30 or len(batch) <= 3 for batch in found)
    assert max(len(batch) for batch in found) >= 2
    numbers = [int(name[1:]) for batch in found for name, *_ in content(batch)]
    assert np.mean(np.abs(np.diff(numbers)) == 1) < 0.5, "rows are not in the order of their shard"


def test_the_order_goes_on_from_any_place(order):
    whole = order()
    expected, states = [], []
    for window in range(7):
        expected.append([content(batch) for batch in batches(whole, 1, window)])
        states.append(json.loads(json.dumps(whole.state(Position(0, window, 1)))))
    for window in range(6):
        after = order()
        after.go_to(Position(0, window, 1), states[window])
        assert [content(batch) for batch in batches(after, 1, window)] == expected[window]
        assert [content(batch) for batch in batches(after, 1, window + 1)] == expected[window + 1]
    assert whole.fingerprint == order().fingerprint
    assert len({o.fingerprint for o in (whole, order(seed=4), order(window=8), order(budget=31))}) == 4
    with pytest.raises(CheckpointError, match="saved with seed 3, now it is 4"):
        order(seed=4).go_to(Position(0, 0, 1), states[0])


def test_a_stream_cannot_go_back(order):
    one = order()
    one.num_batches(0, 0)
    one.num_batches(0, 1)
    assert one.state(Position(0, 0, 0))["row"] == 0, "the place of a window that is gone is still known"
    with pytest.raises(ValueError, match="window 0 of a stream that is at window 1"):
        one.num_batches(0, 0)


def test_epochs_are_those_of_the_stream(order):
    one = order()
    counted = []
    for window in range(6):
        for batch in range(one.num_batches(0, window)):
            counted.append(one.epochs(Position(0, window, batch)))
    assert counted[0] == 0
    assert counted == sorted(counted)
    assert one.epochs(Position(0, 3, 0)) == 1
    assert 1.5 < counted[-1] < 2


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_of_more_batches_than_a_window_holds(order, workers):
    """A loader plans ahead over windows that are gone when the step begins; the order is never asked to go back."""
    expected = [content(batch) for batch in batches(order(window=4), 25)]
    steps = Loader(order(window=4), ids_of, batches_per_step=7, workers=workers).steps(Position())
    taken = list(islice(steps, 5))
    steps.close()
    assert [loaded.batch for step in taken for loaded in step.batches] == expected[:35]
    assert len({loaded.position.window for loaded in taken[0].batches}) > 2


def ids_of(planned, position):
    return content(planned)


def test_a_batch_can_travel_to_a_worker(order):
    first = batches(order(), 1)[0]
    again = pickle.loads(pickle.dumps(first))
    assert (content(again), again.epoch, again.num_rows) == (content(first), 0, 16)


def test_what_gives_no_example_is_told_of_once_and_judged(order):
    one = order(unusable=lambda clip: clip.id == "r7", length=lambda clip: 30 if clip.id == "r9" else 5, share=0.05)
    found = batches(one, 3)
    assert sorted(fault for batch in found for fault in batch.left_out) == [
        ("longer than max_batch_tokens", "r9"),
        ("unfit", "r7"),
    ]
    assert sum(batch.num_rows for batch in found) == SHARDS * EACH
    assert Counter(name for batch in found for name, *_ in content(batch)).keys().isdisjoint({"r7", "r9"})
    strict = order(unusable=lambda clip: clip.id == "r7")
    with pytest.raises(DataError, match=r"1 of 40 clips cannot be used \(1 unfit\)"):
        batches(strict, 6)


def test_windows_without_an_example_are_passed_over(order):
    one = order(unusable=lambda clip: clip.id != "r7", share=1.0, window=5)
    found = batches(one, 2)
    assert [content(batch)[0][0] for batch in found] == ["r7", "r7"]
    assert [batch.epoch for batch in found] == [0, 1]
    again = order(unusable=lambda clip: clip.id != "r7", share=1.0, window=5)
    again.go_to(Position(0, 1, 0), json.loads(json.dumps(one.state(Position(0, 1, 0)))))
    assert content(again.batch(0, 1, 0)) == content(found[1])


def test_a_stream_without_an_example_ends(order):
    with pytest.raises(DataError, match=r"no clip of a whole epoch can be trained on \(\d+ unfit\)"):
        order(unusable=lambda clip: True, share=1.0).num_batches(0, 0)
