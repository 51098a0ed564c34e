"""The audio encoder that a configuration asks for: which kind, whether two of them, and how they are run."""

from functools import lru_cache
from typing import Any

import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    PretrainedConfig,
    WhisperModel,
)

from ultravox.audio.features import NormalizedWaveform, OtherFeatures, StackedFilterbank, feature_extractor_of
from ultravox.audio.lengths import MEL_CHAIN, Chain, least_samples
from ultravox.errors import ModelError
from ultravox.model.audio_encoder import (
    AudioEncoder,
    Wav2Vec2BertAudioEncoder,
    WaveformAudioEncoder,
    WhisperAudioEncoder,
    encoder_from_config,
)
from ultravox.model.configuration import ENCODERS, WAVEFORM_ENCODERS, UltravoxConfig
from ultravox.model.encoder_blocks import Blocks
from ultravox.model.joint_encoder import JointAudioEncoder
from ultravox.model.loading import load_config, load_pretrained
from ultravox.model.other_encoder import INPUTS, OtherAudioEncoder, encoder_of, fit
from ultravox.model.pretrained import quiet_loading, resolve_model


def load_audio_encoder(name: str, dtype: torch.dtype = torch.float32) -> AudioEncoder:
    """An encoder with its weights, from a bundled name, a folder or a hub id.

    Raises:
        ModelError: not found, no audio encoder, or one whose frames cannot be counted beforehand.
    """
    path = resolve_model(name)
    config = load_config(path, name)
    if config.model_type not in ENCODERS:
        return _other(config, path, name, dtype)
    if config.model_type != "whisper":
        with torch.device("meta"):
            encoder = _wrapped(config, path)
        encoder.encoder = load_pretrained(AutoModel, path, name, dtype)
        encoder.encoder.config.apply_spec_augment = False
        return encoder
    source = load_pretrained(WhisperModel, path, name, dtype).encoder
    with torch.device("meta"):
        whisper = WhisperAudioEncoder(source.config)
    whisper.load_state_dict(source.state_dict(), assign=True)
    return whisper.eval()


def length_rule(name: str) -> tuple[Chain, int]:
    """From samples to frames of an encoder that may not be loaded yet, and the fewest samples that it takes."""
    path = resolve_model(name)
    config = load_config(path, name)
    if config.model_type not in ENCODERS:
        chain = _other_chain(path, name)
        return chain, least_samples(chain)
    if config.model_type == "whisper":
        return MEL_CHAIN, 1
    with torch.device("meta"):
        encoder = _wrapped(config, path)
    return encoder.chain, encoder.min_samples


def tower_from_config(config: UltravoxConfig) -> AudioEncoder:
    """The encoder of a checkpoint, without weights yet, or both that stand side by side."""
    settings = config.audio_features or [{}]
    first = _with_settings(config.audio_config, settings[0])
    if config.second_audio_config is None:
        return first
    return JointAudioEncoder(first, _with_settings(config.second_audio_config, settings[1]))


def settings_of(encoder: AudioEncoder) -> dict[str, Any]:
    """What an encoder's own configuration does not say of its features, as a checkpoint keeps it."""
    extractor = encoder.feature_extractor
    if isinstance(encoder, OtherAudioEncoder):
        return {"chain": [list(step) for step in encoder.chain]}
    if isinstance(extractor, NormalizedWaveform):
        return {"normalize": extractor.normalize}
    if isinstance(extractor, StackedFilterbank):
        return {"num_mel_bins": extractor.num_mel_bins, "stride": extractor.stride}
    return {}


def run_as(tower: AudioEncoder, config: UltravoxConfig) -> None:
    """Let an encoder run as a configuration says: on padded audio, in blocks, with all its layers given out.

    Raises:
        ModelError: an encoder that cannot.
    """
    if config.audio_padding == "padded":
        whispers = [part for part in tower.parts if isinstance(part, WhisperAudioEncoder)]
        if not whispers:
            raise ModelError(
                f"audio_padding: padded is for Whisper, which was trained on 30 s; {tower.config.model_type} was not: "
                "leave it at true_length"
            )
        for whisper in whispers:
            whisper.pad_audio()
    if config.audio_layer_mix:
        layers = getattr(tower.config, "encoder_layers", None) or tower.config.num_hidden_layers
        tower.mix_layers(tower.hidden_size, layers)
    if config.audio_blocks is not None:
        for part in tower.parts:
            if not part.steps_per_frame:
                raise ModelError(
                    f"encoder_window_seconds: nothing is known of how {part.config.model_type} makes frames of audio, "
                    "so it cannot run in blocks: leave it out, or choose another audio_encoder"
                )
            part.blocks = Blocks(*config.audio_blocks)
            part.feature_extractor.raw = True


