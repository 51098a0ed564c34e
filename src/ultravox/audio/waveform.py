"""Any audio file to 16 kHz mono samples, or one clear reason why not.

libsndfile reads wav, flac, ogg and mp3; FFmpeg (PyAV) reads the rest (m4a, webm, g722 …). A file's declared length is
checked before a sample of it is decoded, and decoding goes block by block, so that a hostile file cannot fill memory.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ultravox.audio.content import AudioContent
from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.errors import AudioError
from ultravox.files import atomic_write

__all__ = [
    "SAMPLE_RATE",
    "audio_seconds",
    "change_speed",
    "load_speech",
    "load_waveform",
    "require_speech",
    "write_waveform",
]

MAX_SECONDS = 600.0
MIN_SPEECH_SECONDS = 0.1  # no word is shorter, and a model that is asked what was said would invent one
MIN_SOURCE_RATE, MAX_SOURCE_RATE = 2_000, 384_000  # samples per second; a header outside of this lies
MAX_CHANNELS = 64
BLOCK_FRAMES = 1 << 16
UNKNOWN_FRAMES = 1 << 62  # libsndfile counts more where a header leaves it open, as encoders do that write to a pipe
SLACK_SECONDS = 0.25  # codecs round a file's length to their frame size
RAW_FORMATS = {".g722": "g722"}  # without a header, so that only the name can tell
FORMATS_HINT = "give a wav, flac, mp3, ogg, m4a or webm file"
# FFmpeg's playlists and concatenations would open other files and addresses, so only plain containers are allowed.
CONTAINERS = "mov,mp4,m4a,matroska,webm,ogg,mp3,wav,flac,aac,aiff,g722,amr,caf,w64,au,adts,asf"


@dataclass(slots=True)
class _Decoder:
    """An opened file: its rate, the seconds that its header declares (None = unknown), and mono blocks to come."""

    rate: int
    declared_seconds: float | None
    blocks: Iterator[np.ndarray]


def load_waveform(
    source: str | Path | AudioContent | bytes | BinaryIO, *, max_seconds: float = MAX_SECONDS
) -> np.ndarray:
    """Decode a file, mix it to mono and resample it to 16 kHz.

    Args:
        source: a path, a place inside something else, a file's content, or an open binary file.
        max_seconds: longer audio is refused, by its header where it has one.

    Returns:
        float32 [sample], in about -1 … 1.

    Raises:
        AudioError: missing, empty, truncated, not audio, without samples, with NaN, or too long.
    """
    told = getattr(source, "seconds", None)  # of a part of a recording, which is decoded to be read
    if told is not None and told > max_seconds:
        raise _too_long(str(source), told, max_seconds)
    name, file, suffix = _open(source)
    with file:
        decoder = _open_decoder(name, file, suffix)
        declared = decoder.declared_seconds
        if declared is not None and declared > max_seconds:
            raise _too_long(name, declared, max_seconds)
        blocks = list(_limited(name, decoder, max_seconds))
    num_source = sum(map(len, blocks))
    if num_source == 0:
        raise _without_samples(name)
    seconds = num_source / decoder.rate
    if declared is not None and seconds < 0.98 * declared - SLACK_SECONDS:
        raise AudioError(
            f"{name} is truncated: its header declares {declared:.2f} s, but only {seconds:.2f} s can be decoded; "
            "copy or download it again"
        )
    return _resample(np.concatenate(blocks), decoder.rate)


def audio_seconds(source: str | Path | AudioContent | BinaryIO, name: str = "the audio data") -> float:
    """Seconds that the header declares; no sample is decoded.

    Args:
        source: a path, a place inside something else, or an open file that can be sought in.
        name: of an open file, in messages.

    Raises:
        AudioError: missing, empty, truncated, without samples or not audio, or the header does not tell.
    """
    if hasattr(source, "seek"):
        file, suffix = cast(BinaryIO, source), ""
    else:
        name, file, suffix = _open(cast("str | Path | AudioContent", source))
    with file:
        declared = _open_decoder(name, file, suffix).declared_seconds
    if declared is None:
        raise AudioError(f"the header of {name} does not tell its length: name its duration in the row")
    if declared == 0:
        raise _without_samples(name)
    return declared


def load_speech(source: str | Path | bytes | BinaryIO) -> np.ndarray:
    """`load_waveform` of a recording that a model is to answer; AudioError also when it is too short to hold a word."""
    waveform = load_waveform(source)
    require_speech(waveform, str(source) if isinstance(source, str | os.PathLike) else "the audio data")
    return waveform


def require_speech(waveform: np.ndarray, name: str) -> None:
    """AudioError when a waveform [sample] is too short to hold a word."""
    if (seconds := len(waveform) / SAMPLE_RATE) < MIN_SPEECH_SECONDS:
        raise AudioError(f"{name} lasts {seconds:.3f} s: expected speech of at least {MIN_SPEECH_SECONDS} s")


def write_waveform(path: str | Path, waveform: np.ndarray) -> None:
    """Write float samples [sample] as 16 kHz mono, 16 bits; the suffix (.wav, .flac, …) says the format."""
    import soundfile

    path = Path(path)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1.0, 1.0), SAMPLE_RATE, format=path.suffix[1:].upper())
    atomic_write(path, buffer.getvalue())


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Play `factor` times as fast (tempo and pitch together): float32 [sample / factor]."""
    if factor == 1.0:
        return waveform
    import soxr

    return soxr.resample(waveform, SAMPLE_RATE * factor, SAMPLE_RATE).astype(np.float32)


