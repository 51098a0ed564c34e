"""Reading a prepared dataset: any row at once, from any process, by Hugging Face too; damage is named."""

import io
import json
import multiprocessing
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from ultravox.audio.content import NO_AUDIO, AudioContent
from ultravox.data import prepared
from ultravox.data.clip import Clip
from ultravox.data.prepare import prepare_dataset
from ultravox.data.prepared import (
    ParquetAudio,
    describe_prepared,
    hash_id,
    is_prepared,
    iter_prepared,
    prepared_splits,
    read_index,
    verify,
)
from ultravox.data.sharding import PrepareOptions
from ultravox.errors import AudioError, DataError

COUNT = 50


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    clips = []
    for index in range(COUNT):
        samples = np.random.default_rng(index).integers(-9000, 9000, 3200 + 160 * index).astype(np.int16)
        soundfile.write(folder / f"{index}.flac", samples, 16000)
        clips.append(Clip(f"clip {index}", folder / f"{index}.flac", "x" * index or "y", len(samples) / 16000))
    clips[7] = replace(clips[7], more_audio=((clips[1].audio, 0.21), (clips[2].audio, 0.22)))
    clips[9] = replace(clips[9], audio=NO_AUDIO, duration=0.0)
    return clips


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "set"
    sources = [
        {"name": "one", "licence": "CC0-1.0", "attribution": "By Ann."},
        {"name": "two", "licence": "CC-BY-4.0", "attribution": "By Bob."},
        {"name": "three", "licence": "CC0-1.0", "attribution": ""},
    ]
    splits = {"train": lambda: iter(clips), "test": lambda: iter(clips[:2])}
    options = PrepareOptions(shards_multiple_of=4)
    prepare_dataset(folder, splits, options, sources=sources, count_tokens=lambda texts: list(map(len, texts)))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy to damage."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_it_is_described(made, tmp_path):
    assert is_prepared(made)
    assert not is_prepared(tmp_path)
    assert prepared_splits(made) == ["train", "test"]
    about = describe_prepared(made)
    assert (about["licence"], about["attribution"]) == ("CC0-1.0, CC-BY-4.0", "By Ann. By Bob.")
    assert about["splits"]["test"] == {"num_clips": 2, "seconds": 0.41}
    assert len(about["fingerprint"]) == 64
    with pytest.raises(DataError, match="has no split 'dev': it has train, test"):
        next(iter_prepared(made, "dev"))


def test_any_row_is_read_from_any_process(made, clips):
    found = list(iter_prepared(made, "train"))
    for clip in found:
        assert isinstance(clip.audio, AudioContent)
        assert hash(clip.audio) == hash(pickle.loads(pickle.dumps(clip.audio)))
    heard = [index for index in np.random.default_rng(0).permutation(COUNT) if index != 9]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = pool.map(ParquetAudio.read, [found[index].audio for index in heard])
    for index, content in zip(heard, elsewhere, strict=True):
        assert content == found[index].audio.read() == clips[index].audio.read_bytes()
    further = [audio for audio, _ in found[7].more_audio]
    assert [audio.read() for audio in further] == [clip.audio.read_bytes() for clip in clips[1:3]]
    assert len({str(audio) for audio in [found[7].audio, *further]}) == 3


def test_one_row_is_read_without_its_neighbours(made):
    """A row group holds few rows, so that the cost of a random row does not grow with the shard."""
    for path in made.glob("data/*.parquet"):
        metadata = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            assert 1 <= metadata.row_group(group).num_rows <= 16
            assert metadata.row_group(group).total_byte_size < 2 << 20


def test_few_files_stay_open(made, monkeypatch):
    monkeypatch.setattr(prepared, "MAX_OPEN_FILES", 2)
    monkeypatch.setattr(prepared, "_open_files", prepared._OpenFiles())
    for clip in [*iter_prepared(made, "train"), *iter_prepared(made, "train")]:
        if clip.audio is not NO_AUDIO:
            clip.audio.read()
    assert len(prepared._open_files.files) <= 2


def test_a_shard_that_was_replaced_is_read_anew(copy, clips):
    (first, *_), path = iter_prepared(copy, "test"), next(copy.glob("data/test-00000*"))
    assert first.audio.read() == clips[0].audio.read_bytes()
    other = [clips[3], clips[4]]
    prepare_dataset(copy, {"test": lambda: iter(other)}, PrepareOptions(shards_multiple_of=4), overwrite=True)
    assert path.is_file()
    assert first.audio.read() == clips[3].audio.read_bytes()


