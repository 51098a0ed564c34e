"""Lengths and levels of a waveform [sample], as the effects need them."""

import numpy as np

from ultravox.audio.lengths import SAMPLE_RATE

FRAME_SAMPLES = SAMPLE_RATE // 50  # 20 ms
ACTIVE_DB = 30.0  # frames so far below the loudest one hold no speech


def energy(waveform: np.ndarray) -> float:
    """Sum of squares, in float64: those of very quiet samples would be zero in float32."""
    return float(np.square(waveform, dtype=np.float64).sum())


def active_power(waveform: np.ndarray) -> float:
    """Mean power of the whole frames of 20 ms that are at most 30 dB below the loudest one; 0 for silence.

    A simple form of the active speech level (ITU-T P.56): a pause does not make the speaker softer.
    """
    whole = len(waveform) // FRAME_SAMPLES * FRAME_SAMPLES
    if whole == 0:
        return energy(waveform) / max(1, len(waveform))
    power = np.square(waveform[:whole].reshape(-1, FRAME_SAMPLES), dtype=np.float64).mean(axis=1)
    return float(power[power >= power.max() * 10 ** (-ACTIVE_DB / 10)].mean())


def fit(waveform: np.ndarray, length: int) -> np.ndarray:
    """The first `length` samples; where there are fewer, silence follows."""
    return waveform[:length] if len(waveform) >= length else np.pad(waveform, (0, length - len(waveform)))


def within_full_scale(waveform: np.ndarray) -> np.ndarray:
    """Turned down as a whole where it goes beyond ±1, so that nothing clips."""
    peak = float(np.abs(waveform).max(initial=0.0))
    return waveform / np.float32(peak) if peak > 1.0 else waveform


def fast_length(length: int) -> int:
    """The least number from `length` on without a prime factor above 5: Fourier transforms of such lengths are fast."""
    best = 1 << max(0, length - 1).bit_length()
    fives = 1
    while fives < best:
        product = fives
        while product < best:
            best = min(best, product << (-(-length // product) - 1).bit_length())
            product *= 3
        fives *= 5
    return best
