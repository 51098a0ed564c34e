"""What an audio encoder eats: log-mel spectrograms for Whisper, normalised samples for wav2vec 2.0 and HuBERT.

Both work on a clip's true length. Values equal those of Hugging Face's feature extractors on the same samples.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ultravox.audio.lengths import HOP_LENGTH, SAMPLE_RATE, num_mel_frames, window_lengths

FFT_SAMPLES = 400  # a 25 ms window
DYNAMIC_RANGE = 8.0  # bels below the loudest bin at which the spectrogram is cut off
LOWEST_POWER = 1e-10


@runtime_checkable
class FeatureExtractor(Protocol):
    """A function from one window's waveform to features whose last axis is time."""

    version: int
    """Part of every cache key: raised when the values change, or the windows that they are computed in."""

    def __call__(self, waveform: np.ndarray) -> Tensor:
        """From float32 [sample] to float32 [channel, time]."""
        ...

    def length(self, num_samples: int) -> int:
        """The time steps that a window of `num_samples` gives."""
        ...


@lru_cache(maxsize=4)
def _mel_filters(num_mel_bins: int) -> Tensor:
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=1 + FFT_SAMPLES // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(np.ascontiguousarray(filters.T)).float()


@lru_cache(maxsize=1)
def _window() -> Tensor:
    return torch.hann_window(FFT_SAMPLES)


class LogMel:
    """Whisper's log-mel spectrogram of the true length.

    Equal to `WhisperFeatureExtractor(padding="longest", pad_to_multiple_of=160, truncation=False)` on one clip: the
    tail is zero-padded to a whole hop and the end is reflected, not followed by silence up to 30 s.
    """

    version = 1

    def __init__(self, num_mel_bins: int):
        self.num_mel_bins = num_mel_bins

    def length(self, num_samples: int) -> int:
        """Mel frames of a window of `num_samples`."""
        return num_mel_frames(num_samples)

    def __call__(self, waveform: np.ndarray) -> Float[Tensor, "mel frame"]:
        """The log-mel features of one window (at most 30 s for Whisper), float32."""
        samples = torch.zeros(num_mel_frames(len(waveform)) * HOP_LENGTH)
        samples[: len(waveform)] = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))
        spectrum = torch.stft(samples, FFT_SAMPLES, HOP_LENGTH, window=_window(), return_complex=True)
        power = (spectrum[..., :-1].abs() ** 2).contiguous()  # a strided view here makes the product 8 times slower
        log_mel = (_mel_filters(self.num_mel_bins) @ power).clamp(min=LOWEST_POWER).log10()
        log_mel = torch.maximum(log_mel, log_mel.max() - DYNAMIC_RANGE)
        return (log_mel + 4.0) / 4.0


class NormalizedWaveform:
    """The samples themselves, with zero mean and unit variance where the encoder was trained so."""

    version = 2  # 2: clips over 30 s in windows

    def __init__(self, *, normalize: bool = True):
        self.normalize = normalize

    def length(self, num_samples: int) -> int:
        """Time steps: the samples."""
        return num_samples

    def __call__(self, waveform: np.ndarray) -> Float[Tensor, "1 sample"]:
        """One window's samples as a single channel."""
        samples = torch.from_numpy(np.array(waveform, dtype=np.float32))
        if self.normalize:
            samples = (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)
        return samples[None]


def windows(waveform: np.ndarray, min_samples: int = 1) -> Iterator[np.ndarray]:
    """The consecutive windows of a waveform [sample], as `window_lengths` has them."""
    start = 0
    for length in window_lengths(len(waveform), min_samples):
        yield waveform[start : start + length]
        start += length
