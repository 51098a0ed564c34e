"""What an audio encoder eats: Whisper's log-mel spectrogram, normalised samples (wav2vec 2.0 and its kin), and the
stacked filterbanks of W2v-BERT 2.0.

All work on a clip's true length. Values equal those of Hugging Face's feature extractors on the same samples.

Some values depend on all of a clip: Whisper's are cut off below its loudest bin, the others are normalised over it. An
encoder that runs on blocks of audio as it arrives takes features without that last step (`raw`), and does it for each
block by itself (`finish`).
"""

import hashlib
import json
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

    def finish(self, features: Tensor) -> Tensor:
        """From raw features [channel, time] to features: the step that looks at all of them."""
        ...

    @property
    def name(self) -> str:
        """Part of every cache key: all that decides the values and is not the encoder's own configuration."""
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
    tail is zero-padded to a whole hop and the end is reflected, not followed by silence up to 30 s. With `padded`, it
    is followed by silence, as Whisper was trained: these are the first frames of `WhisperFeatureExtractor()`'s 3000,
    up to the last one that a sample reaches (`TAIL_FRAMES` past the clip's own).
    """

    version = 1
    #: A frame looks 200 samples ahead, so this many behind the clip's last one still see some of it.
    TAIL_FRAMES = 2

    def __init__(self, num_mel_bins: int, *, padded: bool = False, raw: bool = False):
        self.num_mel_bins, self.padded, self.raw = num_mel_bins, padded, raw
        self.tail = self.TAIL_FRAMES if padded else 0

    @property
    def name(self) -> str:
        """See `FeatureExtractor`."""
        return f"LogMel-{self.version}{'-padded' * self.padded}{'-raw' * self.raw}"

    def length(self, num_samples: int) -> int:
        """Mel frames of a window of `num_samples`."""
        return num_mel_frames(num_samples) + self.tail

    def __call__(self, waveform: np.ndarray) -> Float[Tensor, "mel frame"]:
        """The log-mel features of one window (at most 30 s for Whisper), float32."""
        num_frames = self.length(len(waveform))
        samples = torch.zeros((num_frames + self.tail) * HOP_LENGTH)  # the reflection stays in the silence
        samples[: len(waveform)] = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))
        spectrum = torch.stft(samples, FFT_SAMPLES, HOP_LENGTH, window=_window(), return_complex=True)
        # a strided view here makes the product 8 times slower
        power = (spectrum[..., :num_frames].abs() ** 2).contiguous()
        log_mel = (_mel_filters(self.num_mel_bins) @ power).clamp(min=LOWEST_POWER).log10()
        return log_mel if self.raw else self.finish(log_mel)

    def finish(self, features: Float[Tensor, "mel frame"]) -> Float[Tensor, "mel frame"]:
        """Cut off what is far below the loudest bin, and scale."""
        return (torch.maximum(features, features.max() - DYNAMIC_RANGE) + 4.0) / 4.0

    @staticmethod
    def silence(features: Float[Tensor, "mel frame"]) -> Float[Tensor, ""]:
        """What a frame of silence is in a clip of these (finished) features."""
        lowest = (torch.tensor(LOWEST_POWER).log10() + 4.0) / 4.0
        return torch.maximum(lowest.to(features), features.max() - DYNAMIC_RANGE / 4.0)


class NormalizedWaveform:
    """The samples themselves, with zero mean and unit variance where the encoder was trained so."""

    version = 2  # 2: clips over 30 s in windows

    def __init__(self, *, normalize: bool = True, raw: bool = False):
        self.normalize, self.raw = normalize, raw

    @property
    def name(self) -> str:
        """See `FeatureExtractor`."""
        return f"NormalizedWaveform-{self.version}-{'raw' if self.raw or not self.normalize else 'normalized'}"

    def length(self, num_samples: int) -> int:
        """Time steps: the samples."""
        return num_samples

    def __call__(self, waveform: np.ndarray) -> Float[Tensor, "1 sample"]:
        """One window's samples as a single channel."""
        samples = torch.from_numpy(np.array(waveform, dtype=np.float32))[None]
        return samples if self.raw else self.finish(samples)

    def finish(self, features: Float[Tensor, "1 sample"]) -> Float[Tensor, "1 sample"]:
        """Normalise, where the encoder wants that."""
        if not self.normalize:
            return features
        return (features - features.mean()) / torch.sqrt(features.var(correction=0) + 1e-7)


class StackedFilterbank:
    """Kaldi's log-mel filterbank, normalised over each clip's time, neighbouring frames joined (W2v-BERT 2.0).

    Equal to `SeamlessM4TFeatureExtractor` on one clip. Where the number of frames leaves a remainder, that extractor
    masks the last stack; here it counts, half of it zeros, since the end of a clip is never dropped.
    """

    version = 1
    #: Of fewer, the variance over time is none.
    MIN_FRAMES = 2

    def __init__(self, num_mel_bins: int = 80, stride: int = 2, *, raw: bool = False):
        self.num_mel_bins, self.stride, self.raw = num_mel_bins, stride, raw

    @property
    def name(self) -> str:
        """See `FeatureExtractor`."""
        return f"StackedFilterbank-{self.version}-{self.num_mel_bins}x{self.stride}{'-raw' * self.raw}"

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
        missing = -len(log_mel) % self.stride
        if self.raw:  # the mean is not known yet that a zero will stand for
            return self._stacked(torch.cat([log_mel, log_mel[-1:].expand(missing, -1)]))
        return self._stacked(F.pad(self._normalised(log_mel), (0, 0, 0, missing)))

    def _stacked(self, log_mel: Tensor) -> Tensor:
        return log_mel.reshape(-1, self.stride * self.num_mel_bins).T

    @staticmethod
    def _normalised(log_mel: Tensor) -> Tensor:
        return (log_mel - log_mel.mean(0)) / (log_mel.var(0) + 1e-7).sqrt()

    def finish(self, features: Float[Tensor, "stacked_mel stack"]) -> Float[Tensor, "stacked_mel stack"]:
        """Normalise each mel bin over time. Where a raw clip's last stack was filled up, by repetition, that counts."""
        return self._stacked(self._normalised(features.T.reshape(-1, self.num_mel_bins)))


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


class OtherFeatures:
    """What any other Hugging Face feature extractor makes of one window, for encoders of other kinds.

    Args:
        processor: the feature extractor.
        steps: (offset, divisor): time steps = (samples + offset) // divisor, as `fit_steps` finds them.
    """

    version = 1

    def __init__(self, processor: Any, steps: tuple[int, int] | None = None):
        self.processor = processor
        self.input_name = processor.model_input_names[0]
        self.steps = steps

    @property
    def name(self) -> str:
        """See `FeatureExtractor`."""
        settings = {key: value for key, value in self.processor.to_dict().items() if "processor" not in key}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        return f"{type(self.processor).__name__}-{self.version}-{digest[:16]}"

    def length(self, num_samples: int) -> int:
        """Time steps of a window of `num_samples`."""
        if self.steps is None:
            noise = np.random.default_rng(0).standard_normal(num_samples, dtype=np.float32)  # silence has no variance
            return self._of(noise).shape[-1]
        return max(0, (num_samples + self.steps[0]) // self.steps[1])

    def __call__(self, waveform: np.ndarray) -> Float[Tensor, "channel step"]:
        """The features of one window. AudioError when their number is not what was found for this extractor."""
        features = self._of(waveform)
        if self.steps is not None and features.shape[-1] != self.length(len(waveform)):
            raise AudioError(
                f"{type(self.processor).__name__} made {features.shape[-1]} steps of {len(waveform)} samples, where "
                f"{self.length(len(waveform))} were expected: it pads or cuts, which no audio encoder here can bear"
            )
        return features

    def _of(self, waveform: np.ndarray) -> Tensor:
        found = self.processor(np.asarray(waveform), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        values = found[self.input_name][0].float()
        return values[None] if values.ndim == 1 else values.T

    def finish(self, features: Tensor) -> Tensor:
        """Nobody knows what of these depends on the whole clip."""
        raise ModelError(f"{type(self.processor).__name__}'s features cannot be made block by block")


def feature_extractor_of(processor: Any, *, padded: bool = False, raw: bool = False) -> FeatureExtractor:
    """The function that computes what a Hugging Face feature extractor with these settings computes.

    Args:
        processor: the feature extractor.
        padded: as if silence up to 30 s followed; Whisper's alone.
        raw: without what looks at the whole window.

    Raises:
        ModelError: padded or raw, for one that is not known here.
    """
    kind = type(processor).__name__
    if kind == "WhisperFeatureExtractor":
        return LogMel(processor.feature_size, padded=padded, raw=raw)
    if padded:
        raise ModelError(f"audio_padding: padded is Whisper's way; this encoder's features come from a {kind}")
    if kind == "Wav2Vec2FeatureExtractor":
        return NormalizedWaveform(normalize=processor.do_normalize, raw=raw)
    if kind == "SeamlessM4TFeatureExtractor":
        return StackedFilterbank(processor.num_mel_bins, processor.stride, raw=raw)
    if raw:
        raise ModelError(f"encoder_window_seconds does not go with a {kind}, whose features cannot be made in blocks")
    return OtherFeatures(processor)


def windows(waveform: np.ndarray, min_samples: int = 1) -> Iterator[np.ndarray]:
    """The consecutive windows of a waveform [sample], as `window_lengths` has them."""
    start = 0
    for length in window_lengths(len(waveform), min_samples):
        yield waveform[start : start + length]
        start += length
