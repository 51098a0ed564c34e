"""How an encoder is run: on padded audio, in blocks, with a mix of its layers, beside another one, of any kind."""

import numpy as np
import pytest
import torch
from tests.model.test_encoder_kinds import KINDS, folders  # noqa: F401 - a fixture
from transformers import (
    AutoModel,
    SEWConfig,
    Speech2TextConfig,
    Speech2TextFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperModel,
)

from ultravox.audio.step_fit import fit_steps
from ultravox.config.model import ModelConfig
from ultravox.errors import ModelError
from ultravox.model.audio_tower import load_audio_encoder, run_as
from ultravox.model.configuration import UltravoxConfig
from ultravox.model.encoder_blocks import Blocks
from ultravox.model.factory import build_model, build_processor, load_model, save_model
from ultravox.training.features import Features

SPEECH_2_TEXT = Speech2TextConfig(
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=32,
    vocab_size=30,
    conv_channels=16,
)
SEW = SEWConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    squeeze_factor=2,
    conv_dim=(16,) * 7,
    conv_kernel=(10, 3, 3, 3, 3, 2, 2),
    conv_stride=(5, 2, 2, 2, 2, 2, 2),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    layerdrop=0.0,
    apply_spec_augment=False,
)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folders of two encoders that this package has no class for."""
    root = tmp_path_factory.mktemp("others")
    for name, config, extractor in (
        ("sew", SEW, Wav2Vec2FeatureExtractor()),
        ("speech_to_text", SPEECH_2_TEXT, Speech2TextFeatureExtractor()),
    ):
        torch.manual_seed(2)
        AutoModel.from_config(config).save_pretrained(root / name)
        extractor.save_pretrained(root / name)
    return root


def frames_of(encoder, *waveforms):
    """Their frames, encoded in one batch."""
    features = [encoder.features(waveform) for waveform in waveforms]
    lengths = torch.tensor([feature.shape[-1] for feature in features])
    padded = torch.nn.utils.rnn.pad_sequence([feature.T for feature in features], batch_first=True).transpose(1, 2)
    with torch.no_grad():
        frames, counts = encoder(padded, lengths)
    assert counts.tolist() == [encoder.output_length(len(waveform)) for waveform in waveforms]
    return [row[:count] for row, count in zip(frames, counts.tolist(), strict=True)]


def in_form(encoder, **settings):
    """The encoder as it runs under these settings of a checkpoint."""
    run_as(encoder, UltravoxConfig(encoder.config, **settings))
    return encoder.eval()


# Padded Whisper


def test_padded_whisper_equals_hugging_face_on_30_seconds(tiny_models, make_waveform):
    """`WhisperFeatureExtractor` as it comes, and `WhisperModel`'s encoder on its 3000 frames."""
    extractor = WhisperFeatureExtractor.from_pretrained(tiny_models.whisper)
    reference = WhisperModel.from_pretrained(tiny_models.whisper).eval().encoder
    encoder = in_form(load_audio_encoder(str(tiny_models.whisper)), audio_padding="padded")
    waveforms = [make_waveform(seconds, 1) for seconds in (1.234, 0.5, 0.005)]
    for waveform, frames in zip(waveforms, frames_of(encoder, *waveforms), strict=True):
        inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features
        assert inputs.shape[-1] == 3000
        torch.testing.assert_close(encoder.features(waveform), inputs[0, :, : encoder.features(waveform).shape[1]])
        with torch.no_grad():
            expected = reference(inputs).last_hidden_state[0, : len(frames)]
        torch.testing.assert_close(frames, expected, atol=1e-4, rtol=1e-4)


def test_padded_whisper_takes_a_whole_window(tiny_models, make_waveform):
    encoder = in_form(load_audio_encoder(str(tiny_models.whisper)), audio_padding="padded")
    (frames,) = frames_of(encoder, make_waveform(30.0, 1))
    assert len(frames) == 1500


def test_only_whisper_can_be_padded(folders):  # noqa: F811
    with pytest.raises(ModelError, match=r"is for Whisper.*leave it at true_length"):
        in_form(load_audio_encoder(str(folders / "hubert")), audio_padding="padded")


# Blocks


@pytest.fixture(params=["whisper", "hubert", "wav2vec2", "wav2vec2-bert"])
def encoder(request, folders, tiny_models):  # noqa: F811
    name = tiny_models.whisper if request.param == "whisper" else folders / request.param
    return load_audio_encoder(str(name)).eval()


def test_one_block_with_all_of_a_clip_is_the_whole_clip(encoder, make_waveform):
    waveform = make_waveform(0.735, 3)  # an even number of filterbank frames
    (whole,) = frames_of(encoder, waveform)
    (frames,) = frames_of(in_form(encoder, audio_blocks=[1500, 0, 0]), waveform)
    torch.testing.assert_close(frames, whole, atol=2e-5, rtol=1e-4)


