"""Every kind of encoder, tiny and random: Hugging Face's class on one clip, inert padding, a checkpoint, a training."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    Data2VecAudioConfig,
    HubertConfig,
    SeamlessM4TFeatureExtractor,
    UniSpeechConfig,
    UniSpeechSatConfig,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

from ultravox.config.model import ModelConfig
from ultravox.errors import AudioError, ModelError
from ultravox.model.audio_encoder import WhisperAudioEncoder, keep_layers
from ultravox.model.audio_tower import load_audio_encoder
from ultravox.model.configuration import ENCODERS
from ultravox.model.factory import build_model, build_processor, load_model, save_model

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "layerdrop": 0.0,
}
WAVEFORM = {**COMMON, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
KINDS = {
    "data2vec-audio": Data2VecAudioConfig(**{**WAVEFORM, "num_conv_pos_embeddings": 2}, conv_pos_kernel_size=5),
    "hubert": HubertConfig(**WAVEFORM),
    "unispeech": UniSpeechConfig(**WAVEFORM, **LAYER, num_codevectors_per_group=4, codevector_dim=8),
    "unispeech-sat": UniSpeechSatConfig(**WAVEFORM, num_codevectors_per_group=4, codevector_dim=8),
    "wav2vec2": Wav2Vec2Config(**WAVEFORM, **LAYER, num_codevectors_per_group=4, codevector_dim=8),
    "wav2vec2-conformer": Wav2Vec2ConformerConfig(**WAVEFORM, **LAYER, conv_depthwise_kernel_size=5),
    "wav2vec2-bert": Wav2Vec2BertConfig(**COMMON, feature_projection_input_dim=160, conv_depthwise_kernel_size=5),
    "wavlm": WavLMConfig(**WAVEFORM, **LAYER, num_buckets=16, max_bucket_distance=40),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, as Hugging Face writes it, always the same weights."""
    root = tmp_path_factory.mktemp("encoders")
    for name, config in KINDS.items():
        torch.manual_seed(1)
        AutoModel.from_config(config).save_pretrained(root / name)
        extractor = SeamlessM4TFeatureExtractor() if name == "wav2vec2-bert" else Wav2Vec2FeatureExtractor()
        extractor.save_pretrained(root / name)
    return root


def test_all_kinds_are_tried():
    assert set(KINDS) | {"whisper"} == set(ENCODERS)


@pytest.mark.parametrize("name", KINDS)
def test_one_clip_equals_hugging_face(name, folders, make_waveform):
    """Their feature extractor and their class, of the same folder; the number of filterbank frames is even."""
    waveform = make_waveform(0.735, 3)
    reference = AutoModel.from_pretrained(folders / name).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folders / name)
    inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt")
    inputs.pop("attention_mask", None)
    encoder = load_audio_encoder(str(folders / name)).eval()
    features = encoder.features(waveform)
    with torch.no_grad():
        expected = reference(**inputs).last_hidden_state
        frames, lengths = encoder(features[None], torch.tensor([features.shape[-1]]))
    assert lengths.tolist() == [expected.shape[1]] == [encoder.output_length(len(waveform))]
    torch.testing.assert_close(frames, expected, atol=2e-4, rtol=1e-4)
    assert encoder.frames_per_second == 50


