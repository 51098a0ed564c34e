"""Encoders on true lengths: padding changes nothing, Whisper is Whisper, HuBERT fits the same interface."""

import numpy as np
import pytest
import torch
from transformers import HubertConfig, WhisperConfig, WhisperModel

from ultravox.errors import AudioError, ModelError
from ultravox.model.audio_encoder import WaveformAudioEncoder, WhisperAudioEncoder, encoder_from_config
from ultravox.model.audio_tower import load_audio_encoder


def pad(features):
    lengths = torch.tensor([feature.shape[-1] for feature in features])
    padded = torch.full((len(features), features[0].shape[0], int(lengths.max())), 7.0)  # garbage, to be ignored
    for row, feature in zip(padded, features, strict=True):
        row[:, : feature.shape[-1]] = feature
    return padded, lengths


def assert_padding_is_inert(encoder, waveforms):
    features = [encoder.features(waveform) for waveform in waveforms]
    with torch.no_grad():
        frames, lengths = encoder(*pad(features))
        assert lengths.tolist() == [encoder.output_length(len(waveform)) for waveform in waveforms]
        for row, (feature, length) in enumerate(zip(features, lengths.tolist(), strict=True)):
            alone, alone_length = encoder(feature[None], torch.tensor([feature.shape[-1]]))
            assert alone_length.tolist() == [length]
            # the kernels sum in another order at another size; a leak from the padding would be of order 1
            torch.testing.assert_close(frames[row, :length], alone[0], atol=2e-5, rtol=1e-4)
            assert (frames[row, length:] == 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whisper_padded_equals_unpadded(tiny_models, make_waveform, attention):
    encoder = load_audio_encoder(str(tiny_models.whisper)).eval()
    encoder.config._attn_implementation = attention
    # odd numbers of mel frames are where a convolution could look past the end
    assert_padding_is_inert(encoder, [make_waveform(seconds, 1) for seconds in (1.0, 0.51, 0.013, 0.77)])


def test_whisper_equals_hugging_face_on_thirty_seconds(tiny_models, make_waveform):
    reference = WhisperModel.from_pretrained(tiny_models.whisper).encoder.eval()
    encoder = load_audio_encoder(str(tiny_models.whisper))
    assert isinstance(encoder, WhisperAudioEncoder)
    assert encoder.state_dict().keys() == reference.state_dict().keys()
    features = encoder.features(make_waveform(30.0))[None]
    with torch.no_grad():
        expected = reference(features).last_hidden_state
        frames, lengths = encoder(features, torch.tensor([3000]))
    assert lengths.tolist() == [1500]
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)  # float32, the same operations


def test_no_mask_is_built_without_padding(tiny_models, make_waveform):
    encoder = load_audio_encoder(str(tiny_models.whisper))
    masks = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda module, args: masks.append(args[1]))
    features = encoder.features(make_waveform(0.5))
    encoder(torch.stack([features, features]), torch.tensor([50, 50]))
    assert masks == [None, None]
    encoder(torch.stack([features, features]), torch.tensor([50, 30]))
    assert masks[2].shape == (2, 1, 1, 25)  # never [clip, head, frame, frame]


def test_too_long_window_is_refused(tiny_models):
    encoder = load_audio_encoder(str(tiny_models.whisper))
    with pytest.raises(AudioError, match="at most 3000 mel frames"):
        encoder(torch.zeros(1, 80, 3001), torch.tensor([3001]))


def hubert(norm: str) -> WaveformAudioEncoder:
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
    )
    return encoder_from_config(config).eval()


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_hubert_padded_equals_unpadded(norm, make_waveform):
    encoder = hubert(norm)
    assert isinstance(encoder, WaveformAudioEncoder)
    assert encoder.frames_per_second == 50
    assert_padding_is_inert(encoder, [make_waveform(seconds, 1) for seconds in (1.0, 0.5, 0.1)])


def test_hubert_trains_on_short_clips(make_waveform):
    """Hugging Face's own masking would refuse clips shorter than its masks."""
    encoder = hubert("layer").train()
    features = encoder.features(make_waveform(0.1))[None]
    frames, _ = encoder(features, torch.tensor([1600]))
    frames.square().mean().backward()
    assert any(parameter.grad is not None for parameter in encoder.parameters())


def test_too_short_for_the_convolutions():
    with pytest.raises(AudioError, match="too few"):
        hubert("group")(torch.zeros(1, 1, 100), torch.tensor([100]))


def test_wrong_kind(tiny_models):
    from transformers import LlamaConfig

    with pytest.raises(ModelError, match="expected whisper"):
        encoder_from_config(LlamaConfig())
    with pytest.raises(ModelError, match=r"audio_encoder: .*'llama'"):
        load_audio_encoder(str(tiny_models.llama))


def test_shapes_are_checked(tiny_models):
    """The import hook of conftest.py is at work."""
    encoder = encoder_from_config(WhisperConfig.from_pretrained(tiny_models.whisper))
    with pytest.raises(Exception, match=r"[Tt]ype"):
        encoder(torch.zeros(80, 100), torch.tensor([100]))
    assert np.isfinite(encoder.features(np.zeros(1000, dtype=np.float32)).numpy()).all()
