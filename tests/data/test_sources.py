"""Every kind of source gives the same clips; what is wrong in a file is named by its place."""

import json
import os
import shutil
import sys
import time
import tracemalloc
import types

import numpy as np
import pytest
import soundfile

from ultravox.audio.content import NO_AUDIO
from ultravox.audio.segment import AudioSegment
from ultravox.audio.waveform import load_waveform
from ultravox.cli.main import main
from ultravox.data.filters import Filters, total_seconds
from ultravox.data.manifest import Clip, write_dataset
from ultravox.data.source import SourceSpec
from ultravox.data.sources import (
    describe_source,
    load_clips,
    load_source,
    open_source,
    require_not_shrunk,
    split_names,
)
from ultravox.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Audio of half a second, called a, b and c."""
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(8000, dtype=np.float32), 16000)
    return tmp_path


def plain(clips):
    return [(clip.audio.name, clip.text, clip.duration) for clip in clips]


EXPECTED = [("a.wav", "one", 0.5), ("b.wav", "two, too", 0.5)]


def write_csv(folder, content):
    path = folder / "metadata.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_kind_gives_the_same_clips(folder):
    ours = [{"id": "1", "audio": "a.wav", "text": "one"}, {"id": "2", "audio": "b.wav", "text": "two, too"}]
    nemo = [
        {"audio_filepath": "a.wav", "text": "one", "duration": 0.5, "lang": "en"},
        {"audio_filepath": str(folder / "b.wav"), "text": "two, too", "duration": 0.5, "offset": 0},
    ]
    (folder / "ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    (folder / "nemo.json").write_text("".join(json.dumps(row) + "\n" for row in nemo))
    for name in ("ours.jsonl", "nemo.json"):
        assert plain(load_clips(folder / name, name.partition(".")[0])) == EXPECTED
        assert split_names(folder / name) == [name.partition(".")[0]]
        assert describe_source(folder / name) == {}
    assert [clip.id for clip in load_clips(folder / "nemo.json")] == ["a.wav", str(folder / "b.wav")]

    write_csv(folder, 'file_name,transcription,speaker_id\r\na.wav,one,ann\r\nb.wav,"two, too",\r\n')
    clips = load_clips(folder)
    assert plain(clips) == EXPECTED
    assert [(clip.id, clip.speaker) for clip in clips] == [("a.wav", "ann"), ("b.wav", "")]
    assert split_names(folder) == ["train"]
    assert describe_source(folder) == {}

    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": r["audio"], "sentence": r["text"], "speaker_id": 7}) + "\n" for r in ours)
    )
    assert {clip.speaker for clip in load_clips(folder)} == {"7"}
    assert plain(load_clips(str(folder), "train")) == EXPECTED

    splits = {
        "train": [Clip("1", folder / "a.wav", "one", 0.5)],
        "test": [Clip("2", folder / "b.wav", "two, too", 0.5)],
    }
    write_dataset(folder, name="x", licence="CC0", attribution="", splits=splits)
    assert plain(load_clips(folder, "train") + load_clips(folder, "test")) == EXPECTED
    assert split_names(folder) == ["train", "test"], "a dataset.json goes before a metadata file"
    assert describe_source(folder)["name"] == "x"


def test_an_audio_folder_with_splits(folder):
    for split, name in (("train", "a"), ("test", "b")):
        (folder / split).mkdir()
        shutil.move(folder / f"{name}.wav", folder / split)
        write_csv(folder / split, f"file_name,text,duration\n{name}.wav,hello {name},0.5\n")
    assert split_names(folder) == ["train", "test"]
    assert plain(load_clips(folder, "test")) == [("b.wav", "hello b", 0.5)]
    with pytest.raises(DataError, match="has no split 'dev': it has train, test"):
        load_clips(folder, "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,words\na.wav,one\n", r"metadata\.csv, line 2: .* file_name and one of .*, found file_name, words"),
        ("file,text\na.wav,one\n", r"line 2: expected the column file_name"),
        ("file_name,text\na.wav,one\nb.wav\n", "line 3: expected 2 columns"),
        ("file_name,text\na.wav,one,two\n", "line 2: expected 2 columns"),
        ("file_name,text\na.wav,one\na.wav,two\n", r"line 3: id 'a\.wav' is already used in line 2"),
        ("file_name,text\nz.wav,one\n", r"line 2: the audio file .*z\.wav does not exist"),
        ("file_name,text,duration\na.wav,one,long\n", "line 2: 'duration' must be a number"),
        ("file_name,text\n", "holds no clips"),
        ('file_name,text\na.wav,"one\n', "not CSV"),
        (b"file_name,text\na.wav,one\nb.wav,caf\xe9\n", r"metadata\.csv, line 3: not UTF-8"),
    ],
)  # fmt: skip
def test_mistakes_in_metadata_name_their_line(folder, content, message):
    write_csv(folder, content)
    with pytest.raises(DataError, match=message):
        load_clips(folder)


def test_an_empty_text_is_kept_for_those_who_count_it(folder):
    write_csv(folder, "file_name,text\na.wav,\nb.wav,two\n")
    assert [clip.text for clip in load_clips(folder)] == ["", "two"]


def write_rows(folder, *rows, name="rows.jsonl"):
    """A manifest of rows that name a.wav and are complete, but for what they say themselves."""
    usual = {"audio": "a.wav", "text": "hello there", "duration": 0.5}
    lines = [json.dumps({"id": str(index), **usual, **row}) for index, row in enumerate(rows)]
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return str(folder / name)


def test_parts_of_a_recording_are_cut_out(folder):
    whole = np.linspace(-1, 1, 16000).astype(np.float32)
    soundfile.write(folder / "long.wav", whole, 16000, subtype="FLOAT")
    nemo = [
        {"audio_filepath": "long.wav", "text": "one", "duration": 0.25, "offset": 0},
        {"audio_filepath": "long.wav", "text": "two", "duration": 0.5, "offset": 0.25},
        {"audio_filepath": "long.wav", "text": "three", "offset": 0.75},
        {"audio_filepath": "long.wav", "text": "all", "duration": 1.0, "offset": 0.0, "id": "all"},
    ]
    (folder / "nemo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nemo))
    clips = load_clips(folder / "nemo.jsonl")
    assert [clip.id for clip in clips] == ["long.wav", "long.wav@0.25", "long.wav@0.75", "all"]
    assert [clip.duration for clip in clips] == [0.25, 0.5, 0.25, 1.0]
    for clip, start, stop in zip(clips, (0, 4000, 12000, 0), (4000, 12000, 16000, 16000), strict=True):
        np.testing.assert_array_equal(load_waveform(clip.audio), whole[start:stop])
    assert [isinstance(clip.audio, AudioSegment) for clip in clips] == [True, True, True, False]
    for row in (nemo[1] | {"duration": 0.9}, nemo[1] | {"offset": 2}, nemo[1] | {"offset": -1}):
        (folder / "bad.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=r"bad\.jsonl, line 1: .*(ends at 1\.00 s|'offset' must be)"):
            load_clips(folder / "bad.jsonl")


HELLO = [{"role": "user", "content": "<|audio|> and <|audio|>?"}, {"role": "assistant", "content": "Yes."}]


def test_a_conversation_has_several_recordings(folder):
    row = {"audio": ["a.wav", "b.wav"], "messages": HELLO}
    keep = {"duration": None, "text": None}
    clip = load_clips(write_rows(folder, row | keep))[0]
    assert clip.messages == tuple(HELLO)
    assert (clip.audio, clip.more_audio) == (folder / "a.wav", ((folder / "b.wav", 0.5),))
    assert total_seconds(clip) == 1.0
    assert clip.text == ""
    for change, reason in (
        ({"audio": ["a.wav"]}, "recordings and placeholders differ"),
        ({"audio": ["a.wav", "none.wav"]}, "missing audio"),
        ({"messages": [{"role": "nobody", "content": ""}]}, "bad messages"),
        ({"messages": []}, "bad messages"),
        ({"messages": None}, "bad messages"),
        ({"duration": [1.0]}, "bad duration"),
    ):
        loaded = load_source(SourceSpec(write_rows(folder, {}, row | keep | change)))
        assert loaded.left_out == {reason: ["1"]}, reason
    with pytest.raises(DataError, match=r"line 1: 1 recordings, 2 <\|audio\|> placeholders in row 0"):
        load_clips(write_rows(folder, row | keep | {"audio": ["a.wav"]}))


def test_a_text_alone_is_a_fault_unless_it_is_asked_for(folder):
    name = write_rows(folder, {}, {"audio": None, "duration": None, "text": "only words"})
    assert load_source(SourceSpec(name)).left_out == {"without audio": ["1"]}
    clip = load_source(SourceSpec(name, needs_audio=False)).clips[1]
    assert (clip.audio, clip.duration, clip.text) == (NO_AUDIO, 0.0, "only words")
    (folder / "texts.jsonl").write_text('{"id": "1", "text": "only words"}\n')
    with pytest.raises(DataError, match="line 1: the key 'audio' is missing"):
        load_source(SourceSpec(str(folder / "texts.jsonl")))
    assert load_source(SourceSpec(str(folder / "texts.jsonl"), needs_audio=False)).clips[0].audio == NO_AUDIO


def test_single_bad_rows_are_set_aside_with_their_reason(folder):
    (folder / "broken.wav").write_bytes(b"RIFFnonsense")
    (folder / "empty.wav").write_bytes(b"")
    name = write_rows(
        folder,
        {},
        {"audio": "none.wav"},
        {"duration": -1},
        {"duration": "long"},
        {"text": ""},
        {"text": " -- "},
        {"text": None},
        {"audio": "broken.wav", "duration": None},
        {"audio": "empty.wav", "duration": None},
        {"id": "0", "text": "again"},
        {},
    )
    loaded = load_source(SourceSpec(name))
    assert [clip.id for clip in loaded.clips] == ["0", "10"]
    assert loaded.left_out == {
        "missing audio": ["1"],
        "bad duration": ["2", "3"],
        "without text": ["4", "5", "6"],
        "damaged audio": ["7", "8"],
        "id twice": ["0 (line 10)"],
    }
    assert loaded.num_rows == 11


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "x", "audio": "a.wav", "text": "caf\xe9"}', "line 2: not UTF-8"),
        (b'{"id": "x", "audio": "a.wa', "line 2: not a whole JSON object"),
        (b"[1]", "line 2: expected a JSON object"),
        (b'{"id": "x", "audio": "a.wav", "text": 3}', "line 2: 'text' must be a string"),
    ],
)
def test_a_broken_file_is_no_bad_row(folder, content, message):
    good = b'\xef\xbb\xbf{"id": "0", "audio": "a.wav", "text": "hello"}\r\n'
    (folder / "rows.jsonl").write_bytes(good + content)
    with pytest.raises(DataError, match=rf"rows\.jsonl, {message}"):
        load_source(SourceSpec(str(folder / "rows.jsonl")))
    (folder / "rows.jsonl").write_bytes(good)
    assert len(load_source(SourceSpec(str(folder / "rows.jsonl"))).clips) == 1


def test_columns_are_renamed_and_the_others_kept(folder):
    row = {"wav": "a.wav", "meta": {"words": "hello", "lang": "en"}, "question": "Who?", "licence": "CC0", "n": 3}
    (folder / "theirs.jsonl").write_text(json.dumps({"key": 7} | row))
    columns = {"id": "key", "audio": "wav", "text": "meta.words", "language": "meta.lang", "ask": "question"}
    clip = load_source(SourceSpec(str(folder / "theirs.jsonl"), columns=columns)).clips[0]
    assert (clip.id, clip.text, clip.language, clip.licence) == ("7", "hello", "en", "CC0")
    assert clip.columns == {"meta": row["meta"], "n": 3, "ask": "Who?"}
    for ours, theirs in (("text", "meta.none"), ("speaker", "who")):
        message = (
            rf"has no column '{theirs}' \(named for '{ours}'\): its columns are key, wav, meta, question, licence, n"
        )
        with pytest.raises(DataError, match=message):
            load_source(SourceSpec(str(folder / "theirs.jsonl"), columns=columns | {ours: theirs}))


def test_columns_of_an_audio_folder_are_renamed_too(folder):
    write_csv(folder, "sound,words,secs\na.wav,one,0.25\n")
    spec = SourceSpec(str(folder), columns={"id": "sound", "audio": "sound", "text": "words", "duration": "secs"})
    clip = load_source(spec).clips[0]
    assert (clip.id, clip.audio, clip.text, clip.duration) == ("a.wav", folder / "a.wav", "one", 0.25)


def test_filters_and_caps(folder):
    name = write_rows(folder, *({"text": "hello" * (1 + n), "language": "en" if n else "de"} for n in range(6)))
    loaded = load_source(SourceSpec(name, filters=Filters(languages=["en"], max_characters_per_second=40)))
    assert [clip.id for clip in loaded.clips] == ["1", "2", "3"]
    assert loaded.left_out == {"other language": ["0"], "too fast": ["4", "5"]}
    assert [clip.id for clip in load_source(SourceSpec(name, max_clips=2)).clips] == ["0", "1"]
    english = Filters(languages=["en"])
    assert [clip.id for clip in load_source(SourceSpec(name, filters=english, max_clips=2)).clips] == ["1", "2"]
    assert len(load_source(SourceSpec(name, max_hours=1.6 / 3600)).clips) == 3
    with pytest.raises(DataError, match=r"no clip is left of 6 \(6 other language; its languages: de, en\)"):
        load_source(SourceSpec(name, filters=Filters(languages=["fr"])))
    with pytest.raises(DataError, match="the first is longer than max_hours"):
        load_source(SourceSpec(name, max_hours=0.1 / 3600))


def test_an_empty_source_is_an_error(folder):
    (folder / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no clips"):
        load_source(SourceSpec(str(folder / "none.jsonl")))


def test_the_fingerprint_is_of_the_content(folder, tmp_path_factory):
    name = write_rows(folder, {}, {"audio": "b.wav"})
    first = load_source(SourceSpec(name)).fingerprint
    whole = open_source(SourceSpec(name)).fingerprint()
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(folder, moved, dirs_exist_ok=True)
    os.utime(moved / "rows.jsonl", (0, 0))
    assert load_source(SourceSpec(str(moved / "rows.jsonl"))).fingerprint == first
    assert open_source(SourceSpec(str(moved / "rows.jsonl"))).fingerprint() == whole
    for change in ({"text": "other"}, {"audio": "c.wav"}, {"speaker": "ann"}, {"duration": 0.4}, {"topic": "x"}):
        changed = SourceSpec(write_rows(folder, {}, {"audio": "b.wav"} | change))
        assert load_source(changed).fingerprint != first, change
        assert open_source(changed).fingerprint() != whole, change
    write_rows(folder, {}, {"audio": "b.wav"})
    for option in (
        {"filters": Filters(max_seconds=9)},
        {"columns": {"x": "text"}},
        {"max_clips": 9},
        {"split": "rows"},
    ):
        assert load_source(SourceSpec(name, **option)).fingerprint != first, option


def test_a_source_that_shrank_is_refused():
    spec = SourceSpec("my-data", split="dev")
    require_not_shrunk(spec, 10, 10)
    require_not_shrunk(spec, 10, 11)
    with pytest.raises(DataError, match="my-data, split dev, has shrunk: 10 clips were recorded, 9 are there"):
        require_not_shrunk(spec, 10, 9)


def test_licence_of_the_row_else_of_the_dataset(folder):
    clips = [Clip("1", folder / "a.wav", "one", 0.5), Clip("2", folder / "b.wav", "two", 0.5, licence="MIT")]
    write_dataset(folder, name="x", licence="CC0", attribution="Ann", splits={"train": clips})
    source = open_source(SourceSpec(str(folder)))
    assert [clip.licence for clip in source.clips()] == ["CC0", "MIT"]
    assert (source.licence, source.attribution) == ("CC0", "Ann")


def test_what_a_kind_does_not_know_is_refused(folder):
    name = write_rows(folder, {})
    with pytest.raises(DataError, match="only Hugging Face datasets and prepared folders can be streamed, this is man"):
        open_source(SourceSpec(name, streaming=True))
    with pytest.raises(DataError, match="subset and revision are of Hugging Face datasets, this is manifest"):
        open_source(SourceSpec(name, subset="en"))
    with pytest.raises(DataError, match="no format 'csv': expected auto or one of manifest, dataset"):
        open_source(SourceSpec(name, format="csv"))


@pytest.mark.parametrize("split", ["heldout", "test"])
def test_one_file_has_no_other_split(folder, split, capsys):
    """It would be used whole, the held-out rows with the others; a row's own `split` decides nothing."""
    name = write_rows(folder, {"split": "train"}, {"split": split})
    message = f"{name} has no split '{split}': it is one file, which is the one split 'rows', whatever its rows say; "
    with pytest.raises(DataError) as caught:
        load_source(SourceSpec(name, split=split))
    assert str(caught.value).startswith(message)
    assert [len(load_source(SourceSpec(name, split=own)).clips) for own in ("train", "rows")] == [2, 2]
    assert main(["data", "inspect", name, "--split", split]) == 2
    assert capsys.readouterr().err.startswith(f"ultravox: error: {message}")


