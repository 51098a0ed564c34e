"""Noise to hide speech in: made noise of three colours, or recordings from a folder (such as MUSAN, arXiv 1510.08484).

The signal-to-noise ratio counts the speech where somebody speaks, so that a pause does not make the noise softer.
"""

import hashlib
from pathlib import Path

import numpy as np

from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.audio.signal import active_power, energy, fast_length
from ultravox.audio.waveform import load_waveform
from ultravox.errors import AudioError, DataError
from ultravox.files import sha256_file

COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}  # power falls with so many powers of the frequency
FLAT_HERTZ = 50.0  # below it the power falls no more: it would all be where nobody hears it
SILENT_PEAK = 1e-6
MAX_RECORDING_SECONDS = 3600.0
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".webm")


def coloured_noise(length: int, colour: str, generator: np.random.Generator) -> np.ndarray:
    """Gaussian noise of a colour of `COLOURS` and of power 1: float32 [length]."""
    num_samples = fast_length(length)
    noise = generator.standard_normal(num_samples, dtype=np.float32)
    if COLOURS[colour]:
        hertz = np.maximum(np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE), FLAT_HERTZ)
        shape = (hertz / FLAT_HERTZ) ** (-COLOURS[colour] / 2)
        noise = np.fft.irfft(np.fft.rfft(noise) * shape.astype(np.float32), num_samples).astype(np.float32)
    noise = noise[:length]
    return noise / np.float32(np.sqrt(energy(noise) / length))


def add_noise(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise [sample], scaled so that the speech's active power is `snr_db` above it. Silence stays as it is."""
    speech, power = active_power(waveform), energy(noise) / max(1, len(noise))
    if speech == 0 or power == 0:
        return waveform
    return waveform + noise * np.float32(np.sqrt(speech / power * 10 ** (-snr_db / 10)))


class NoiseRecordings:
    """The recordings in a folder and its subfolders, each decoded when it is first wanted and then kept.

    They are kept as 16-bit numbers: 115 MB an hour, in each process that augments.
    """

    def __init__(self, folder: str | Path) -> None:
        """DataError when there is no such folder, or no recording in it."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"noise_folder {folder} is not a folder: name one that holds recordings of noise")
        found = [path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES]
        self.paths = sorted(found, key=lambda path: path.relative_to(self.folder).as_posix())
        if not self.paths:
            raise DataError(f"noise_folder {folder} holds no recordings ({', '.join(SUFFIXES)}): add some")
        self._kept: dict[Path, np.ndarray] = {}

    def fingerprint(self) -> str:
        """Hex SHA-256 over the recordings' names and contents."""
        lines = [f"{path.relative_to(self.folder).as_posix()} {sha256_file(path)}" for path in self.paths]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def draw(self, length: int, generator: np.random.Generator) -> np.ndarray:
        """A stretch of any recording from any place in it, played again and again when short: float32 [length].

        Raises:
            DataError: the recording cannot be decoded, or is silent.
        """
        choice, place = generator.random(2)
        recording = self._recording(self.paths[int(choice * len(self.paths))])
        places = len(recording) - length + 1 if len(recording) > length else len(recording)
        offset = int(place * places)
        stretch = self._stretch(recording, offset, length)
        if not stretch.any():  # digital silence: where it is loudest there is something to hear
            loudest = int(np.abs(recording).argmax())
            stretch = self._stretch(recording, max(0, loudest - length // 2), length)
        return stretch.astype(np.float32)

    @staticmethod
    def _stretch(recording: np.ndarray, offset: int, length: int) -> np.ndarray:
        return recording.take(np.arange(offset, offset + length), mode="wrap")

    def _recording(self, path: Path) -> np.ndarray:
        """Decoded and scaled to its own peak, int16 [sample]."""
        if path not in self._kept:
            try:
                waveform = load_waveform(path, max_seconds=MAX_RECORDING_SECONDS)
            except AudioError as error:
                raise DataError(f"noise_folder {self.folder}: {error}; or take it away from there") from error
            peak = float(np.abs(waveform).max())
            if peak < SILENT_PEAK:
                raise DataError(f"noise_folder {self.folder}: {path} is silent; take it away from there")
            self._kept[path] = np.round(waveform * (32767 / peak)).astype(np.int16)
        return self._kept[path]

    def __getstate__(self) -> dict[str, object]:
        """What was decoded stays behind: another process decodes what it needs."""
        return {**self.__dict__, "_kept": {}}
