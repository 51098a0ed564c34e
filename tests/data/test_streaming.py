"""A stream gives each row once an epoch to one rank, in an order that a resumed run repeats."""

import json
import os
import pickle
import signal
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
from datasets.distributed import split_dataset_by_node

from ultravox.audio.waveform import load_waveform
from ultravox.data.clip import Clip
from ultravox.data.filters import Filters
from ultravox.data.prepare import prepare_dataset
from ultravox.data.sharding import PrepareOptions
from ultravox.data.source import SourceSpec
from ultravox.data.streaming import StreamSource, require_whole
from ultravox.errors import CheckpointError, DataError

from .hub_files import wav, write_parquet

SHARDS, EACH = 4, 5
ALL = {f"r{n}" for n in range(SHARDS * EACH)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("stream") / "set", SHARDS, EACH)


@pytest.fixture
def stream(folder):
    """Makes a stream; a rank of two has 10 rows in an epoch, so 4 windows of 3."""

    def make(rank=0, world_size=2, window=3, seed=7, **spec):
        return StreamSource(
            SourceSpec(str(folder), streaming=True, **spec), window=window, seed=seed, rank=rank, world_size=world_size
        )

    return make


def ids(windows) -> list[list[str]]:
    return [[clip.id for clip in window.clips] for window in windows]


def flat(windows) -> list[str]:
    return [name for window in windows for name in window]


def test_two_ranks_cover_each_row_once_in_each_epoch(stream):
    for epoch in range(3):
        ranks = [flat(ids(islice(stream(rank), 4 * epoch, 4 * epoch + 4))) for rank in (0, 1)]
        assert sorted(ranks[0] + ranks[1]) == sorted(ALL), "each row once, none twice"
        assert not set(ranks[0]) & set(ranks[1])
        assert len(ranks[0]) == len(ranks[1]) == 10


def test_windows_end_with_the_epoch(stream):
    assert [len(window) for window in ids(islice(stream(), 8))] == [3, 3, 3, 1] * 2
    assert [len(window) for window in ids(islice(stream(window=100, world_size=1), 2))] == [20, 20]


def test_the_order_differs_between_epochs_and_seeds_and_repeats_with_the_seed(stream):
    epochs = [stream(world_size=1).shards(epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(SHARDS)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 1
    assert [stream(world_size=1, seed=8).shards(epoch) for epoch in range(4)] != epochs
    first, second = (flat(ids(islice(stream(world_size=1, window=20), 2))) for _ in range(2))
    assert first == second
    assert first[:20] != first[20:]


def test_a_state_is_the_beginning_of_the_window_that_came_last(stream):
    whole = ids(islice(stream(), 9))
    for consumed in range(8):
        before = stream()
        windows = iter(before)
        taken = ids(islice(windows, consumed))
        state = json.loads(json.dumps(before.state_dict()))
        after = stream()
        after.load_state_dict(state)
        again = max(0, consumed - 1)
        assert taken == whole[:consumed]
        assert ids(islice(after, 9 - again)) == whole[again:]


def test_a_resumed_stream_says_where_it_is_before_it_goes_on(stream):
    before = stream()
    list(islice(before, 3))
    after = stream()
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()


KILLED = """
import json, sys
from ultravox.data.source import SourceSpec
from ultravox.data.streaming import StreamSource
stream = StreamSource(SourceSpec(sys.argv[1], streaming=True), window=3, seed=7, rank=1, world_size=2)
for window in stream:
    print(json.dumps({"ids": [clip.id for clip in window.clips], "state": stream.state_dict()}), flush=True)
"""


def test_a_killed_process_goes_on_in_the_middle_of_an_epoch(stream, folder):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    seen = [json.loads(process.stdout.readline()) for _ in range(6)]  # in the second epoch of four windows
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    resumed = stream(rank=1)
    resumed.load_state_dict(seen[-1]["state"])
    following = ids(islice(resumed, 6))
    assert seen[-1]["state"]["epoch"] == 1
    assert [entry["ids"] for entry in seen[:5]] + following == ids(islice(stream(rank=1), 11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 4}, "saved with number of processes 2, now it is 4"),
        ({"rank": 1}, "saved with rank 0, now it is 1"),
        ({"seed": 8}, "saved with seed 7"),
        ({"window": 4}, r"saved with data\.stream_window 3"),
        ({"filters": Filters(max_seconds=9)}, "saved with rows or options other than now: go on with what it was"),
    ],
)
def test_the_state_of_another_stream_is_refused(stream, change, message):
    with pytest.raises(CheckpointError, match=message):
        stream(**change).load_state_dict(stream().state_dict())


def test_changed_data_is_another_stream(tmp_path):
    spec = SourceSpec(str(write_parquet(tmp_path / "set", 2, 2)), streaming=True)
    state = StreamSource(spec, window=2, seed=0).state_dict()
    for file in (tmp_path / "set").iterdir():
        os.utime(file, (0, 0))
    StreamSource(spec, window=2, seed=0).load_state_dict(state)
    write_parquet(tmp_path / "set", 2, 3)
    with pytest.raises(CheckpointError, match="rows or options other than now"):
        StreamSource(spec, window=2, seed=0).load_state_dict(state)


def test_shards_that_cannot_be_dealt_out_evenly_are_refused(stream):
    with pytest.raises(DataError, match="has 4 shards, which cannot be dealt out evenly to 3 processes"):
        stream(world_size=3)


