"""Lhotse's cuts and Shar folders: whole files, parts, channels, and what cannot be read from where it lies."""

import gzip
import sys

import numpy as np
import pytest
import soundfile

from ultravox.audio.segment import AudioSegment
from ultravox.audio.waveform import load_waveform
from ultravox.data.lhotse_source import TarMember
from ultravox.data.source import SourceSpec
from ultravox.data.sources import kind_of, load_clips, load_source, open_source, split_names
from ultravox.errors import AudioError, DataError


@pytest.fixture
def recording(tmp_path):
    """Three seconds of noise in two channels, in a file and as Lhotse describes it."""
    from lhotse import Recording

    noise = (0.1 * np.random.default_rng(0).standard_normal((48000, 2))).astype(np.float32)
    soundfile.write(tmp_path / "talk.flac", noise, 16000)
    return Recording.from_file(tmp_path / "talk.flac", recording_id="talk")


@pytest.fixture
def mono(tmp_path):
    from lhotse import Recording

    soundfile.write(tmp_path / "mono.wav", np.linspace(-1, 1, 48000).astype(np.float32), 16000)
    return Recording.from_file(tmp_path / "mono.wav", recording_id="mono")


def cuts_of(recording, *spans, channel=0):
    """One cut for each span of it, with a supervision of its own."""
    from lhotse import CutSet, SupervisionSegment
    from lhotse.cut import MonoCut

    def cut(index, start, seconds):
        said = SupervisionSegment(
            f"s{index}", recording.id, 0, seconds, channel, f"words {index}", "en", "ann", custom={"topic": "weather"}
        )
        return MonoCut(f"c{index}", start, seconds, channel, [said], recording=recording)

    return CutSet.from_cuts(cut(index, *span) for index, span in enumerate(spans))


def test_cuts_are_parts_or_whole_files(mono, tmp_path):
    cuts_of(mono, (0, 3.0), (1.0, 0.5)).to_file(tmp_path / "cuts.jsonl.gz")
    whole, part = load_clips(tmp_path / "cuts.jsonl.gz")
    assert (whole.id, whole.text, whole.language, whole.speaker, whole.duration) == ("c0", "words 0", "en", "ann", 3.0)
    assert whole.audio == tmp_path / "mono.wav"
    assert whole.columns["topic"] == "weather"
    assert part.audio == AudioSegment(tmp_path / "mono.wav", 1.0, 0.5)
    np.testing.assert_array_equal(load_waveform(part.audio), load_waveform(whole.audio)[16000:24000])
    assert split_names(tmp_path / "cuts.jsonl.gz") == ["cuts"]
    with pytest.raises(DataError, match="has no split 'test': it is one file, which is the one split 'cuts'"):
        load_clips(tmp_path / "cuts.jsonl.gz", "test")


def test_a_cut_is_of_its_own_channel(recording, tmp_path):
    cuts_of(recording, (0, 3.0), channel=1).to_file(tmp_path / "cuts.jsonl.gz")
    heard = load_waveform(load_clips(tmp_path / "cuts.jsonl.gz")[0].audio)
    np.testing.assert_array_equal(heard, soundfile.read(tmp_path / "talk.flac", dtype="float32")[0][:, 1])


def test_a_folder_of_cuts_has_a_split_for_each_file(mono, tmp_path):
    folder = tmp_path / "manifests"
    folder.mkdir()
    for split in ("train", "dev"):
        cuts_of(mono, (0, 1.0)).to_file(folder / f"cuts_{split}.jsonl.gz")
    assert kind_of(folder) == "lhotse"
    assert split_names(folder) == ["cuts_dev", "cuts_train"]
    assert len(load_clips(folder, "cuts_dev")) == 1
    with pytest.raises(DataError, match="no split 'train': it has cuts_dev, cuts_train"):
        load_clips(folder)


def test_texts_of_several_supervisions_are_joined_in_their_order(mono, tmp_path):
    from lhotse import CutSet, SupervisionSegment
    from lhotse.cut import MonoCut

    said = [
        SupervisionSegment(f"s{i}", "mono", start, 1.0, 0, text) for i, (start, text) in enumerate([(1, "b"), (0, "a")])
    ]
    CutSet.from_cuts([MonoCut("c", 0, 3.0, 0, said, recording=mono)]).to_file(tmp_path / "cuts.jsonl.gz")
    assert load_clips(tmp_path / "cuts.jsonl.gz")[0].text == "a b"


