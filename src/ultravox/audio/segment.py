"""A part of a recording, as NeMo's manifests and Lhotse's cuts name it: read when it is asked for, as a WAV file."""

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ultravox.audio.content import Audio
from ultravox.audio.waveform import MAX_SECONDS
from ultravox.errors import AudioError

SLACK_SECONDS = 0.05  # manifests round, and codecs end at a frame
IEEE_FLOAT = 3  # the WAVE format tag: no sample is rounded, whatever the recording holds


@dataclass(frozen=True, slots=True)
class AudioSegment:
    """`seconds` of a recording from `start` on, of all its channels or of one of them (counted from 0)."""

    audio: Audio
    start: float
    seconds: float
    channel: int | None = None

    @property
    def suffix(self) -> str:
        return ".wav"

    def __str__(self) -> str:
        channel = "" if self.channel is None else f", channel {self.channel}"
        return f"{self.audio} ({self.start:g} s to {self.start + self.seconds:g} s{channel})"

    def read(self) -> bytes:
        """The part as a WAV file of 32-bit floats at the recording's own rate; nothing before it is decoded.

        Raises:
            AudioError: it is too long; the recording is missing, no wav, flac, ogg, opus or mp3 file, or ends before
                the part does.
        """
        import soundfile

        if self.seconds > MAX_SECONDS:
            raise AudioError(
                f"{self} lasts {self.seconds:.0f} s or more: at most {MAX_SECONDS:.0f} s are accepted; "
                "name shorter parts"
            )
        source = self.audio if isinstance(self.audio, Path) else io.BytesIO(self.audio.read())
        if isinstance(source, Path) and not source.is_file():
            raise AudioError(f"{source} does not exist: give the recording that the part is of")
        try:
            with soundfile.SoundFile(source) as sound:
                rate, num_channels = sound.samplerate, sound.channels
                first, count = round(self.start * rate), round(self.seconds * rate)
                sound.seek(min(first, sound.frames))
                samples = sound.read(count, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, TypeError) as error:
            raise AudioError(
                f"{self.audio} is damaged, or no file that a part can be read from ({error}): use wav, flac, ogg or mp3"
            ) from None
        if len(samples) < count - SLACK_SECONDS * rate or not len(samples):
            raise AudioError(f"{self} ends after {(first + len(samples)) / rate:.2f} s: correct its offset or duration")
        if self.channel is not None:
            if not 0 <= self.channel < num_channels:
                raise AudioError(f"{self}: the recording has {num_channels} channels, counted from 0")
            samples = samples[:, self.channel : self.channel + 1]
        return _wav(samples, rate)


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """A WAV file of float samples [frame, channel]; the same samples give the same bytes.

    libsndfile would write the time of day into it (its PEAK chunk), and nothing could be found again by its content.
    """
    data = np.ascontiguousarray(samples, dtype="<f4").tobytes()
    num_channels = samples.shape[1]
    form = struct.pack("<HHIIHHH", IEEE_FLOAT, num_channels, rate, rate * num_channels * 4, num_channels * 4, 32, 0)
    chunks = [(b"fmt ", form), (b"fact", struct.pack("<I", len(samples))), (b"data", data)]
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body