@pytest.mark.parametrize("name", KINDS)
def test_padding_is_inert(name, folders, make_waveform):
    encoder = load_audio_encoder(str(folders / name)).eval()
    features = [encoder.features(make_waveform(seconds, 1)) for seconds in (1.0, 0.51, 0.1, 0.77)]
    lengths = torch.tensor([feature.shape[-1] for feature in features])
    padded = torch.full((4, features[0].shape[0], int(lengths.max())), 7.0)  # garbage, to be ignored
    for row, feature in zip(padded, features, strict=True):
        row[:, : feature.shape[-1]] = feature
    with torch.no_grad():
        frames, frame_lengths = encoder(padded, lengths)
        for row, feature, length in zip(frames, features, frame_lengths.tolist(), strict=True):
            alone, _ = encoder(feature[None], torch.tensor([feature.shape[-1]]))
            torch.testing.assert_close(row[:length], alone[0], atol=2e-5, rtol=1e-4)
            assert (row[length:] == 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_model_with_it_hears_trains_and_is_saved(name, folders, tiny_models, make_waveform, tmp_path):
    config = ModelConfig(
        language_model=str(tiny_models.llama),
        audio_encoder=str(folders / name),
        chat_template="chatml.jinja",
        stack_factor=3,
        projector_hidden_size=32,
        train_audio_encoder=True,
        train_feature_encoder=True,
        audio_encoder_layers=2,
    )
    model, processor = build_model(config), build_processor(config)
    waveforms = [make_waveform(1.0, 1), make_waveform(0.4, 2)]
    batch = processor(text=["<|audio|> a", "b <|audio|>"], audio=waveforms)
    assert batch["audio_token_len"].tolist() == [
        -(-model.audio_tower.output_length(len(waveform)) // 3) for waveform in waveforms
    ]
    model.train()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == processor.audio_token_index, -100)
    model(**batch, labels=labels).loss.backward()
    # the class makes, and never reads, an embedding for masked frames and (Conformer) positions of another kind
    unread = ["masked_spec_embed", "pos_conv_embed"] if name == "wav2vec2-conformer" else ["masked_spec_embed"]
    missing = [n for n, p in model.audio_tower.named_parameters() if p.grad is None]
    assert not [parameter for parameter in missing if not any(word in parameter for word in unread)]
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
    save_model(model, processor, tmp_path / "model")
    again, processor_again = load_model(tmp_path / "model")
    with torch.no_grad():
        found = again(**processor_again(text=["<|audio|> a", "b <|audio|>"], audio=waveforms)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    saved = json.loads((tmp_path / "model" / "config.json").read_text())["audio_config"]
    assert (saved["model_type"], saved["num_hidden_layers"]) == (name, 2)


def test_the_first_layers_are_kept(folders, tiny_models, make_waveform):
    """As Hugging Face's hidden state after that layer, where no norm follows the last one."""
    waveform = make_waveform(0.5, 1)
    reference = AutoModel.from_pretrained(folders / "hubert").eval()
    encoder = load_audio_encoder(str(folders / "hubert")).eval()
    features = encoder.features(waveform)
    keep_layers(encoder, 2)
    with torch.no_grad():
        expected = reference(features, output_hidden_states=True).hidden_states[2]
        frames, _ = encoder(features[None], torch.tensor([features.shape[-1]]))
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-4)
    whisper = load_audio_encoder(str(tiny_models.whisper))
    assert isinstance(whisper, WhisperAudioEncoder)
    keep_layers(whisper, 1)
    assert (len(whisper.layers), whisper.config.encoder_layers) == (1, 1)
    with pytest.raises(ModelError, match="has 2 layers, so 5 cannot be kept"):
        keep_layers(encoder, 5)


def test_an_odd_number_of_filterbank_frames_keeps_the_tail(folders, make_waveform):
    encoder = load_audio_encoder(str(folders / "wav2vec2-bert"))
    waveform = make_waveform(0.7375, 1)  # 11,800 samples: 72 frames; with a hop more, 73
    theirs = transformers.AutoFeatureExtractor.from_pretrained(folders / "wav2vec2-bert")
    longer = np.concatenate([waveform, waveform[:160]])
    for samples, frames in ((waveform, 72), (longer, 73)):
        features = encoder.features(samples)
        assert features.shape == (160, -(-frames // 2))
        expected = theirs(samples, sampling_rate=16000, return_tensors="pt")["input_features"][0].T
        torch.testing.assert_close(features, expected, atol=2e-3, rtol=1e-3)
        assert encoder.feature_extractor.length(len(samples)) == features.shape[-1]
    assert (encoder.features(longer)[80:, -1] == 0).all()


def test_too_short_for_a_variance(folders):
    encoder = load_audio_encoder(str(folders / "wav2vec2-bert"))
    assert encoder.min_samples == 560
    assert torch.isfinite(encoder.features(np.random.default_rng(0).standard_normal(560).astype(np.float32))).all()
    with pytest.raises(AudioError, match="559 samples are too few for this encoder, which wants 560"):
        encoder.features(np.zeros(559, dtype=np.float32))


def test_parts_that_do_not_fit(folders, tmp_path):
    config = KINDS["wav2vec2-bert"]
    folder = tmp_path / "adapter"
    AutoModel.from_config(type(config)(**{**config.to_dict(), "add_adapter": True})).save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
    with pytest.raises(ModelError, match="adapter shortens its frames"):
        load_audio_encoder(str(folder))
    folder = tmp_path / "bins"
    AutoModel.from_config(config).save_pretrained(folder)
    SeamlessM4TFeatureExtractor(feature_size=40, num_mel_bins=40).save_pretrained(folder)
    with pytest.raises(ModelError, match="reads 160 channels, its feature extractor gives 40 × 2"):
        load_audio_encoder(str(folder))
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    with pytest.raises(ModelError, match="a feature extractor of another kind"):
        load_audio_encoder(str(folder))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"wav2vec2-bert"}))
@pytest.mark.parametrize("trains", [False, True])
def test_the_convolutions_over_the_samples_train_only_when_asked(kind, trains, folders, tiny_models):
    config = ModelConfig(
        language_model=str(tiny_models.llama),
        chat_template="chatml.jinja",
        audio_encoder=str(folders / kind),
        train_audio_encoder=True,
        train_feature_encoder=trains,
    )
    tower = build_model(config).audio_tower.train()
    samples = torch.randn(1, 1, 4000, generator=torch.Generator().manual_seed(0))
    frames, _ = tower(samples, torch.tensor([4000]))
    frames.square().sum().backward()

    convolutions = dict(tower.encoder.feature_extractor.named_parameters())
    assert convolutions
    assert all(parameter.requires_grad == trains for parameter in convolutions.values())
    assert any(parameter.grad is not None for parameter in convolutions.values()) == trains
    others = [p for name, p in tower.encoder.named_parameters() if not name.startswith("feature_extractor.")]
    assert all(parameter.requires_grad for parameter in others)
    assert any(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in others)


def test_training_only_the_convolutions_is_refused():
    with pytest.raises(ValueError, match="no effect without train_audio_encoder"):
        ModelConfig(train_feature_encoder=True)
