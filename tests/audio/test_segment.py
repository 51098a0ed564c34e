"""A part of a recording is exactly its samples, the same bytes each time, and never less than it says."""

import time

import numpy as np
import pytest
import soundfile

from ultravox.audio.content import audio_sha256
from ultravox.audio.segment import AudioSegment
from ultravox.audio.waveform import audio_seconds, load_waveform
from ultravox.errors import AudioError


@pytest.fixture
def recording(tmp_path):
    """Two channels of a second at 8 kHz, beyond full scale, in 32-bit floats."""
    samples = np.stack([np.linspace(-1.5, 1.5, 8000), np.linspace(1, 0, 8000)], axis=1).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", samples, 8000, subtype="FLOAT")
    return tmp_path / "long.wav", samples


def test_a_part_is_the_samples_themselves(recording):
    path, samples = recording
    part = AudioSegment(path, 0.25, 0.5)
    with open(path.with_name("part.wav"), "wb") as file:
        file.write(part.read())
    found, rate = soundfile.read(path.with_name("part.wav"), dtype="float32")
    assert rate == 8000
    np.testing.assert_array_equal(found, samples[2000:6000])
    assert audio_seconds(part) == 0.5
    assert len(load_waveform(part)) == 8000
    one = AudioSegment(path, 0.0, 1.0, channel=1)
    with open(path.with_name("one.wav"), "wb") as file:
        file.write(one.read())
    np.testing.assert_array_equal(soundfile.read(path.with_name("one.wav"), dtype="float32")[0], samples[:, 1])


def test_the_same_part_has_the_same_bytes_at_any_time(recording):
    first = AudioSegment(recording[0], 0.1, 0.2)
    digest = audio_sha256(first)
    time.sleep(1.1)  # libsndfile writes the second of the day into a file of floats
    assert audio_sha256(AudioSegment(recording[0], 0.1, 0.2)) == digest
    assert audio_sha256(AudioSegment(recording[0], 0.1, 0.3)) != digest
    assert hash(first) == hash(AudioSegment(recording[0], 0.1, 0.2))


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.opus"])
def test_parts_of_compressed_files(tmp_path, name):
    sound = np.convolve(np.random.default_rng(0).standard_normal(48000), np.ones(20) / 40, "same")
    options = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    soundfile.write(tmp_path / name, sound, 24000, **options)
    whole, part = load_waveform(tmp_path / name), load_waveform(AudioSegment(tmp_path / name, 0.5, 0.7))
    assert len(part) == 11200
    middle = slice(2000, 9000)  # resampling has edges
    assert np.corrcoef(whole[8000:][middle], part[middle])[0, 1] > 0.98


@pytest.mark.parametrize(
    ("start", "seconds", "channel", "message"),
    [
        (0.8, 0.5, None, r"ends after 1\.00 s: correct its offset or duration"),
        (3.0, 0.5, None, "ends after"),
        (0.0, 0.5, 2, "has 2 channels, counted from 0"),
    ],
)
def test_a_part_that_is_not_there_is_refused(recording, start, seconds, channel, message):
    with pytest.raises(AudioError, match=message):
        AudioSegment(recording[0], start, seconds, channel).read()


def test_recordings_that_no_part_can_be_read_from_are_refused(tmp_path):
    with pytest.raises(AudioError, match="does not exist"):
        AudioSegment(tmp_path / "none.wav", 0, 1).read()
    (tmp_path / "text.wav").write_bytes(b"no audio at all")
    with pytest.raises(AudioError, match="use wav, flac, ogg or mp3"):
        AudioSegment(tmp_path / "text.wav", 0, 1).read()
