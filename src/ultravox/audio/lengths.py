"""The one length arithmetic: samples -> mel frames -> encoder frames -> language model positions.

The collator, the model, the processor and the server all call these functions, so that they cannot disagree.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

Count = TypeVar("Count")  # an int, or an array or tensor of them

SAMPLE_RATE = 16_000  # samples per second, everywhere
HOP_LENGTH = 160  # samples between two mel frames
MEL_FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH  # 100
ENCODER_STRIDE = 2  # the Whisper encoder's second convolution halves the frames
ENCODER_FRAMES_PER_SECOND = MEL_FRAMES_PER_SECOND // ENCODER_STRIDE  # 50
MAX_WINDOW_SECONDS = 30  # Whisper's position table ends here
MAX_WINDOW_SAMPLES = MAX_WINDOW_SECONDS * SAMPLE_RATE
FILTERBANK_SAMPLES = 400  # 25 ms, Kaldi's window
MIN_MEL_FRAMES = 2  # the spectrogram's reflected border (200 samples) needs more samples than one hop


def _ceil_div(value: Any, divisor: int) -> Any:
    return -(-value // divisor)


def num_mel_frames(num_samples: int) -> int:
    """Mel frames of a window of `num_samples`, whose tail is zero-padded to a whole hop, so that none of it is lost."""
    return max(MIN_MEL_FRAMES, _ceil_div(num_samples, HOP_LENGTH))


def num_encoder_frames(num_mel_frames: Count) -> Count:
    """Whisper encoder frames of windows of `num_mel_frames`."""
    return _ceil_div(num_mel_frames, ENCODER_STRIDE)


def num_audio_tokens(num_frames: Count, stack_factor: int) -> Count:
    """Language model positions of windows of `num_frames` encoder frames, the last stack zero-padded."""
    return _ceil_div(num_frames, stack_factor)


def num_convolution_frames(num_samples: int, layers: Sequence[Sequence[int]]) -> int:
    """Frames that unpadded (kernel, stride) convolutions make of `num_samples` (wav2vec 2.0, HuBERT)."""
    return chain_length(num_samples, convolution_chain(layers))


def num_filterbank_frames(num_samples: int) -> int:
    """Frames of Kaldi's filterbank, 25 ms each and 10 ms apart, all of them inside the window of `num_samples`."""
    return max(0, 1 + (num_samples - FILTERBANK_SAMPLES) // HOP_LENGTH)


def num_stacked_frames(num_frames: Count, stride: int) -> Count:
    """Stacks of `stride` filterbank frames (W2v-BERT 2.0), the last one zero-padded: no frame is lost."""
    return _ceil_div(num_frames, stride)


def receptive_field(layers: Sequence[Sequence[int]]) -> int:
    """The fewest samples that unpadded (kernel, stride) convolutions make a frame of."""
    return least_samples(convolution_chain(layers))


Chain = Sequence[Sequence[int]]
"""(offset, divisor) of each step from samples to encoder frames: n becomes (n + offset) // divisor, and never less
than 0. What every encoder here does to a window's length can be said so."""

MEL_CHAIN = ((HOP_LENGTH - 1, HOP_LENGTH), (ENCODER_STRIDE - 1, ENCODER_STRIDE))


def chain_length(count: int, chain: Chain) -> int:
    """What a chain makes of a number of samples, or of what stands at its beginning."""
    for offset, divisor in chain:
        count = max(0, (count + offset) // divisor)
    return count


def convolution_chain(layers: Sequence[Sequence[int]]) -> Chain:
    """The chain of unpadded (kernel, stride) convolutions."""
    return [(stride - kernel, stride) for kernel, stride in layers]


def filterbank_chain(stride: int) -> Chain:
    """The chain of Kaldi's filterbank in stacks of `stride`."""
    return [(HOP_LENGTH - FILTERBANK_SAMPLES, HOP_LENGTH), (stride - 1, stride)]


def least_samples(chain: Chain) -> int:
    """The fewest samples that a chain makes a frame of."""
    count = 1
    for offset, divisor in reversed(chain):
        count = max(1, count * divisor - offset)
    return count


def window_lengths(num_samples: int, min_samples: int = 1) -> list[int]:
    """Samples of each consecutive window of 30 s, the last one shorter; each window is encoded on its own.

    Where less than `min_samples` would be left for the last window, they lengthen the one before it: an encoder that
    hears the waveform makes no frame of less than its receptive field. Whisper does of a single sample.
    """
    full, rest = divmod(num_samples, MAX_WINDOW_SAMPLES)
    if full and 0 < rest < min_samples:
        return [MAX_WINDOW_SAMPLES] * (full - 1) + [MAX_WINDOW_SAMPLES + rest]
    return [MAX_WINDOW_SAMPLES] * full + ([rest] if rest else [])