def test_a_shar_folder_is_read_where_it_lies(mono, tmp_path):
    cuts = cuts_of(mono, (0, 1.0), (1.0, 0.5), (0.5, 2.0))
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / "shar" / split).mkdir(parents=True)
        cuts.subset(first=count).to_shar(str(tmp_path / "shar" / split), fields={"recording": "flac"}, shard_size=2)
    assert kind_of(tmp_path / "shar") == kind_of(tmp_path / "shar" / "train") == "lhotse"
    assert split_names(tmp_path / "shar") == ["test", "train"]
    clips = load_clips(tmp_path / "shar", "train")
    assert [(clip.id, clip.text, clip.duration) for clip in clips] == [
        ("c0", "words 0", 1.0),
        ("c1", "words 1", 0.5),
        ("c2", "words 2", 2.0),
    ]
    assert all(isinstance(clip.audio, TarMember) for clip in clips)
    whole = load_waveform(tmp_path / "mono.wav")
    for clip, start, stop in zip(clips, (0, 16000, 8000), (16000, 24000, 40000), strict=True):
        np.testing.assert_allclose(load_waveform(clip.audio), whole[start:stop], atol=1e-4)
    assert clips[0].columns["topic"] == "weather"
    assert len(load_clips(tmp_path / "shar" / "train")) == 3, "a Shar folder beside no other is one split"


def test_a_shar_folder_that_is_not_whole_is_refused(mono, tmp_path):
    (tmp_path / "shar").mkdir()
    cuts_of(mono, (0, 1.0), (1.0, 1.0)).to_shar(str(tmp_path / "shar"), fields={"recording": "wav"}, shard_size=5)
    tar = tmp_path / "shar" / "recording.000000.tar"
    clip = load_clips(tmp_path / "shar")[1]
    content = tar.read_bytes()
    tar.write_bytes(content[:40000])
    with pytest.raises(AudioError, match=r"c1\.wav in recording\.000000\.tar is truncated"):
        clip.audio.read()
    tar.write_bytes(content[:512])
    with pytest.raises(DataError, match=r"recording\.000000\.tar"):
        load_clips(tmp_path / "shar")
    tar.unlink()
    with pytest.raises(DataError, match=r"needs the audio in recording\.000000\.tar"):
        load_clips(tmp_path / "shar")


def test_audio_of_another_shard_is_no_audio_of_this_one(mono, tmp_path):
    (tmp_path / "shar").mkdir()
    cuts_of(mono, (0, 1.0), (1.0, 1.0)).to_shar(str(tmp_path / "shar"), fields={"recording": "wav"}, shard_size=1)
    first, second = (tmp_path / "shar" / f"recording.00000{index}.tar" for index in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(DataError, match=r"holds c1\.wav where cuts\.000000\.jsonl\.gz has the cut c0"):
        load_clips(tmp_path / "shar")


def test_cuts_that_cannot_be_read_are_set_aside(mono, tmp_path):
    from lhotse import CutSet

    cuts = list(cuts_of(mono, (0, 1.0), (1.0, 1.0), (2.0, 1.0)))
    cuts[1] = cuts[1].perturb_speed(1.1)
    cuts[2] = cuts[2].append(cuts[0]).with_id("mixed")
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    loaded = load_source(SourceSpec(str(tmp_path / "cuts.jsonl.gz")))
    assert [clip.id for clip in loaded.clips] == ["c0"]
    assert loaded.left_out == {"no plain cut": [cuts[1].id, "mixed"]}
    (tmp_path / "mono.wav").unlink()
    with pytest.raises(DataError, match=r"no clip is left of 3 \(1 missing audio, 2 no plain cut\)"):
        load_source(SourceSpec(str(tmp_path / "cuts.jsonl.gz")))


def test_columns_and_fingerprint(mono, tmp_path):
    cuts_of(mono, (0, 1.0)).to_file(tmp_path / "cuts.jsonl.gz")
    spec = SourceSpec(str(tmp_path / "cuts.jsonl.gz"), columns={"text": "topic"})
    assert load_source(spec).clips[0].text == "weather"
    first = open_source(spec).fingerprint()
    assert open_source(spec).fingerprint() == first
    cuts_of(mono, (0, 1.5)).to_file(tmp_path / "cuts.jsonl.gz")
    assert open_source(spec).fingerprint() != first
    with pytest.raises(DataError, match="no column 'none'"):
        load_source(SourceSpec(spec.name, columns={"text": "none"}))


@pytest.mark.parametrize("content", [b'{"id": "c0", "start": 0', b"\xff\xfe", b'{"type": "MonoCut"}'])
def test_a_broken_file_of_cuts_is_named_with_its_line(tmp_path, content):
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"cuts\.jsonl\.gz, line 1: not one of Lhotse's cuts"):
        load_clips(tmp_path / "cuts.jsonl.gz")


def test_without_lhotse_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(DataError, match=r"pip install 'ultravox\[lhotse\]'") as error:
        load_clips(tmp_path / "cuts.jsonl.gz")
    assert "\n" not in str(error.value)
