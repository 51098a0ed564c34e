"""The length arithmetic against the things that it predicts."""

import numpy as np
import pytest
import torch

from ultravox.audio.features import LogMel, NormalizedWaveform, windows
from ultravox.audio.lengths import (
    MAX_WINDOW_SAMPLES,
    num_audio_tokens,
    num_convolution_frames,
    num_encoder_frames,
    num_mel_frames,
    receptive_field,
    window_lengths,
)


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 201, 16000, 16001, 479_999, 480_000])
def test_mel_frames(num_samples):
    features = LogMel(80)(np.ones(num_samples, dtype=np.float32))
    assert features.shape == (80, num_mel_frames(num_samples))
    assert torch.isfinite(features).all()


def test_thirty_seconds_give_1500_frames():
    assert num_encoder_frames(num_mel_frames(MAX_WINDOW_SAMPLES)) == 1500
    assert num_audio_tokens(1500, 5) == 300


@pytest.mark.parametrize("mel_frames", range(1, 60))
@pytest.mark.parametrize("stack_factor", [1, 4, 5, 8])
def test_public_formula(mel_frames, stack_factor):
    """ceil(mel / (2 * stack)), as every consumer of a checkpoint computes it."""
    assert num_audio_tokens(num_encoder_frames(mel_frames), stack_factor) == -(-mel_frames // (2 * stack_factor))


def test_lengths_work_on_tensors():
    lengths = torch.tensor([1, 2, 3, 101])
    assert num_encoder_frames(lengths).tolist() == [1, 1, 2, 51]
    assert num_audio_tokens(lengths, 5).tolist() == [1, 1, 1, 21]


@pytest.mark.parametrize("num_samples", [1, MAX_WINDOW_SAMPLES, MAX_WINDOW_SAMPLES + 1, 3 * MAX_WINDOW_SAMPLES - 7])
def test_windows_cover_everything_once(num_samples):
    waveform = np.arange(num_samples, dtype=np.float32)
    pieces = list(windows(waveform))
    assert [len(piece) for piece in pieces] == window_lengths(num_samples)
    assert max(map(len, pieces)) <= MAX_WINDOW_SAMPLES
    np.testing.assert_array_equal(np.concatenate(pieces), waveform)


HUBERT = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]


@pytest.mark.parametrize("rest", [0, 1, 160, 399, 400, 16000])
@pytest.mark.parametrize("full", [1, 2])
def test_a_tail_without_a_frame_joins_the_window_before_it(full, rest):
    least = receptive_field(HUBERT)
    assert least == 400
    lengths = window_lengths(full * MAX_WINDOW_SAMPLES + rest, least)
    assert sum(lengths) == full * MAX_WINDOW_SAMPLES + rest
    assert len(lengths) == full + (rest >= least)
    assert all(num_convolution_frames(length, HUBERT) for length in lengths)
    pieces = list(windows(np.zeros(sum(lengths), np.float32), least))
    assert [len(piece) for piece in pieces] == lengths


def test_a_short_clip_is_one_window():
    assert window_lengths(300, 400) == [300]


def test_convolution_frames_and_waveform_features():
    layers = HUBERT
    assert num_convolution_frames(400, layers) == 1
    assert num_convolution_frames(399, layers) == 0
    assert num_convolution_frames(16000, layers) == 49
    samples = NormalizedWaveform()(np.arange(100, dtype=np.float32))
    assert samples.shape == (1, 100)
    assert abs(float(samples.mean())) < 1e-5
    assert float(samples.std(correction=0)) == pytest.approx(1, abs=1e-3)
