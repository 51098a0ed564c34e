"""Augmentation of waveforms: speed, room, noise, level and codec, drawn anew for each clip in each epoch.

The order is the sound's own: somebody speaks faster or slower, in a room, noise joins, a microphone sets the level, and
a line or a file carries it. Masks over the encoder's frames are another matter (`augment.py`).
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from ultravox.audio.codecs import CODECS
from ultravox.audio.noise import COLOURS, NoiseRecordings, add_noise, coloured_noise
from ultravox.audio.rooms import DIRECT_DB, impulse_response, reverberate
from ultravox.audio.signal import within_full_scale
from ultravox.audio.waveform import change_speed
from ultravox.errors import AudioError, DataError

VERSION = 1  # raised when the same generator would give other samples


@dataclass(frozen=True, slots=True)
class EffectSettings:
    """How much of each effect. The fields are those of `WaveformAugmentConfig`, which checks their ranges."""

    gain_db: float = 0.0
    """Louder or softer by up to so much; what would go beyond full scale is turned down instead of clipped."""
    speed: float = 0.0
    """Faster or slower by up to this share."""
    noise_share: float = 0.0
    noise_snr_db: tuple[float, float] = (5.0, 25.0)
    noise_folder: str | None = None
    """Of recordings; None = noise is made."""
    reverb_share: float = 0.0
    reverb_seconds: tuple[float, float] = (0.1, 0.8)
    """T60, least and most."""
    codec_share: float = 0.0
    codecs: tuple[str, ...] = tuple(CODECS)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What happens to one clip; None = that does not."""

    speed: float
    reverb_seconds: float | None
    direct_db: float
    snr_db: float | None
    colour: str
    gain_db: float
    codec: str | None
    bit_rate: float
    """In [0, 1): place among the codec's bit rates."""
    echo_seed: int
    noise_seed: int


class WaveformAugmenter:
    """Waveforms to changed waveforms. Can be sent to other processes."""

    def __init__(self, settings: EffectSettings) -> None:
        """DataError when the folder of noise is missing or empty, or a codec is not known."""
        if unknown := [name for name in settings.codecs if name not in CODECS]:
            raise DataError(f"codec {unknown[0]!r} is not known: choose from {', '.join(CODECS)}")
        self.settings = settings
        self.recordings = NoiseRecordings(settings.noise_folder) if settings.noise_folder is not None else None

    def draw(self, generator: np.random.Generator) -> Drawn:
        """Choose. Always as many numbers are drawn, so that one effect's settings do not change another's choices."""
        settings = self.settings
        echo_seed, noise_seed = generator.integers(1 << 63, size=2).tolist()
        speed, reverb, t60, direct, noise, snr, colour, gain, codec, kind, bit_rate = generator.random(11).tolist()
        return Drawn(
            speed=_between((1 - settings.speed, 1 + settings.speed), speed),
            reverb_seconds=_between(settings.reverb_seconds, t60) if reverb < settings.reverb_share else None,
            direct_db=_between(DIRECT_DB, direct),
            snr_db=_between(settings.noise_snr_db, snr) if noise < settings.noise_share else None,
            colour=list(COLOURS)[int(colour * len(COLOURS))],
            gain_db=_between((-settings.gain_db, settings.gain_db), gain),
            codec=settings.codecs[int(kind * len(settings.codecs))] if codec < settings.codec_share else None,
            bit_rate=bit_rate,
            echo_seed=echo_seed,
            noise_seed=noise_seed,
        )

    def __call__(self, waveform: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Change a waveform as the generator says.

        Args:
            waveform: float32 [sample] at 16 kHz; it is left as it is.
            generator: decides everything: the same one gives the same samples, bit for bit.

        Returns: float32, as long as `change_speed` makes it (`length_bounds`). Where anything but the speed was
            changed, it stays within ±1: it is turned down as a whole, not clipped.

        Raises:
            AudioError: the waveform holds NaN or infinity.
            DataError: a recording of noise cannot be used.
        """
        if not np.isfinite(waveform).all():
            raise AudioError("a waveform to augment holds samples that are not numbers (NaN or infinite)")
        return self.apply(waveform, self.draw(generator))

    def apply(self, waveform: np.ndarray, drawn: Drawn) -> np.ndarray:
        """Change a waveform as `drawn` says; otherwise as a call."""
        if len(waveform) == 0:
            return waveform
        changed = change_speed(waveform, drawn.speed)
        if drawn.reverb_seconds is not None:
            changed = reverberate(
                changed, impulse_response(drawn.reverb_seconds, drawn.direct_db, _generator(drawn.echo_seed))
            )
        if drawn.snr_db is not None:
            noises = _generator(drawn.noise_seed)
            if self.recordings is not None:
                noise = self.recordings.draw(len(changed), noises)
            else:
                noise = coloured_noise(len(changed), drawn.colour, noises)
            changed = add_noise(changed, noise, drawn.snr_db)
        if drawn.gain_db:
            changed = changed * np.float32(10 ** (drawn.gain_db / 20))
        if drawn.codec is not None:
            changed = CODECS[drawn.codec](within_full_scale(changed), drawn.bit_rate)
        is_same = drawn.reverb_seconds is drawn.snr_db is drawn.codec is None and not drawn.gain_db
        return changed if is_same else within_full_scale(changed)

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides the samples beside the generator: settings, recordings, this code."""
        settings = dataclasses.asdict(self.settings)
        settings["noise_folder"] = self.recordings.fingerprint() if self.recordings is not None else None
        return hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode()).hexdigest()


def generator_for_sample(seed: int, epoch: int, uid: str, copy: int = 0) -> np.random.Generator:
    """The random generator of one example in one epoch: a pure function of its arguments, in any process.

    Args:
        seed: of the run.
        epoch: counts from 0.
        uid: of the example.
        copy: counts the times that the example comes in the epoch.
    """
    digest = hashlib.sha256(json.dumps([seed, epoch, uid, copy]).encode()).digest()
    return _generator(int.from_bytes(digest, "little"))


def length_bounds(num_samples: int, speed: float) -> tuple[int, int]:
    """The least and the most samples that a clip of `num_samples` has after `EffectSettings.speed`.

    A planner that does not hear the clip counts with the most: at a speed of 0.1 a ninth more.
    """
    if speed == 0:
        return num_samples, num_samples
    return math.floor(num_samples / (1 + speed)), math.ceil(num_samples / (1 - speed)) + 1


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))  # named, since what default_rng means may change


def _between(bounds: tuple[float, float], share: float) -> float:
    """The place in `bounds` that a number in [0, 1) means."""
    low, high = bounds
    return low + (high - low) * share
