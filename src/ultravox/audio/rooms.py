"""Rooms: made impulse responses, and speech that is played in them.

A response is the direct sound and, after it, noise that decays exponentially, which is what a room's many reflections
add up to (Moorer 1979, "About this reverberation business"). No recorded responses are needed.
"""

import numpy as np

from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.audio.signal import energy, fast_length

FIRST_REFLECTION_SECONDS = 0.003  # a way that is one metre longer
DIRECT_DB = (0.0, 12.0)  # energy of the direct sound over that of all reflections: across a room to at arm's length


def impulse_response(seconds: float, direct_db: float, generator: np.random.Generator) -> np.ndarray:
    """A room's answer to one clap.

    Args:
        seconds: T60, in which the reflections fall by 60 dB. As long is the response.
        direct_db: energy of the direct sound over that of the reflections.
        generator: of the reflections.

    Returns: float32 [sample]; the direct sound is its first sample and is 1.
    """
    length = max(2, round(seconds * SAMPLE_RATE))
    first = min(round(FIRST_REFLECTION_SECONDS * SAMPLE_RATE), length - 1)
    time = np.arange(length - first) / (seconds * SAMPLE_RATE)
    reflections = generator.standard_normal(length - first) * 10.0 ** (-3.0 * time)
    reflections *= np.sqrt(10.0 ** (-direct_db / 10) / np.square(reflections).sum())
    response = np.zeros(length, dtype=np.float32)
    response[0] = 1.0
    response[first:] += reflections
    return response


def reverberate(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Play a waveform [sample] in a room: float32 of the same length and the same energy; the last echo is cut."""
    length = fast_length(len(waveform) + len(response) - 1)
    spectrum = np.fft.rfft(waveform, length) * np.fft.rfft(response, length)
    played = np.fft.irfft(spectrum, length)[: len(waveform)].astype(np.float32)
    before, after = energy(waveform), energy(played)
    return played * np.float32(np.sqrt(before / after)) if before > 0 and after > 0 else waveform