def _resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return waveform
    import soxr

    resampled = soxr.resample(waveform, rate, SAMPLE_RATE).astype(np.float32)
    return resampled if len(resampled) else np.zeros(1, dtype=np.float32)


def _without_samples(name: str) -> AudioError:
    return AudioError(f"{name} holds no audio samples: expected speech; record or export it again")


def _too_long(name: str, seconds: float, max_seconds: float) -> AudioError:
    return AudioError(
        f"{name} lasts {seconds:.0f} s or more: at most {max_seconds:.0f} s are accepted; cut it into shorter files"
    )


def _open(source: str | Path | AudioContent | bytes | BinaryIO) -> tuple[str, BinaryIO, str]:
    """A name for messages, the open file and the name's suffix; missing and empty ones are refused here."""
    if isinstance(source, bytes):
        if not source:
            raise AudioError(f"the audio data is empty (0 bytes): {FORMATS_HINT}")
        return "the audio data", io.BytesIO(source), ""
    if isinstance(source, AudioContent) and not isinstance(source, os.PathLike):
        content = source.read()
        if not content:
            raise AudioError(f"{source} is empty (0 bytes): {FORMATS_HINT}")
        return str(source), io.BytesIO(content), source.suffix.lower()
    if not isinstance(source, str | os.PathLike):
        return _open(source.read())
    path = Path(source)
    if path.is_dir():
        raise AudioError(f"{path} is a folder: {FORMATS_HINT}")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise AudioError(f"{path} does not exist: {FORMATS_HINT}") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{path} cannot be read ({error}): {FORMATS_HINT}") from None
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise AudioError(f"{path} is empty (0 bytes): {FORMATS_HINT}")
    return str(path), file, path.suffix.lower()


def _open_decoder(name: str, file: BinaryIO, suffix: str) -> _Decoder:
    decoder = _find_decoder(name, file, suffix)
    if not MIN_SOURCE_RATE <= decoder.rate <= MAX_SOURCE_RATE:
        raise AudioError(
            f"{name} declares {decoder.rate} samples per second: expected {MIN_SOURCE_RATE} to {MAX_SOURCE_RATE}; "
            "its header is damaged, so export it again"
        )
    return decoder


