"""Several streams in one: the shares that were asked for, each row once in an epoch of its own, from any place on."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest

from ultravox.data.filters import Filters
from ultravox.data.fingerprint import uid
from ultravox.data.order import Position
from ultravox.data.plan import Limits
from ultravox.data.source import SourceSpec
from ultravox.data.stream_mixture import StreamMixture
from ultravox.data.stream_order import Examples, StreamOrder
from ultravox.data.streaming import StreamSource
from ultravox.errors import CheckpointError, DataError

from .hub_files import write_parquet

ROWS = {"a": 40, "b": 12, "c": 4}  # in 4, 4 and 2 shards


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    shards = {"a": 4, "b": 4, "c": 2}
    return {key: write_parquet(root / key, shards[key], ROWS[key] // shards[key]) for key in ROWS}


@pytest.fixture
def mixture(folders):
    """Makes a mixture of some of the streams."""

    def make(keys="ab", weights=None, window=8, seed=7, rank=0, world_size=1, share=0.01, **spec):
        streams = {
            key: StreamSource(
                SourceSpec(str(folders[key]), streaming=True, **spec),
                window=1,
                seed=seed,
                rank=rank,
                world_size=world_size,
                key=key,
            )
            for key in keys
        }
        given = None if weights is None else dict(zip(keys, weights, strict=True))
        return StreamMixture(streams, given, window=window, max_quarantine_share=share)

    return make


def content(windows):
    return [
        [("abc"[stream], epoch, clip.id) for stream, epoch, clip in zip(w.streams, w.epochs, w.clips, strict=True)]
        for w in windows
    ]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("weights", [None, (3, 1, 1), (0.62, 0.3, 0.08), (1, 1e-2, 1e-2)])
def test_each_stream_has_its_share_at_every_place(mixture, weights, world_size):
    for rank in range(world_size):
        one = mixture("abc", weights, window=7, rank=rank, world_size=world_size)
        drawn = [stream for window in islice(one, 60) for stream in window.streams]
        shares = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
        assert list(one.shares.values()) == pytest.approx(shares.tolist())
        counts = np.cumsum(np.eye(3)[drawn], axis=0)
        wanted = np.outer(np.arange(1, len(drawn) + 1), shares)
        assert np.abs(counts - wanted).max() < 2
        assert len(drawn) == 60 * 7


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_row_comes_once_in_an_epoch_of_its_stream_to_one_rank(mixture, world_size):
    ranks = [content(islice(mixture("abc", rank=r, world_size=world_size), 30)) for r in range(world_size)]
    for number, key in enumerate("abc"):
        wholes = []
        for windows in ranks:
            mine = [(epoch, name) for window in windows for stream, epoch, name in window if stream == key]
            assert [epoch for epoch, _ in mine] == sorted(epoch for epoch, _ in mine)
            wholes.append(mine)
        complete = min(mine[-1][0] for mine in wholes)
        assert complete >= (1, 3, 9)[number]
        for epoch in range(complete):
            names = [name for mine in wholes for e, name in mine if e == epoch]
            assert sorted(names) == sorted(f"r{n}" for n in range(ROWS[key]))


def test_an_order_repeats_with_its_seed_and_differs_with_another(mixture):
    first = content(islice(mixture("abc"), 9))
    assert content(islice(mixture("abc"), 9)) == first
    assert content(islice(mixture("abc", seed=8), 9)) != first


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_goes_on_from_every_window(mixture, world_size):
    options = {"keys": "abc", "weights": (5, 2, 1), "rank": world_size - 1, "world_size": world_size, "window": 5}
    whole, states = mixture(**options), []
    expected = []
    for window in islice(whole, 25):
        expected += content([window])
        states.append(json.loads(json.dumps(whole.state_dict())))
    for number, state in enumerate(states):
        after = mixture(**options)
        after.load_state_dict(state)
        assert after.state_dict() == state
        assert content(islice(after, 25 - number)) == expected[number:]
    assert whole.state_dict()["streams"]["c"]["epoch"] >= 3
    whole.rewind()
    assert content(islice(whole, 25)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (2, 1)}, r"saved with weights \{'a': 1, 'b': 1\}, now it is \{'a': 2, 'b': 1\}: go on with"),
        ({"keys": "ac"}, "saved with weights"),
        ({"window": 9}, r"saved with data\.stream_window 8, now it is 9"),
        ({"world_size": 2}, "saved with number of processes 1, now it is 2"),
        ({"seed": 8}, "saved with seed 7, now it is 8"),
        ({"filters": Filters(max_seconds=9)}, "saved with rows or options other than now"),
    ],
)
def test_the_state_of_other_streams_is_refused(mixture, change, message):
    with pytest.raises(CheckpointError, match=message):
        mixture(**change).load_state_dict(mixture().state_dict())


def test_a_stream_of_fewer_shards_than_processes_is_refused(mixture):
    with pytest.raises(DataError, match="c has 2 shards, which cannot be dealt out evenly to 4 processes"):
        mixture("abc", world_size=4)


def test_only_streams_in_windows_of_one_clip_can_be_mixed(folders):
    wide = StreamSource(SourceSpec(str(folders["a"]), streaming=True), window=2, seed=0)
    with pytest.raises(ValueError, match="windows of one clip"):
        StreamMixture({"a": wide}, window=4)


@dataclass
class Item:
    id: str
    uid: str


def order_of(mixture, usable=lambda stream, clip: True, budget=60, **options):
    """Batches of rows of length 8."""
    source = mixture(**options)

    def read(window):
        pairs = zip(window.streams, window.clips, strict=True)
        places = [i for i, (stream, clip) in enumerate(pairs) if usable(stream, clip)]
        items = [Item(window.clips[i].id, uid(str(window.streams[i]), window.clips[i].id)) for i in places]
        lengths = np.full((len(items), 1), 4, dtype=np.int32)
        return Examples(items, lengths, lengths, [], np.array(places, dtype=np.int64))

    return StreamOrder(source, read, Limits(budget), seed=7, fingerprint="x")


def batches(order, windows, start=0):
    return [
        (Position(0, window, index), order.batch(0, window, index))
        for window in range(start, start + windows)
        for index in range(order.num_batches(0, window))
    ]


def names(found):
    return [[(e.id, e.uid, c) for e, c in zip(b.examples, b.copies.tolist(), strict=True)] for _, b in found]


def test_an_order_of_several_streams_goes_on_from_every_batch(mixture):
    """What is left out moves the shares of later windows, and a checkpoint knows of it."""

    def usable(stream, clip):
        return stream != 1 or int(clip.id[1:]) % 3

    whole = order_of(mixture, usable, window=16)
    found = batches(whole, 10)
    for position, _ in found:
        after = order_of(mixture, usable, window=16)
        after.go_to(position, json.loads(json.dumps(whole.state(position))))
        ahead = batches(after, 10 - position.window, position.window)
        assert names(ahead) == names([pair for pair in found if pair[0].window >= position.window])
        assert after.mixture(position) == whole.mixture(position)
        assert after.epochs(position) == whole.epochs(position)
    epochs = [whole.epochs(position) for position, _ in found]
    assert epochs == sorted(epochs)
    assert epochs[-1] > 1


def test_the_shares_are_of_the_examples_also_where_many_clips_become_none(mixture):
    """Two of three rows of the second stream are of no use; it is drawn from three times as much."""

    def usable(stream, clip):
        return stream != 1 or int(clip.id[1:]) % 3 == 0

    order = order_of(mixture, usable, weights=(3, 1), window=16)
    found = batches(order, 40)
    counts = Counter(example.uid for _, batch in found for example in batch.examples)
    of_first = sum(counts[uid("0", f"r{n}")] for n in range(ROWS["a"]))
    position = Position(0, 39, order.num_batches(0, 39))
    told = order.mixture(position)
    assert told["a"]["realised"] == pytest.approx(of_first / counts.total(), abs=1e-12)
    assert (told["a"]["requested"], told["b"]["requested"]) == (0.75, 0.25)
    assert told["a"]["realised"] == pytest.approx(0.75, abs=16 / counts.total())


def test_what_is_told_of_the_shares_is_counted_batch_by_batch(mixture):
    order = order_of(mixture, weights=(2, 1))
    seen = Counter()
    for position, batch in batches(order, 8):
        told = order.mixture(position)
        if total := seen.total():
            assert told["b"]["realised"] == pytest.approx(seen["b"] / total, abs=1e-12)
        seen += Counter("b" if example.uid == uid("1", example.id) else "a" for example in batch.examples)
    assert seen["a"] / seen.total() == pytest.approx(2 / 3, abs=0.02)


def test_other_weights_are_another_order(mixture):
    orders = [order_of(mixture), order_of(mixture, weights=(1, 1)), order_of(mixture, weights=(2, 1))]
    assert orders[0].fingerprint == orders[1].fingerprint != orders[2].fingerprint


def test_a_stream_of_which_nothing_can_be_used_ends_the_run(mixture):
    with pytest.raises(DataError, match="no clip of a whole epoch of b can be trained on: leave it out, or check its"):
        batches(order_of(mixture, lambda stream, clip: stream == 0), 200)


def test_too_many_faults_end_the_run(mixture):
    one = mixture()
    windows = iter(one)
    next(windows)
    one.set_aside([("unfit", "r1")])  # of eight rows: they are not judged yet
    list(islice(windows, 12))
    with pytest.raises(DataError, match=r"2 of 104 clips cannot be used \(2 unfit\)"):
        one.set_aside([("unfit", "r2")])


def test_an_id_that_comes_twice_in_a_window_is_set_aside_and_one_of_the_next_epoch_is_not(mixture, folders, tmp_path):
    shutil.copytree(folders["b"], tmp_path / "b")
    path = sorted((tmp_path / "b").glob("*.parquet"))[0]
    table = pq.read_table(path)
    place = table.column_names.index("id")
    first = table.column("id")[0].as_py()
    pq.write_table(table.set_column(place, "id", [[first] * len(table)]), path)
    folders = {"a": folders["a"], "b": tmp_path / "b"}
    streams = {
        key: StreamSource(SourceSpec(str(folder), streaming=True), window=1, seed=7, max_quarantine_share=0.5, key=key)
        for key, folder in folders.items()
    }
    one = StreamMixture(streams, window=80, max_quarantine_share=0.5)
    window = next(iter(one))  # 40 of each: more than three epochs of the small one
    found = [(epoch, clip.id) for epoch, stream, clip in zip(window.epochs, window.streams, window.clips, strict=True)]
    assert len(set(zip(window.streams, found, strict=True))) == len(found) < 80
    assert {reason for reason, _ in window.left_out} == {"id twice"}
    assert len(window.left_out) == len(set(window.left_out)) == 80 - len(found)
    mine = [place for place, stream in zip(found, window.streams, strict=True) if stream == 1]
    assert sorted(epoch for epoch, name in mine if name == first) == sorted({epoch for epoch, _ in mine})