def test_what_comes_later_changes_nothing(encoder, make_waveform):
    """Nothing but the look-ahead, and 25 ms in which a frame's own window ends, is heard before its time."""
    in_form(encoder, audio_blocks=[20, 5, 10])
    waveform = make_waveform(1.5, 3)
    other = waveform.copy()
    heard = 320 * (40 + 5) + 400
    other[heard:] = 30 * make_waveform(1.5, 4)[heard:]  # loud: a norm over all of it would show
    (mine,), (theirs,) = frames_of(encoder, waveform), frames_of(encoder, other)
    assert torch.equal(mine[:40], theirs[:40])
    assert not torch.allclose(mine[40:60], theirs[40:60])


def test_a_block_is_its_own_stretch_of_audio_encoded_alone(tiny_models, make_waveform):
    """The middle block of a clip, against Whisper on that stretch of its spectrogram."""
    waveform = make_waveform(1.2, 5)
    encoder = load_audio_encoder(str(tiny_models.whisper)).eval()
    encoder.feature_extractor.raw = True
    raw = encoder.features(waveform)
    piece = encoder.feature_extractor.finish(raw[:, 2 * 10 : 2 * 55])
    with torch.no_grad():
        expected = encoder(piece[None], torch.tensor([piece.shape[1]]))[0][0, 10:30]
    (frames,) = frames_of(in_form(encoder, audio_blocks=[20, 15, 10]), waveform)
    torch.testing.assert_close(frames[20:40], expected, atol=1e-5, rtol=1e-4)


def test_blocks_do_not_depend_on_the_batch(encoder, make_waveform):
    in_form(encoder, audio_blocks=[20, 5, 10])
    waveforms = [make_waveform(seconds, 7) for seconds in (1.3, 0.4, 0.06)]
    for waveform, frames in zip(waveforms, frames_of(encoder, *waveforms), strict=True):
        torch.testing.assert_close(frames, frames_of(encoder, waveform)[0], atol=2e-5, rtol=1e-4)


def test_an_encoder_that_trains_in_blocks_has_gradients(tiny_models, make_waveform):
    encoder = in_form(load_audio_encoder(str(tiny_models.whisper)), audio_blocks=[20, 5, 10])
    features = encoder.features(make_waveform(1.0, 1))
    frames, _ = encoder(features[None], torch.tensor([features.shape[1]]))
    frames.square().sum().backward()
    assert float(encoder.conv1.weight.grad.abs().sum()) > 0


def test_cuts_cover_a_clip():
    cuts = Blocks(size=20, look_ahead=5, context=10).cuts(3, 47)
    assert [(cut.first, cut.count, cut.start, cut.end, cut.is_last) for cut in cuts] == [
        (0, 20, 0, 25, False),
        (20, 20, 10, 45, False),
        (40, 7, 30, 47, True),
    ]


# A mix of layers


@pytest.mark.parametrize("name", ["whisper", "hubert", "wav2vec2-bert"])
def test_mixed_layers_are_hugging_faces_hidden_states(name, folders, tiny_models, make_waveform):  # noqa: F811
    folder = tiny_models.whisper if name == "whisper" else folders / name
    waveform = make_waveform(0.735, 3)
    encoder = load_audio_encoder(str(folder)).eval()
    features = encoder.features(waveform)
    reference = AutoModel.from_pretrained(folder).eval()
    width = encoder.hidden_size
    (frames,) = frames_of(in_form(encoder, audio_layer_mix=True), waveform)
    if name == "whisper":  # theirs takes 30 s only, so its own layers are run one after the other
        own = reference.encoder
        with torch.no_grad():
            state = torch.nn.functional.gelu(own.conv2(torch.nn.functional.gelu(own.conv1(features[None]))))
            state = state.transpose(1, 2) + own.embed_positions.weight[: len(frames)]
            expected = [state]
            for layer in own.layers:
                state = layer(state, None)
                expected.append(state)
            expected[-1] = own.layer_norm(expected[-1])
    else:
        inputs = features if name == "hubert" else features.T[None]
        with torch.no_grad():
            expected = reference(inputs, output_hidden_states=True).hidden_states
    assert frames.shape[1] == len(expected) * width
    for layer, state in zip(frames.split(width, dim=1), expected, strict=True):
        normal = torch.nn.functional.layer_norm(state[0], (width,))
        torch.testing.assert_close(layer, normal, atol=1e-4, rtol=1e-4)


