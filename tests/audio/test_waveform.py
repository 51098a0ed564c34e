"""Every format that users bring, and every way in which a file can be broken."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from ultravox.audio.waveform import SAMPLE_RATE, change_speed, load_waveform, write_waveform
from ultravox.errors import AudioError


def tone(seconds: float = 1.0, rate: int = SAMPLE_RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encode_av(path, waveform: np.ndarray, rate: int, codec: str) -> None:
    """Write a container through FFmpeg; the waveform is [channel, sample]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono" if len(waveform) == 1 else "stereo")
        frame_size = 1024 if codec == "aac" else 960
        for start in range(0, waveform.shape[1], frame_size):
            block = np.ascontiguousarray(waveform[:, start : start + frame_size], dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=stream.layout.name)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def loudest_hertz(waveform: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(np.argmax(spectrum)) * SAMPLE_RATE / len(waveform)


@pytest.mark.parametrize(
    ("suffix", "rate", "channels"),
    [("wav", 16000, 1), ("wav", 44100, 2), ("flac", 48000, 2), ("mp3", 44100, 1), ("ogg", 22050, 1), ("wav", 8000, 1)],
)
def test_soundfile_formats(tmp_path, suffix, rate, channels):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack([tone(1.0, rate)] * channels, axis=1), rate)
    waveform = load_waveform(path)
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert abs(len(waveform) - SAMPLE_RATE) < 0.1 * SAMPLE_RATE
    assert abs(loudest_hertz(waveform) - 440) < 3
    assert np.abs(waveform).max() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(("suffix", "codec", "rate"), [("m4a", "aac", 44100), ("webm", "libopus", 48000)])
def test_ffmpeg_formats(tmp_path, suffix, codec, rate):
    path = tmp_path / f"tone.{suffix}"
    encode_av(path, np.stack([tone(1.0, rate)] * 2), rate, codec)
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        waveform = load_waveform(source)
        assert abs(len(waveform) - SAMPLE_RATE) < 0.1 * SAMPLE_RATE
        assert abs(loudest_hertz(waveform) - 440) < 3


def test_stereo_is_mixed(tmp_path):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([tone(), np.zeros(SAMPLE_RATE)], axis=1), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_waveform(path), tone() / 2, atol=1e-6)


def test_round_trip_and_speed(tmp_path):
    write_waveform(tmp_path / "a.flac", tone())
    np.testing.assert_allclose(load_waveform(tmp_path / "a.flac"), tone(), atol=1e-4)
    fast = change_speed(tone(), 1.25)
    assert abs(len(fast) - 12800) <= 1
    assert abs(loudest_hertz(fast) - 550) < 3


def wav_bytes(waveform: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def test_missing_empty_folder_and_text(tmp_path):
    with pytest.raises(AudioError, match="does not exist"):
        load_waveform(tmp_path / "no.wav")
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"empty\.wav is empty"):
        load_waveform(tmp_path / "empty.wav")
    with pytest.raises(AudioError, match="empty"):
        load_waveform(b"")
    with pytest.raises(AudioError, match="folder"):
        load_waveform(tmp_path)
    (tmp_path / "text.mp3").write_text("This is not audio. " * 100)
    with pytest.raises(AudioError, match=r"text\.mp3 is not audio"):
        load_waveform(tmp_path / "text.mp3")


def test_playlists_open_no_other_file(tmp_path):
    write_waveform(tmp_path / "secret.wav", tone())
    (tmp_path / "list.wav").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'secret.wav'}\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path / 'secret.wav'}\n")
    for name in ("list.wav", "list.m3u8"):
        with pytest.raises(AudioError, match="not audio"):
            load_waveform(tmp_path / name)


def test_zero_length_and_nan(tmp_path):
    with pytest.raises(AudioError, match="no audio samples"):
        load_waveform(wav_bytes(np.zeros(0)))
    broken = tone()
    broken[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="not numbers"):
        load_waveform(tmp_path / "nan.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    rng = np.random.default_rng(0)
    soundfile.write(path, tone(4.0) + 0.05 * rng.standard_normal(4 * SAMPLE_RATE), SAMPLE_RATE)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(AudioError, match=r"truncated|damaged"):
        load_waveform(path)


def test_truncated_m4a(tmp_path):
    path = tmp_path / "cut.m4a"
    encode_av(path, tone(3.0, 44100)[None], 44100, "aac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"cut\.m4a"):
        load_waveform(path)


def test_three_hours_are_refused_by_the_header(write_three_hours, tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    write_three_hours(path)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: pytest.fail("decoded before the check"))
    with pytest.raises(AudioError, match="lasts 10800 s"):
        load_waveform(path)


def test_long_stream_without_a_declared_length_stops(tmp_path):
    path = tmp_path / "stream.webm"
    encode_av(path, tone(3.0, 48000)[None], 48000, "libopus")
    data = bytearray(path.read_bytes())
    position = data.find(b"\x44\x89\x88")  # the Duration element, as a live recorder leaves it out
    assert position > 0
    data[position : position + 3] = b"\xec\x89\x88"  # an element of 9 bytes to be skipped
    with pytest.raises(AudioError, match="at most 2 s"):
        load_waveform(bytes(data), max_seconds=2.0)


@pytest.mark.parametrize("rate", [0, 1, 4_000_000_000])
def test_lying_rate(rate):
    data = bytearray(wav_bytes(tone()))
    data[24:28] = struct.pack("<I", rate)
    with pytest.raises(AudioError):
        load_waveform(bytes(data))


def test_streamed_wav_without_a_length_is_read():
    data = bytearray(wav_bytes(tone()))
    position = data.find(b"data")
    data[position + 4 : position + 8] = b"\xff\xff\xff\xff"
    assert len(load_waveform(bytes(data))) == SAMPLE_RATE