def test_an_evaluation_takes_a_file_for_its_held_out_clips(folder):
    name = write_rows(folder, {})
    assert len(load_clips(name, "heldout")) == len(load_clips(name, "rows")) == 1
    with pytest.raises(DataError, match="has no split 'test': it is one file, which is the one split 'rows'"):
        load_clips(name, "test")


def test_a_prepared_folder_is_read_by_its_own_reader(folder, monkeypatch):
    """The reader stands in for `ultravox.data.prepared`, which has tests of its own."""
    clip = Clip("1", folder / "a.wav", "one", 0.5)
    reader = types.SimpleNamespace(
        describe_prepared=lambda path: {"licence": "CC0", "attribution": "Ann"},
        prepared_splits=lambda path: ["train", "test"],
        iter_prepared=lambda path, split: iter([clip] if split == "test" else []),
    )
    monkeypatch.setitem(sys.modules, "ultravox.data.prepared", reader)
    (folder / "prepared.json").write_text("{}")
    assert load_clips(folder, "test") == [clip]
    assert split_names(folder) == ["train", "test"]
    assert describe_source(folder)["licence"] == "CC0"
    with pytest.raises(DataError, match="has no split 'dev': it has train, test"):
        load_clips(folder, "dev")
    with pytest.raises(DataError, match="leave columns out"):
        open_source(SourceSpec(str(folder), columns={"text": "x"}))


