import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ultravox.data.manifest import Clip, read_dataset, write_dataset
from ultravox.data.sources import load_clips
from ultravox.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "audio").mkdir()
    for name in ("a", "b"):
        soundfile.write(tmp_path / "audio" / f"{name}.flac", np.zeros(8000, dtype=np.float32), 16000)
    return tmp_path


def rows(folder: Path, *lines: bytes) -> Path:
    path = folder / "clips.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


A = b'{"id": "a", "audio": "audio/a.flac", "text": "one", "duration": 0.5, "speaker": "s", "licence": "l"}'
B = b'{"id": "b", "audio": "audio/b.flac", "text": "two", "duration": 0.5}'


def test_written_dataset_reads_back(folder: Path) -> None:
    clips = [
        Clip("a", folder / "audio/a.flac", "caf\u00e9", 0.5, "Ann", "CC0", "An answer."),
        Clip("b", folder / "audio/b.flac", "two", 0.5, "Ann", "CC0"),
    ]
    splits = {"train": clips[:1], "heldout": clips[1:]}
    write_dataset(folder, name="x", licence="CC0", attribution="Ann", splits=splits, extra={"made_by": "y"})
    assert load_clips(str(folder), "train") == clips[:1]
    assert load_clips(str(folder), "heldout") == clips[1:]
    info = read_dataset(folder)
    assert info["version"] == 1
    assert info["made_by"] == "y"
    assert info["splits"]["train"]["num_clips"] == 1
    with pytest.raises(DataError, match="no split 'test': it has train, heldout"):
        load_clips(folder, "test")


def test_byte_order_mark_crlf_blank_lines_and_missing_duration(folder: Path) -> None:
    no_duration = b'{"id": "b", "audio": "audio/b.flac", "text": "two"}'
    path = rows(folder, b"\xef\xbb\xbf" + A + b"\r", b"", no_duration + b"\r")
    clips = load_clips(str(path), "clips")
    assert [clip.id for clip in clips] == ["a", "b"]
    assert clips[1].duration == 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "x", "audio": "audio/a.flac", "text": "caf\xe9"}', "not UTF-8"),
        (B[:40], "not a whole JSON object"),
        (b"[1]", "expected a JSON object"),
        (b'{"id": "x", "text": "y"}', "'audio' is missing"),
        (b'{"audio": "audio/a.flac", "text": "y"}', "'id' is missing"),
        (A, "id 'a' is already used in line 1"),
        (b'{"id": "x", "audio": "audio/none.flac", "text": "y"}', "does not exist"),
        (b'{"id": "x", "audio": "audio/a.flac", "text": 3}', "'text' must be a string"),
        (b'{"id": "x", "audio": "audio/a.flac", "text": "y", "duration": -1}', "seconds above 0"),
        (b'{"id": "x", "audio": "audio/a.flac", "text": "y", "duration": NaN}', "seconds above 0"),
    ],
)
def test_errors_name_file_and_line(folder: Path, line: bytes, message: str) -> None:
    path = rows(folder, A, line)
    with pytest.raises(DataError, match=message) as error:
        load_clips(path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(error.value)


def test_changed_split_file_is_noticed(folder: Path) -> None:
    clip = Clip("a", folder / "audio/a.flac", "one", 0.5)
    write_dataset(folder, name="x", licence="CC0", attribution="", splits={"train": [clip]})
    (folder / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes().replace(b"one", b"two"))
    with pytest.raises(DataError, match="SHA-256 differs"):
        load_clips(folder)


def test_unknown_and_unfetched_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRAVOX_HOME", str(folder))
    with pytest.raises(DataError, match="run `ultravox data fetch asterisk-en`"):
        load_clips("asterisk-en")
    with pytest.raises(DataError, match="expected one of asterisk-en"):
        load_clips("nonsense")
    with pytest.raises(DataError, match="cannot read the manifest"):
        load_clips(folder / "none.jsonl")
    with pytest.raises(DataError, match="holds no clips"):
        load_clips(rows(folder, b""))
    (folder / "dataset.json").write_text(json.dumps({"version": 2, "splits": {}}))
    with pytest.raises(DataError, match="format version 2"):
        load_clips(folder)