def test_the_mix_is_a_weighted_mean_that_learns(tiny_model_config):
    torch.manual_seed(0)
    model = build_model(tiny_model_config.model_copy(update={"audio_encoder_layer_mix": True}))
    num = model.audio_tower.num_mixed
    layers = torch.randn(2, 7, num, model.audio_tower.hidden_size // num)
    torch.testing.assert_close(model.layer_mix(layers.flatten(2)), layers.mean(2))
    with torch.no_grad():
        model.layer_mix.weight[1] = 50.0
    torch.testing.assert_close(model.layer_mix(layers.flatten(2)), layers[:, :, 1])
    with torch.no_grad():
        model.layer_mix.weight.zero_()
    embeddings, _ = model.project(layers.flatten(2), torch.tensor([7, 7]))
    embeddings.square().sum().backward()
    assert float(model.layer_mix.weight.grad.abs().sum()) > 0


# Two side by side, and other kinds


def test_two_encoders_side_by_side_are_each_itself(folders, tiny_model_config, make_waveform):  # noqa: F811
    waveforms = [make_waveform(0.735, 3), make_waveform(0.3, 4)]
    second = str(folders / "hubert")
    model = build_model(tiny_model_config.model_copy(update={"second_audio_encoder": second})).eval()
    first = load_audio_encoder(tiny_model_config.audio_encoder).eval()
    alone = frames_of(first, *waveforms), frames_of(load_audio_encoder(second).eval(), *waveforms)
    for both, mine, theirs in zip(frames_of(model.audio_tower, *waveforms), *alone, strict=True):
        assert len(both) == len(mine) == len(theirs) + 1  # none of Whisper's frames is lost
        torch.testing.assert_close(both[:, : first.hidden_size], mine, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(both[:-1, first.hidden_size :], theirs, atol=1e-5, rtol=1e-4)
        assert (both[-1, first.hidden_size :] == 0).all()


def test_encoders_of_other_rates_do_not_stand_side_by_side(others, tiny_model_config):
    with pytest.raises(ModelError, match="50 and 25 frames a second"):
        build_model(tiny_model_config.model_copy(update={"second_audio_encoder": str(others / "speech_to_text")}))


@pytest.mark.parametrize(("name", "rate"), [("sew", 50), ("speech_to_text", 25)])
def test_any_encoder_that_automodel_loads(name, rate, others, make_waveform):
    """Against Hugging Face's classes on one clip; in a batch, each clip is what it is alone."""
    waveforms = [make_waveform(seconds, 3) for seconds in (0.7, 1.9, 0.31)]
    encoder = load_audio_encoder(str(others / name)).eval()
    assert encoder.frames_per_second == rate
    reference = AutoModel.from_pretrained(others / name).eval()
    reference = reference.get_encoder() if name == "speech_to_text" else reference
    extractor = (Speech2TextFeatureExtractor if name == "speech_to_text" else Wav2Vec2FeatureExtractor).from_pretrained(
        others / name
    )
    for waveform, frames in zip(waveforms, frames_of(encoder, *waveforms), strict=True):
        inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt")
        inputs.pop("attention_mask", None)
        with torch.no_grad():
            expected = reference(**inputs).last_hidden_state[0]
        torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-4)


def test_an_encoder_of_another_kind_cannot_run_in_blocks(others):
    with pytest.raises(ModelError, match="it cannot run in blocks"):
        in_form(load_audio_encoder(str(others / "speech_to_text")), audio_blocks=[20, 0, 0])


def test_lengths_are_found_by_trying():
    assert fit_steps(lambda n: (n - 400) // 160 + 1, [1000, 5000, 16001], "it") == (-240, 160)
    assert fit_steps(lambda n: -(-n // 7), [10, 100], "it") == (6, 7)
    with pytest.raises(ModelError, match=r"it makes 3000 steps of 1000 and 3000 of 5000"):
        fit_steps(lambda n: 3000, [1000, 5000], "it")
    with pytest.raises(ModelError, match="cannot be counted beforehand"):
        fit_steps(lambda n: int(n**0.5), [100, 500, 4000], "it")


# In a model


def forms(folders, others):  # noqa: F811
    return {
        "padded": {"audio_padding": "padded"},
        "blocks": {
            "encoder_window_seconds": 0.5,
            "encoder_look_ahead_seconds": 0.1,
            "encoder_context_seconds": 0.2,
        },
        "waveform blocks": {"audio_encoder": str(folders / "wav2vec2"), "encoder_window_seconds": 0.5},
        "mix": {"audio_encoder_layer_mix": True},
        "joint": {"second_audio_encoder": str(folders / "wav2vec2-bert")},
        "joint in blocks": {"second_audio_encoder": str(folders / "hubert"), "encoder_window_seconds": 0.5},
        "sew": {"audio_encoder": str(others / "sew")},
        "speech_to_text": {"audio_encoder": str(others / "speech_to_text")},
    }


@pytest.mark.parametrize("name", list(forms(*[__import__("pathlib").Path()] * 2)))
def test_a_model_hears_so_and_is_saved(name, folders, others, tiny_model_config, make_waveform, tmp_path):  # noqa: F811
    """Processor, training and model count alike; the checkpoint gives the same numbers; the cache tells forms apart."""
    settings = ModelConfig.model_validate(tiny_model_config.model_dump() | forms(folders, others)[name])
    torch.manual_seed(0)
    model, processor = build_model(settings).eval(), build_processor(settings)
    waveforms = [make_waveform(seconds, 3) for seconds in (0.735, 1.9)]
    inputs = processor(text="<|audio|> and <|audio|>", audios=waveforms)
    with torch.no_grad():
        logits = model(**inputs).logits  # raises where placeholders and frames differ in number
    features = Features(model, "float32")
    for waveform in waveforms:
        frames = features.expected_frames(len(waveform))
        assert [len(clip) for clip in features.encode([waveform])] == frames
        assert processor.window_tokens(len(waveform)) == [-(-count // settings.stack_factor) for count in frames]
    plain = Features(build_model(tiny_model_config), "float32")
    assert features.cache.key.folder() != plain.cache.key.folder()

    save_model(model, processor, tmp_path)
    again, processor_again = load_model(tmp_path)
    inputs = processor_again(text="<|audio|> and <|audio|>", audios=waveforms)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, logits, atol=1e-5, rtol=1e-4)


def test_clips_over_30_seconds_in_blocks(tiny_model_config, make_waveform):
    settings = tiny_model_config.model_copy(update={"encoder_window_seconds": 1.0})
    model, processor = build_model(settings).eval(), build_processor(settings)
    inputs = processor(text="<|audio|>", audios=[make_waveform(31.3, 1)])
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)
    assert int(inputs["audio_token_len"].sum()) == int((inputs["input_ids"] == processor.audio_token_index).sum())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"encoder_look_ahead_seconds": 1.0}, "no effect without encoder_window_seconds"),
        ({"encoder_window_seconds": 1.0, "audio_padding": "padded"}, "drop one"),
        ({"encoder_window_seconds": 0.31}, "no whole number of positions of 0.1 s"),
        ({"encoder_window_seconds": 0.5, "stack_factor": 10}, "no whole number of positions of 0.2 s"),
        ({"audio_encoder_layer_mix": True, "second_audio_encoder": "whisper-base"}, "there are two; drop one"),
    ],
)
def test_forms_that_do_not_go_together_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        ModelConfig(**settings)