def test_a_dataset_that_is_split_already_is_refused(stream):
    whole = stream().source.stream
    require_whole(whole, "x")
    with pytest.raises(DataError, match="x is split among the processes already"):
        require_whole(split_dataset_by_node(whole, 0, 2), "x")


def test_a_split_stream_is_refused_where_it_would_be_split_again(folder, monkeypatch):
    from ultravox.data.huggingface import HuggingFaceSource

    spec = SourceSpec(str(folder), streaming=True)
    split = split_dataset_by_node(HuggingFaceSource(spec).stream, 0, 2)
    monkeypatch.setattr(HuggingFaceSource, "stream", split)
    with pytest.raises(DataError, match="split among the processes already"):
        StreamSource(spec, window=3, seed=0)


def test_a_worker_process_of_a_loader_is_refused(stream):
    from torch.utils.data import DataLoader, IterableDataset

    class Wrapped(IterableDataset):
        def __iter__(self):
            return iter(stream())

    with pytest.raises(DataError, match="iterate it in the main one"):
        next(iter(DataLoader(Wrapped(), batch_size=None, num_workers=1)))


def test_filters_and_faults_are_counted(stream, tmp_path):
    german = stream(filters=Filters(languages=["de"]), world_size=1, window=100)
    assert {clip.language for clip in next(iter(german)).clips} == {"de"}
    assert german.quarantine.counts() == {"other language": 10}
    with pytest.raises(DataError, match=r"no clip is left of 10 \(10 other language\)"):
        next(iter(stream(filters=Filters(languages=["fr"]))))


def test_too_many_faulty_rows_stop_the_stream(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .hub_files import rows

    columns = rows(20)
    columns["text"][3], columns["audio"][5]["bytes"] = " ", b"nonsense"
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    spec = SourceSpec(str(tmp_path), streaming=True)
    stream = StreamSource(spec, window=100, seed=0)
    windows = iter(stream)
    first = next(windows)
    assert (len(first.clips), first.num_rows) == (18, 20)
    assert sorted(first.left_out) == [("damaged audio", "r5"), ("without text", "r3")]
    assert stream.quarantine.counts() == {"without text": 1, "damaged audio": 1}
    with pytest.raises(DataError, match="2 of 20 clips cannot be used"):
        next(windows)
    assert len(list(islice(StreamSource(spec, window=100, seed=0, max_quarantine_share=0.1), 3))) == 3


def test_windows_tell_of_all_rows_and_how_far_the_epoch_is(stream):
    """Every other row is used: those behind an epoch's last clip are told of in the next epoch's first window."""
    source = stream(filters=Filters(languages=["de"]), window=1, world_size=1)
    windows = list(islice(source, 21))
    assert [window.epoch for window in windows] == [0] * 10 + [1] * 10 + [2]
    names = [name for w in windows for name in [*(clip.id for clip in w.clips), *(name for _, name in w.left_out)]]
    assert len(names) == sum(window.num_rows for window in windows)
    assert all(2 <= names.count(name) <= 3 for name in ALL)
    assert names.count(windows[-1].clips[0].id) == 3
    assert windows[0].share[0] == 0
    for before, after in pairwise(windows):
        assert before.share[0] <= before.share[1] <= 1
        assert after.share[0] == (before.share[1] if before.epoch == after.epoch else 0)


def test_a_rewound_stream_begins_anew(stream):
    one = stream()
    first = ids(islice(one, 5))
    one.rewind()
    assert ids(islice(one, 5)) == first


def test_a_prepared_folder_is_streamed(tmp_path):
    """All that its rows hold comes through, and the audio stays in the shards until it is wanted."""
    clips = []
    for number in range(9):
        (tmp_path / f"{number}.wav").write_bytes(wav(number))
        clips.append(Clip(f"p{number}", tmp_path / f"{number}.wav", f"number {number}", 0.5, columns={"mood": "calm"}))
    folder, options = tmp_path / "prepared", PrepareOptions(shards_multiple_of=3)
    prepare_dataset(folder, {"train": lambda: iter(clips)}, options)
    spec = SourceSpec(str(folder), streaming=True)
    whole = ids(islice(StreamSource(spec, window=4, seed=7), 6))
    for epoch in range(2):
        assert sorted(flat(whole[3 * epoch : 3 * epoch + 3])) == [f"p{number}" for number in range(9)]
    clip = next(iter(StreamSource(spec, window=4, seed=7))).clips[0]
    assert (clip.columns["mood"], len(load_waveform(clip.audio)), len(pickle.dumps(clip)) < 1000) == (
        "calm",
        8000,
        True,
    )
    for consumed in range(1, 6):
        before, after = (StreamSource(spec, window=4, seed=7) for _ in range(2))
        list(islice(before, consumed))
        after.load_state_dict(before.state_dict())
        assert ids(islice(after, 7 - consumed)) == whole[consumed - 1 :]
    prepare_dataset(folder, {"train": lambda: iter(clips[1:])}, options, overwrite=True)
    with pytest.raises(CheckpointError, match="saved with rows or options other than now: go on with what it was"):
        StreamSource(spec, window=4, seed=7).load_state_dict(before.state_dict())


def test_caps_and_whole_datasets_are_refused(stream, folder):
    with pytest.raises(DataError, match="leave out max_clips"):
        stream(max_clips=3)
    with pytest.raises(DataError, match="set streaming: true"):
        StreamSource(SourceSpec(str(folder)), window=3, seed=0)


def test_streamed_clips_can_be_heard(stream):
    clip = next(iter(stream())).clips[0]
    assert len(load_waveform(clip.audio)) == 8000
    assert clip.duration == 0.5