def test_the_index_says_what_the_shards_hold(made, clips, monkeypatch):
    found = list(iter_prepared(made, "train"))
    monkeypatch.setattr(prepared, "shard_paths", None)  # no shard is opened
    index = read_index(made, "train")
    assert index.id_hashes.tolist() == [hash_id(clip.id) for clip in clips]
    assert index.num_samples.tolist() == [round(clip.duration * 16000) for clip in clips]
    assert index.more_num_samples.tolist() == [3360 + 3520 if place == 7 else 0 for place in range(COUNT)]
    assert index.num_tokens.tolist() == [len(clip.text) for clip in clips]
    assert (index.audio_hashes == 0).tolist() == [place == 9 for place in range(COUNT)]
    shards = sorted(made.glob("data/train-*"))
    for place, (clip, shard, group, row) in enumerate(
        zip(found, index.shards, index.row_groups, index.rows, strict=True)
    ):
        if place != 9:
            assert clip.audio == ParquetAudio(shards[shard], group, row)
    assert len(set(index.id_hashes.tolist())) == COUNT
    assert {array.dtype.name for array in (index.num_samples, index.num_tokens, index.rows)} == {"int32"}


def test_tokens_that_nobody_counted_are_marked(clips, tmp_path):
    prepare_dataset(tmp_path / "out", {"train": lambda: iter(clips[:2])}, PrepareOptions())
    assert read_index(tmp_path / "out", "train").num_tokens.tolist() == [-1, -1]


# Damage


def test_a_flipped_byte_is_named_whatever_file_it_is_in(copy):
    verify(copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    assert {path.suffix for path in files} == {".parquet", ".json", ".jsonl"}
    for path in files:
        content = path.read_bytes()
        place = content.index(b"CC0") if path.suffix == ".json" else len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DataError, match=path.name):
            verify(copy)
        path.write_bytes(content)
    verify(copy)


def test_a_missing_or_cut_shard_is_named(copy):
    path = sorted(copy.glob("data/train-*"))[2]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=rf"{path.name} has \d+ bytes, expected \d+ bytes"):
        list(iter_prepared(copy, "train"))
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        list(iter_prepared(copy, "train"))
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        verify(copy)


def test_damage_inside_a_shard_is_an_error_of_the_data(copy):
    found = list(iter_prepared(copy, "train"))
    path = found[0].audio.path
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    with pytest.raises(AudioError, match=f"{path.name}, row group 0, row 0 cannot be read"):
        found[0].audio.read()
    with pytest.raises(DataError, match=f"{path.name} cannot be read"):
        list(iter_prepared(copy, "train"))
    path.unlink()
    with pytest.raises(AudioError, match=f"{path.name}, row group 0, row 0 cannot be read"):
        found[0].audio.read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 2, "splits": {}}', "has format version 2, this program reads 1"),
        ('{"splits": {}}', "has format version None"),
        ('{"version": 1}', "names no splits"),
        ("[]", "has format version None"),
        ("{", "is not JSON"),
    ],
)
def test_another_version_is_refused(copy, content, message):
    (copy / "prepared.json").write_text(content)
    for read in (prepared_splits, describe_prepared, verify):
        with pytest.raises(DataError, match=f"prepared.json {message}"):
            read(copy)
    for read in (read_index, lambda *words: list(iter_prepared(*words))):
        with pytest.raises(DataError, match=f"prepared.json {message}"):
            read(copy, "train")


def test_what_is_no_prepared_dataset(tmp_path):
    with pytest.raises(DataError, match=r"prepared\.json cannot be read"):
        prepared_splits(tmp_path)


# Hugging Face


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def check(rows, clips):
    rows = list(rows)
    assert [row["id"] for row in rows] == [clip.id for clip in clips]
    for row, clip in zip(rows, clips, strict=True):
        assert row["text"] == clip.text
        if clip.audio is not NO_AUDIO:
            assert row["audio"]["bytes"] == clip.audio.read_bytes()
            assert soundfile.info(io.BytesIO(row["audio"]["bytes"])).frames == row["num_samples"]


def test_hugging_face_reads_the_folder(made, clips, datasets):
    loaded = datasets.load_dataset(str(made))
    assert set(loaded) == {"train", "test"}
    assert loaded["train"].features["audio"] == datasets.Audio(sampling_rate=16000)
    assert json.loads(json.dumps(loaded["train"].features.to_dict()))["num_tokens"]["dtype"] == "int32"
    rows = loaded["train"].cast_column("audio", datasets.Audio(decode=False))
    check(rows, clips)
    assert [cell["bytes"] for cell in rows[7]["more_audio"]] == [clip.audio.read_bytes() for clip in clips[1:3]]


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_reads_and_streams_the_shards(made, clips, datasets, streaming):
    files = {"train": [str(path) for path in sorted(made.glob("data/train-*"))]}
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    if streaming:
        assert loaded.num_shards == 4
    check(loaded.cast_column("audio", datasets.Audio(decode=False)), clips)


def test_hugging_face_reads_empty_shards(clips, datasets, tmp_path):
    prepare_dataset(tmp_path / "out", {"train": lambda: iter(clips[:3])}, PrepareOptions(shards_multiple_of=8))
    assert [clip.id for clip in iter_prepared(tmp_path / "out", "train")] == [clip.id for clip in clips[:3]]
    for streaming in (False, True):
        loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=streaming)
        check(loaded.cast_column("audio", datasets.Audio(decode=False)), clips[:3])
