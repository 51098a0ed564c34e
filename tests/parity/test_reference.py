"""Our model against Hugging Face's on the bundled weights: the same encoder frames, the same logits."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, WhisperModel

from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.config.model import ModelConfig
from ultravox.errors import NetworkError
from ultravox.model.factory import build_model, build_processor
from ultravox.model.pretrained import resolve_model

pytestmark = pytest.mark.network

CONFIG = ModelConfig(
    language_model="smollm2-135m-instruct", audio_encoder="whisper-tiny.en", chat_template="chatml.jinja"
)


@pytest.fixture(scope="module")
def paths(not_fetched):
    """Folders of the two bundled models."""
    try:
        return resolve_model(CONFIG.language_model), resolve_model(CONFIG.audio_encoder)
    except NetworkError as error:
        not_fetched(error)


@pytest.fixture(scope="module")
def model(paths):
    """Whisper tiny.en, a fresh projector, SmolLM2."""
    return build_model(CONFIG).eval()


def chirp(seconds: float) -> np.ndarray:
    """A rising tone with some noise, float32 [sample]."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * (200 + 20 * time) * time) + 0.01 * noise).astype(np.float32)


@torch.no_grad()
def test_whisper_encoder(model, paths):
    features = model.audio_tower.features(chirp(30.0))[None]
    reference = WhisperModel.from_pretrained(paths[1]).encoder.eval()(features).last_hidden_state
    frames, lengths = model.encode_audio(features, torch.tensor([3000]))
    assert lengths.tolist() == [1500]
    # the same float32 operations; the frames' own scale is about 1 to 10
    torch.testing.assert_close(frames, reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_language_model(model, paths):
    ids = torch.randint(100, 40_000, (2, 50), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(paths[0]).eval()(ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing_with_real_weights(model):
    features = [model.audio_tower.features(chirp(seconds)) for seconds in (3.0, 1.37)]
    batch = torch.nn.utils.rnn.pad_sequence([f.T for f in features], batch_first=True).transpose(1, 2)
    frames, lengths = model.encode_audio(batch, torch.tensor([300, 137]))
    alone, _ = model.encode_audio(features[1][None], torch.tensor([137]))
    # sums of different length run in another order; a leak of padding would be of order 1
    torch.testing.assert_close(frames[1, : lengths[1]], alone[0], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_audio_embeddings_begin_at_the_scale_of_words(model):
    processor = build_processor(CONFIG)
    batch = processor(audio=chirp(3.0))
    embeddings, lengths = model.project(*model.encode_audio(batch["audio_values"], batch["audio_lens"]))
    assert lengths.tolist() == [30]
    rms = float(embeddings.square().mean().sqrt())
    assert rms == pytest.approx(model.embedding_rms(), rel=0.1)