def _find_decoder(name: str, file: BinaryIO, suffix: str) -> _Decoder:
    import soundfile

    if suffix in RAW_FORMATS:
        return _open_av(name, file, RAW_FORMATS[suffix])
    _check_whole(name, file)
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError):
        file.seek(0)
        return _open_av(name, file, None)
    if sound.channels > MAX_CHANNELS:
        raise AudioError(f"{name} declares {sound.channels} channels: at most {MAX_CHANNELS} are accepted")
    if sound.frames >= UNKNOWN_FRAMES:  # libsndfile would fail at the end, wherever that is
        file.seek(0)
        return _open_av(name, file, None)
    rate = sound.samplerate
    return _Decoder(rate, sound.frames / rate if rate else None, _sound_blocks(name, sound))


def _sound_blocks(name: str, sound: Any) -> Iterator[np.ndarray]:
    import soundfile

    try:
        while len(block := sound.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
            yield block.mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name} is damaged or truncated ({error}): copy or download it again") from None


def _open_av(name: str, file: BinaryIO, container_format: str | None) -> _Decoder:
    import av

    options = {"format_whitelist": CONTAINERS}
    try:
        container = av.open(file, format=container_format, container_options=options)
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = str(error).split("; last error")[0]
        raise AudioError(f"{name} is not audio that can be decoded, or is damaged ({reason}): {FORMATS_HINT}") from None
    if not container.streams.audio:
        raise AudioError(f"{name} holds no audio stream: {FORMATS_HINT}")
    stream = container.streams.audio[0]
    seconds = None
    if container_format is None:  # for a raw format FFmpeg only guesses
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / av.time_base
    return _Decoder(int(stream.rate or 0), seconds, _av_blocks(name, container, stream))


def _av_blocks(name: str, container: Any, stream: Any) -> Iterator[np.ndarray]:
    """Mono float blocks at the stream's own rate; a damaged tail is an error, not a shorter clip."""
    import av

    to_float = av.AudioResampler(format="fltp")
    try:
        for frame in container.decode(stream):
            for converted in to_float.resample(frame):
                yield converted.to_ndarray().mean(axis=0, dtype=np.float32)
    except (av.FFmpegError, ValueError) as error:
        raise AudioError(f"{name} is damaged or truncated ({error}): copy or download it again") from None
    finally:
        container.close()


def _limited(name: str, decoder: _Decoder, max_seconds: float) -> Iterator[np.ndarray]:
    """The decoder's blocks, stopped by NaN and by more audio than the header promised to keep."""
    num_frames = 0
    for block in decoder.blocks:
        if not np.isfinite(block).all():
            raise AudioError(f"{name} holds samples that are not numbers (NaN or infinite): export it again")
        num_frames += len(block)
        if num_frames > max_seconds * decoder.rate:
            raise _too_long(name, num_frames / decoder.rate, max_seconds)
        yield block


def _check_whole(name: str, file: BinaryIO) -> None:
    """Refuse wav and ogg files that end before their headers say; libsndfile and FFmpeg would decode what is left."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    missing = 0
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        missing = _missing_wav_bytes(file, size)
    elif head[:4] == b"OggS":
        missing = _missing_ogg_bytes(file, size)
    file.seek(0)
    if missing > 0:
        raise AudioError(f"{name} is truncated: {missing} bytes are missing at its end; copy or download it again")


def _missing_wav_bytes(file: BinaryIO, size: int) -> int:
    position = 12
    while position + 8 <= size:
        file.seek(position)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if header[:4] == b"data":
            is_stream = length >= 0x7FFF0000  # a recorder that wrote to a pipe did not know the length
            return 0 if is_stream else position + 8 + length - size
        position += 8 + length + length % 2
    return 0  # no data chunk: the decoder says so better


def _missing_ogg_bytes(file: BinaryIO, size: int) -> int:
    file.seek(max(0, size - (1 << 16) - 512))  # a page is at most 65,307 bytes
    tail = file.read()
    start = tail.rfind(b"OggS")
    if start < 0:
        return 0
    page = tail[start:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return 27 - len(page) if len(page) < 27 else 27 + page[26] - len(page)
    return 27 + page[26] + sum(page[27 : 27 + page[26]]) - len(page)