def test_features_of_blocks_are_those_of_whole_clips_but_for_the_last_step(folders, tiny_models, make_waveform):  # noqa: F811
    waveform = make_waveform(0.735, 9)
    for folder in (tiny_models.whisper, folders / "wav2vec2", folders / "wav2vec2-bert"):
        extractor = load_audio_encoder(str(folder)).feature_extractor
        whole = extractor(waveform)
        extractor.raw = True
        raw = extractor(waveform)
        assert not torch.allclose(raw, whole)
        torch.testing.assert_close(extractor.finish(raw), whole, atol=1e-6, rtol=1e-5)
        assert np.isfinite(raw.numpy()).all()


@pytest.mark.parametrize("name", list(KINDS))
def test_half_precision(name, folders, tiny_model_config, make_waveform):  # noqa: F811
    """Frames in bfloat16 point the way of those in float32."""
    settings = tiny_model_config.model_copy(update={"audio_encoder": str(folders / name), "dtype": "bfloat16"})
    model, processor = build_model(settings).eval(), build_processor(settings)
    waveform = make_waveform(0.735, 3)
    with torch.no_grad():
        assert torch.isfinite(model(**processor(text="<|audio|>", audios=[waveform])).logits).all()
    assert model.audio_tower.encoder.dtype == torch.bfloat16
    whole = load_audio_encoder(str(folders / name)).eval()
    (half,), (single,) = frames_of(model.audio_tower, waveform), frames_of(whole, waveform)
    assert float(torch.cosine_similarity(half.float(), single, dim=-1).min()) > 0.99


def test_a_known_encoder_with_features_of_another_is_refused(tiny_models, tiny_model_config, tmp_path):
    WhisperModel.from_pretrained(tiny_models.whisper).save_pretrained(tmp_path)
    Speech2TextFeatureExtractor().save_pretrained(tmp_path)
    settings = tiny_model_config.model_copy(update={"audio_encoder": str(tmp_path)})
    with pytest.raises(ModelError, match="makes none of its features: take both from one model"):
        build_processor(settings)
