"""Clips of a prepared split that are read when they are asked for: the same ones, and only those."""

import numpy as np
import pytest
import soundfile

from ultravox.audio.content import NO_AUDIO
from ultravox.data import prepared_clips
from ultravox.data.clip import Clip
from ultravox.data.filters import Filters
from ultravox.data.prepare import prepare_dataset
from ultravox.data.prepared import iter_prepared
from ultravox.data.prepared_clips import PreparedClips, pick
from ultravox.data.sharding import PrepareOptions
from ultravox.data.source import SourceSpec
from ultravox.data.sources import load_source, open_source
from ultravox.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fifty rows in three shards, two of them without audio."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = []
    for number in range(50):
        samples = np.random.default_rng(number).integers(-9000, 9000, 1600 + 320 * number).astype(np.int16)
        soundfile.write(folder / f"{number}.flac", samples, 16000)
        audio, seconds = (NO_AUDIO, 0.0) if number in (7, 31) else (folder / f"{number}.flac", len(samples) / 16000)
        language = "en" if number % 3 else "de"
        rows.append(Clip(f"row {number}", audio, f"text {number}", seconds, language=language, columns={"n": number}))
    prepare_dataset(folder / "set", {"train": lambda: iter(rows)}, PrepareOptions(shards_multiple_of=3))
    return folder / "set"


def test_each_row_is_the_one_that_a_pass_gives(folder):
    rows = list(iter_prepared(folder, "train"))
    clips = PreparedClips(folder, "train")
    assert len(clips) == 50
    assert list(clips) == rows == clips[:]
    assert [clips[number] for number in np.random.default_rng(0).permutation(50)] == [
        rows[number] for number in np.random.default_rng(0).permutation(50)
    ]
    assert clips[-1] == rows[-1]
    assert clips[3].columns == {"n": 3}
    assert clips[10:13] == rows[10:13]
    with pytest.raises(IndexError):
        clips[50]


@pytest.mark.parametrize("share", [0.0, 0.1, 2.0])
def test_some_rows_are_picked_in_either_way(folder, monkeypatch, share):
    monkeypatch.setattr(prepared_clips, "SEQUENTIAL_SHARE", share)
    rows = list(iter_prepared(folder, "train"))
    for chosen in ([], [0], [49], [3, 4, 30, 31], list(range(0, 50, 2)), list(range(50))):
        numbers = np.array(chosen, dtype=np.int64)
        assert list(pick(PreparedClips(folder, "train"), numbers)) == [rows[number] for number in chosen]
        assert list(pick(rows, numbers)) == [rows[number] for number in chosen]
        subset = PreparedClips(folder, "train", numbers)
        assert list(subset) == [rows[number] for number in chosen]
        assert list(pick(subset, np.arange(len(chosen))[::3])) == [rows[number] for number in chosen[::3]]


def test_a_row_group_is_read_once_for_its_neighbours(folder, monkeypatch):
    read = []
    inner = prepared_clips.read_group
    monkeypatch.setattr(prepared_clips, "read_group", lambda *place: read.append(place) or inner(*place))
    clips = PreparedClips(folder, "train")
    for number in range(50):
        assert clips[number].id == f"row {number}"
    assert len(read) == len(set(read)) < 10


def test_filters_and_caps_keep_places_alone(folder):
    name = str(folder)
    whole = load_source(SourceSpec(name))
    assert (whole.num_rows, len(whole.clips), whole.left_out) == (50, 50, {})
    german = load_source(SourceSpec(name, filters=Filters(languages=["de"])))
    assert isinstance(german.clips, PreparedClips)
    assert [clip.id for clip in german.clips] == [f"row {number}" for number in range(0, 50, 3)]
    assert {reason: len(ids) for reason, ids in german.left_out.items()} == {"other language": 33}
    few = load_source(SourceSpec(name, filters=Filters(languages=["de"]), max_clips=4))
    assert [clip.id for clip in few.clips] == ["row 0", "row 3", "row 6", "row 9"]
    assert len({source.fingerprint for source in (whole, german, few)}) == 3
    with pytest.raises(DataError, match=r"no clip is left of 50 .*50 other language; its languages: de, en"):
        load_source(SourceSpec(name, filters=Filters(languages=["fr"])))
    with pytest.raises(DataError, match="has no split 'dev'"):
        load_source(SourceSpec(name, split="dev"))


def test_the_fingerprint_needs_no_pass(folder, monkeypatch):
    first = load_source(SourceSpec(str(folder))).fingerprint
    source = open_source(SourceSpec(str(folder)))
    monkeypatch.setattr(type(source), "rows", lambda self: pytest.fail("the rows were read"))
    assert load_source(SourceSpec(str(folder))).fingerprint == source.fingerprint() == first
