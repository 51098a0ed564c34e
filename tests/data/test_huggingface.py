"""Hugging Face datasets on this machine: saved, as Parquet, streamed; their audio is read where it lies, undecoded."""

import io
import multiprocessing
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict

from ultravox.audio.content import NO_AUDIO, audio_sha256, read_audio
from ultravox.audio.waveform import load_waveform
from ultravox.data import arrow_audio
from ultravox.data.arrow_audio import ArrowCell, EmbeddedAudio, RemoteAudio
from ultravox.data.filters import Filters
from ultravox.data.source import SourceSpec
from ultravox.data.sources import describe_source, kind_of, load_clips, load_source, open_source, split_names
from ultravox.errors import AudioError, DataError, NetworkError

from .hub_files import rows, wav, write_parquet


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Parquet files on this machine are mapped as Arrow below this folder."""
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))


def dataset(columns=None):
    """As a user makes one: with the feature Audio, which `datasets` would decode."""
    return Dataset(pa.table(columns or rows(4))).cast_column("audio", Audio(decode=False)).cast_column("audio", Audio())


def saved(folder, columns=None):
    dataset(columns).save_to_disk(str(folder))
    return str(folder)


def plain(clips):
    return [(c.id, c.text, c.duration, c.language, audio_sha256(c.audio)) for c in clips]


def test_every_form_gives_the_same_clips(tmp_path):
    whole = dataset(rows(6))
    DatasetDict(train=whole, other=whole.select([1])).save_to_disk(str(tmp_path / "dict"))
    whole.save_to_disk(str(tmp_path / "single"), num_shards=3)
    write_parquet(tmp_path / "parquet", 3, 2)
    write_parquet(tmp_path / "data" / "data", 3, 2)
    write_parquet(tmp_path / "folders" / "train", 3, 2, "part")
    pq.write_table(pa.table(rows(6)), tmp_path / "one.parquet")
    expected = None
    for name in ("dict", "single", "parquet", "data", "one.parquet"):
        for streaming in (False, True):
            loaded = load_source(SourceSpec(str(tmp_path / name), streaming=streaming))
            expected = expected or plain(loaded.clips)
            assert plain(loaded.clips) == expected, (name, streaming)
            assert loaded.left_out == {}
    assert [entry[:4] for entry in expected[:2]] == [("r0", "number 0", 0.5, "de"), ("r1", "number 1", 0.5, "en")]
    assert split_names(tmp_path / "dict") == ["train", "other"]
    assert [clip.id for clip in load_clips(tmp_path / "dict", "other")] == ["r1"]
    assert split_names(tmp_path / "folders") == ["part"]


def test_splits_are_told_by_files_else_by_folders(tmp_path):
    write_parquet(tmp_path / "a", 1, 2, "train")
    write_parquet(tmp_path / "a", 2, 1, "clean")
    for split, start in (("train", 0), ("noisy", 3)):
        (tmp_path / "b" / split).mkdir(parents=True)
        pq.write_table(pa.table(rows(2, start)), tmp_path / "b" / split / "rows.parquet")
    assert sorted(split_names(tmp_path / "a")) == ["clean", "train"]
    assert [clip.id for clip in load_clips(tmp_path / "a", "clean")] == ["r0", "r1"]
    assert sorted(split_names(tmp_path / "b")) == ["noisy", "train"]
    assert [clip.id for clip in load_clips(tmp_path / "b", "noisy")] == ["r3", "r4"]
    for streaming in (False, True):
        with pytest.raises(DataError, match="has no split 'dev': it has"):
            load_source(SourceSpec(str(tmp_path / "a"), split="dev", streaming=streaming))


def hear(audio) -> int:
    """In a process of its own."""
    return len(load_waveform(audio))


def test_a_cell_is_small_and_is_heard_in_another_process(tmp_path):
    clip = load_clips(saved(tmp_path / "set"))[2]
    assert isinstance(clip.audio, ArrowCell)
    assert clip.audio.read() == wav(2)
    assert len(pickle.dumps(clip.audio)) < 600 < len(wav(2))
    assert clip.audio.suffix == ".wav"
    assert clip.audio == load_clips(tmp_path / "set")[2].audio
    assert len({clip.audio, load_clips(tmp_path / "set")[2].audio}) == 1
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(hear, (clip.audio,)) == 8000


def test_no_sample_is_decoded_and_no_audio_copied_to_learn_a_length(tmp_path, monkeypatch):
    name = saved(tmp_path / "set")
    monkeypatch.setattr(ArrowCell, "read", lambda cell: pytest.fail("copied"))
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_: pytest.fail("decoded"))
    assert [clip.duration for clip in load_clips(name)] == [0.5] * 4


def test_a_dataset_that_was_changed_below_us_is_noticed(tmp_path):
    clip = load_clips(saved(tmp_path / "set"))[0]
    columns = rows(4)
    columns["audio"][0]["bytes"] = wav(0, 0.25)
    dataset(columns).save_to_disk(str(tmp_path / "new"))
    (file,) = (tmp_path / "new").glob("*.arrow")
    os.replace(file, clip.audio.file)
    arrow_audio.table_of.cache_clear()
    with pytest.raises(AudioError, match="is not what it was"):
        read_audio(clip.audio)


def test_columns_labels_and_other_media(tmp_path):
    columns = rows(2)
    table = {
        "sound": columns["audio"],
        "noise": columns["audio"],
        "sentence": columns["text"],
        "client_id": [7, 8],
        "locale": [1, 0],
        "meta": [{"topic": "a", "n": 1}, {"topic": None, "n": 2}],
    }
    made = Dataset(pa.table(table)).cast_column("locale", ClassLabel(names=["de", "en"]))
    for column in ("sound", "noise"):
        made = made.cast_column(column, Audio(decode=False)).cast_column(column, Audio())
    made.save_to_disk(str(tmp_path / "set"))
    for streaming in (False, True):
        spec = SourceSpec(str(tmp_path / "set"), columns={"audio": "sound", "topic": "meta.topic"}, streaming=streaming)
        first, second = load_source(spec).clips
        assert (first.text, first.speaker, first.language, second.language) == ("number 0", "7", "en", "de")
        assert first.columns == {"meta": {"topic": "a", "n": 1}, "topic": "a"}
        assert [first.id, second.id] == (["train-0-0", "train-0-1"] if streaming else ["train-0", "train-1"])
        with pytest.raises(DataError, match=r"no column 'none' \(named for 'text'\): its columns are sound, noise"):
            load_source(SourceSpec(spec.name, columns={"audio": "sound", "text": "none"}, streaming=streaming))
        with pytest.raises(DataError, match="has no column called audio; name it in columns"):
            load_source(SourceSpec(spec.name, streaming=streaming))


def test_audio_inside_an_object_and_in_a_list(tmp_path):
    columns = rows(2)
    turns = [{"role": "user", "content": "<|audio|><|audio|>"}, {"role": "assistant", "content": "Yes."}]
    nested = {"text": columns["text"], "meta": [{"sound": cell, "n": 1} for cell in columns["audio"]]}
    talks = {"id": ["t"], "audio": [columns["audio"]], "messages": [turns]}
    Dataset(pa.table(nested)).save_to_disk(str(tmp_path / "nested"))
    Dataset(pa.table(talks)).save_to_disk(str(tmp_path / "talks"))
    for streaming in (False, True):
        spec = SourceSpec(str(tmp_path / "nested"), columns={"audio": "meta.sound"}, streaming=streaming)
        clips = load_source(spec).clips
        assert [clip.audio.read() for clip in clips] == [wav(0), wav(1)]
        assert clips[0].columns == {"meta": {"n": 1}}, "the bytes are nobody's column"
        talk = load_source(SourceSpec(str(tmp_path / "talks"), streaming=streaming)).clips[0]
        assert [talk.audio.read(), talk.more_audio[0][0].read()] == [wav(0), wav(1)]
        assert talk.messages == tuple(turns)


def test_audio_by_path_and_as_bare_bytes(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.wav").write_bytes(wav(0))
    paths = {"text": ["one", "two"], "audio": ["a.wav", "none.wav"]}
    pq.write_table(pa.table(paths), tmp_path / "set" / "train-00000-of-00001.parquet")
    for streaming in (False, True):
        loaded = load_source(SourceSpec(str(tmp_path / "set"), streaming=streaming))
        assert [clip.audio for clip in loaded.clips] == [tmp_path / "set" / "a.wav"]
        assert list(loaded.left_out) == ["missing audio"]
    (tmp_path / "bytes").mkdir()
    pq.write_table(pa.table({"text": ["one"], "audio": [wav(3)]}), tmp_path / "bytes" / "train.parquet")
    assert load_clips(tmp_path / "bytes")[0].audio.read() == wav(3)


def test_single_bad_rows_are_set_aside(tmp_path):
    columns = rows(6)
    columns["audio"][1] = {"bytes": None, "path": None}
    columns["audio"][2]["bytes"] = wav(2)[:3000]
    columns["text"][3] = None
    columns["id"][4] = "r0"
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    for streaming in (False, True):
        loaded = load_source(SourceSpec(str(tmp_path / "train.parquet"), streaming=streaming))
        assert [clip.id for clip in loaded.clips] == ["r0", "r5"]
        assert loaded.left_out == {
            "without audio": ["r1"],
            "damaged audio": ["r2"],
            "without text": ["r3"],
            "id twice": ["r0 (shard 0, row 4)" if streaming else "r0 (row 4)"],
        }


def test_a_table_of_texts_is_for_the_task_text(tmp_path):
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "train.parquet")
    clips = load_source(SourceSpec(str(tmp_path / "train.parquet"), needs_audio=False)).clips
    assert [(clip.text, clip.audio, clip.duration) for clip in clips] == [
        ("one", NO_AUDIO, 0.0),
        ("two", NO_AUDIO, 0.0),
    ]


def test_an_empty_split_and_one_that_filters_empty(tmp_path):
    pq.write_table(pa.table(rows(1)).slice(0, 0), tmp_path / "train.parquet")
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"train\.parquet.* holds no clips"):
            load_source(SourceSpec(str(tmp_path / "train.parquet"), streaming=streaming))
    with pytest.raises(DataError, match=r"no clip is left of 4 \(4 too short\)"):
        load_source(SourceSpec(saved(tmp_path / "set"), filters=Filters(min_seconds=1)))


def test_the_fingerprint_is_of_the_content(tmp_path):
    def both(folder, **options):
        specs = [SourceSpec(str(folder), streaming=streaming, **options) for streaming in (False, True)]
        return [open_source(spec).fingerprint() for spec in specs]

    write_parquet(tmp_path / "a" / "set", 2, 2)
    first = both(tmp_path / "a" / "set")
    write_parquet(tmp_path / "b" / "set", 2, 2)
    for file in (tmp_path / "b" / "set").iterdir():
        os.utime(file, (0, 0))
    assert both(tmp_path / "b" / "set") == first
    for column, value in (("text", "number 9"), ("text", "other"), ("audio", {"bytes": wav(9, 0.6), "path": "r0.wav"})):
        columns = rows(2)
        columns[column][0] = value
        pq.write_table(pa.table(columns), tmp_path / "b" / "set" / "train-00000-of-00002.parquet", row_group_size=2)
        assert not set(both(tmp_path / "b" / "set")) & set(first), column
    assert not set(both(tmp_path / "a" / "set", filters=Filters(max_seconds=9))) & set(first)


def test_part_of_a_split_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    write_parquet(tmp_path / "set" / "data", 2, 2)
    with pytest.raises(DataError, match="is a part of a split"):
        load_clips(tmp_path / "set", "train[:50%]")
    assert split_names(tmp_path / "set") == ["train"]
    assert describe_source(tmp_path / "set") == {"licence": "cc0-1.0"}
    assert {clip.licence for clip in load_clips(tmp_path / "set")} == {"cc0-1.0"}


def test_damaged_and_unreachable_datasets_have_one_line(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1 nonsense")
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"train\.parquet is damaged") as error:
            load_source(SourceSpec(str(tmp_path / "set"), streaming=streaming))
        assert "\n" not in str(error.value)
    assert kind_of("someone/speech") == "huggingface"
    with pytest.raises((NetworkError, DataError), match="someone/speech"):
        load_clips("someone/speech")
    with pytest.raises(DataError, match="leave revision out"):
        open_source(SourceSpec(str(tmp_path / "set"), revision="main"))


def test_remote_audio_is_read_through_fsspec(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(1))
    audio = RemoteAudio(f"file://{tmp_path}/a.wav")
    assert audio.read() == wav(1)
    assert (audio.suffix, len(load_waveform(audio))) == (".wav", 8000)
    with pytest.raises(AudioError, match=r"none\.wav cannot be read"):
        RemoteAudio(f"file://{tmp_path}/none.wav").read()


def test_streamed_audio_names_itself():
    audio = EmbeddedAudio(wav(1), "set, train, shard 0, row 1")
    assert str(audio) == f"set, train, shard 0, row 1 ({len(wav(1))} bytes)"
    assert soundfile.info(io.BytesIO(audio.read())).frames == 8000
    with pytest.raises(AudioError, match="set, train, shard 0, row 1"):
        load_waveform(EmbeddedAudio(b"nonsense", "set, train, shard 0, row 1"))
