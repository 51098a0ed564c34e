"""Log-mel features against Hugging Face's extractor on the same samples."""

import numpy as np
import pytest
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from ultravox.audio.features import LogMel, NormalizedWaveform


@pytest.mark.parametrize("num_samples", [320, 16000, 16001, 40_123, 480_000])
@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_equal_to_whisper(num_samples, num_mel_bins):
    waveform = (0.1 * np.random.default_rng(0).standard_normal(num_samples)).astype(np.float32)
    reference = WhisperFeatureExtractor(feature_size=num_mel_bins)(
        waveform,
        sampling_rate=16000,
        padding="longest",
        pad_to_multiple_of=160,
        truncation=False,
        return_tensors="np",
    ).input_features[0]
    features = LogMel(num_mel_bins)(waveform).numpy()
    assert features.dtype == np.float32
    # the same operations in the same order: only the product's summation order may differ
    np.testing.assert_allclose(features, reference, atol=1e-5)


def test_normalized_waveform_is_wav2vecs():
    waveform = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 3 + 1
    reference = Wav2Vec2FeatureExtractor(do_normalize=True)(waveform, sampling_rate=16000, return_tensors="np")
    np.testing.assert_allclose(NormalizedWaveform()(waveform)[0].numpy(), reference.input_values[0], atol=1e-5)
