"""What an audio encoder eats: Whisper's log-mel spectrogram, normalised samples (wav2vec 2.0 and its kin), and the
stacked filterbanks of W2v-BERT 2.0.

All work on a clip's true length. Values equal those of Hugging Face's feature extractors on the same samples.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ultravox.audio.lengths import (
    FILTERBANK_SAMPLES,
    HOP_LENGTH,
    SAMPLE_RATE,
    num_filterbank_frames,
    num_mel_frames,
    num_stacked_frames,
    window_lengths,
)
from ultravox.errors import AudioError, ModelError

FFT_SAMPLES = 400  # a 25 ms window
DYNAMIC_RANGE = 8.0  # bels below the loudest bin at which the spectrogram is cut off
LOWEST_POWER = 1e-10
FILTERBANK_FFT_SAMPLES = 512
PREEMPHASIS = 0.97
LOWEST_FILTERBANK_POWER = 1.192092955078125e-07  # the smallest step of a float32 at 1, as in Kaldi


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


class StackedFilterbank:
    """Kaldi's log-mel filterbank, normalised over each clip's time, neighbouring frames joined (W2v-BERT 2.0).

    Equal to `SeamlessM4TFeatureExtractor` on one clip. Where the number of frames leaves a remainder, that extractor
    masks the last stack; here it counts, half of it zeros, since the end of a clip is never dropped.
    """

    version = 1
    #: Of fewer, the variance over time is none.
    MIN_FRAMES = 2

    def __init__(self, num_mel_bins: int = 80, stride: int = 2):
        self.num_mel_bins, self.stride = num_mel_bins, stride

    def length(self, num_samples: int) -> int:
        """Stacks of a window of `num_samples`."""
        return num_stacked_frames(num_filterbank_frames(num_samples), self.stride)

    @property
    def min_samples(self) -> int:
        """The shortest window whose features are numbers."""
        return FILTERBANK_SAMPLES + (self.MIN_FRAMES - 1) * HOP_LENGTH

    def __call__(self, waveform: np.ndarray) -> Float[Tensor, "stacked_mel stack"]:
        """The features of one window. AudioError when it is too short for two frames."""
        if len(waveform) < self.min_samples:
            raise AudioError(f"{len(waveform)} samples are too few for this encoder, which wants {self.min_samples}")
        samples = torch.from_numpy(np.array(waveform, dtype=np.float32)) * 2**15  # Kaldi reads 16-bit integers
        frames = samples.unfold(0, FILTERBANK_SAMPLES, HOP_LENGTH)
        frames = frames - frames.mean(1, keepdim=True)
        first = frames[:, :1] * (1 - PREEMPHASIS)
        frames = torch.cat([first, frames[:, 1:] - PREEMPHASIS * frames[:, :-1]], dim=1) * _povey_window()
        power = torch.fft.rfft(frames, n=FILTERBANK_FFT_SAMPLES).abs().square()
        log_mel = (power @ _kaldi_filters(self.num_mel_bins)).clamp(min=LOWEST_FILTERBANK_POWER).log()
        log_mel = (log_mel - log_mel.mean(0)) / (log_mel.var(0) + 1e-7).sqrt()
        log_mel = F.pad(log_mel, (0, 0, 0, -len(log_mel) % self.stride))
        return log_mel.reshape(-1, self.stride * self.num_mel_bins).T


@lru_cache(maxsize=1)
def _povey_window() -> Tensor:
    """Kaldi's window: Hann's to the power of 0.85."""
    return torch.hann_window(FILTERBANK_SAMPLES, periodic=False).pow(0.85)


@lru_cache(maxsize=4)
def _kaldi_filters(num_mel_bins: int) -> Tensor:
    """[frequency, mel]."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=1 + FILTERBANK_FFT_SAMPLES // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=20,
        max_frequency=SAMPLE_RATE // 2,
        sampling_rate=SAMPLE_RATE,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    return torch.from_numpy(filters).float()


def feature_extractor_of(processor: Any) -> FeatureExtractor:
    """The function that computes what a Hugging Face feature extractor with these settings computes.

    Raises:
        ModelError: one that is not known here.
    """
    kind = type(processor).__name__
    if kind == "WhisperFeatureExtractor":
        return LogMel(processor.feature_size)
    if kind == "Wav2Vec2FeatureExtractor":
        return NormalizedWaveform(normalize=processor.do_normalize)
    if kind == "SeamlessM4TFeatureExtractor":
        return StackedFilterbank(processor.num_mel_bins, processor.stride)
    known = "WhisperFeatureExtractor, Wav2Vec2FeatureExtractor or SeamlessM4TFeatureExtractor"
    raise ModelError(f"the encoder comes with a {kind}, which is not known here: expected {known}")


def windows(waveform: np.ndarray, min_samples: int = 1) -> Iterator[np.ndarray]:
    """The consecutive windows of a waveform [sample], as `window_lengths` has them."""
    start = 0
    for length in window_lengths(len(waveform), min_samples):
        yield waveform[start : start + length]
        start += length
