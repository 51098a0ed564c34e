"""Every kind of source gives the same clips; what is wrong in a file is named by its place."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from ultravox.data.manifest import Clip, write_dataset
from ultravox.data.sources import describe_source, load_clips, split_names
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
        assert plain(load_clips(folder / name, "any")) == EXPECTED
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


def test_part_of_a_file_is_refused(folder):
    row = {"audio_filepath": "a.wav", "text": "one", "duration": 0.2, "offset": 0.1}
    (folder / "nemo.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"nemo\.jsonl, line 1: 'offset' is 0\.1, but only whole files"):
        load_clips(folder / "nemo.jsonl")