def _other(config: PretrainedConfig, path: str, name: str, dtype: torch.dtype) -> AudioEncoder:
    """An encoder of a kind that is not known here, if trying it shows how to count its frames."""
    chain = _other_chain(path, name)
    extractor = _extractor(path, name, config)
    if isinstance(extractor, OtherFeatures):
        extractor.steps = (chain[0][0], chain[0][1])
    with torch.device("meta"):
        encoder = OtherAudioEncoder(config, chain, extractor)
    encoder.encoder = encoder_of(load_pretrained(AutoModel, path, name, dtype))
    return encoder.eval()


@lru_cache(maxsize=8)
def _other_chain(path: str, name: str) -> Chain:
    """How many frames a model of an unknown kind makes: of random weights, which change no length."""
    config = load_config(path, name)
    extractor = _extractor(path, name, config)
    try:
        with quiet_loading():
            encoder = encoder_of(AutoModel.from_config(config)).eval()
    except ValueError as error:
        raise _no_encoder(name, config) from error
    if getattr(encoder, "main_input_name", "input_ids") not in INPUTS:
        raise _no_encoder(name, config)
    return fit(encoder, extractor, name)


def _extractor(path: str, name: str, config: PretrainedConfig) -> OtherFeatures | NormalizedWaveform:
    """The features of a model of an unknown kind: ours for waveforms, its own for anything else."""
    try:
        processor = AutoFeatureExtractor.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise _no_encoder(name, config) from error
    found = feature_extractor_of(processor)
    return found if isinstance(found, NormalizedWaveform) else OtherFeatures(processor)


def _no_encoder(name: str, config: PretrainedConfig) -> ModelError:
    return ModelError(
        f"audio_encoder: {name!r} is a {config.model_type!r} model; expected one of {', '.join(ENCODERS)}, "
        "such as 'whisper-tiny.en', or another one that reads sound and has a feature extractor beside it"
    )


def _with_settings(config: PretrainedConfig, settings: dict[str, Any]) -> AudioEncoder:
    if "chain" in settings:
        return OtherAudioEncoder(config, settings["chain"])
    if config.model_type == "wav2vec2-bert" and settings:
        return Wav2Vec2BertAudioEncoder(config, StackedFilterbank(settings["num_mel_bins"], settings["stride"]))
    if config.model_type in WAVEFORM_ENCODERS and settings:
        return WaveformAudioEncoder(config, normalize=settings["normalize"])
    return encoder_from_config(config)


def _wrapped(config: PretrainedConfig, path: str) -> WaveformAudioEncoder | Wav2Vec2BertAudioEncoder:
    """An encoder that is not Whisper, with the features that its folder asks for, and weights still to come."""
    if config.model_type != "wav2vec2-bert":
        return WaveformAudioEncoder(config, normalize=_normalizes(path))
    try:
        features = feature_extractor_of(AutoFeatureExtractor.from_pretrained(path))
    except OSError:  # no preprocessor_config.json: transformers' own defaults
        features = StackedFilterbank()
    if not isinstance(features, StackedFilterbank):
        raise ModelError(f"{path} is a W2v-BERT 2.0 with a feature extractor of another kind; take both from one model")
    return Wav2Vec2BertAudioEncoder(config, features)


def _normalizes(path: str) -> bool:
    """Whether an encoder wants waveforms of mean 0 and variance 1; where nothing says so, transformers' default."""
    try:
        return bool(AutoFeatureExtractor.from_pretrained(path).do_normalize)
    except OSError:  # no preprocessor_config.json; a hub that is out of reach is noticed with the weights, just after
        return True