def test_a_three_hour_file_is_left_out_by_its_header(folder, write_three_hours):
    write_three_hours(folder / "long.wav")
    name = write_rows(folder, {}, {"audio": "long.wav", "duration": None})
    tracemalloc.start()
    before = time.process_time()
    loaded = load_source(SourceSpec(name, filters=Filters(max_seconds=30)))
    seconds, (_, peak) = time.process_time() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.left_out == {"too long": ["1"]}
    assert seconds < 0.5
    assert peak < 2e6


@pytest.mark.parametrize(("rate", "seconds"), [(8000, 0.5), (44100, 0.25)])
def test_any_rate_and_stereo_have_their_true_length(folder, rate, seconds):
    sound = np.stack([np.full(round(rate * seconds), 0.2), np.full(round(rate * seconds), 0.4)], axis=1)
    soundfile.write(folder / "stereo.wav", sound, rate)
    clip = load_source(SourceSpec(write_rows(folder, {"audio": "stereo.wav", "duration": None}))).clips[0]
    assert clip.duration == pytest.approx(seconds, abs=1e-3)
    waveform = load_waveform(clip.audio)
    assert len(waveform) == pytest.approx(seconds * 16000, abs=2)
    assert np.median(waveform) == pytest.approx(0.3, abs=0.01)


def test_a_header_with_an_impossible_rate_is_a_fault(folder):
    soundfile.write(folder / "lie.wav", np.zeros(100), 16000)
    content = bytearray((folder / "lie.wav").read_bytes())
    content[24:28] = (7).to_bytes(4, "little")
    (folder / "lie.wav").write_bytes(content)
    loaded = load_source(SourceSpec(write_rows(folder, {}, {"audio": "lie.wav", "duration": None})))
    assert loaded.left_out == {"damaged audio": ["1"]}


def test_memory_does_not_grow_with_the_manifest(folder):
    name = write_rows(folder, *({"text": "x" * 1000} for _ in range(4000)))
    tracemalloc.start()
    count = sum(1 for _ in open_source(SourceSpec(name)).clips())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert peak < 1e6, "the file alone has 4 MB"
