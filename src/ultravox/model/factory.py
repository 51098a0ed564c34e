"""The one place that reads a model configuration and puts the parts together; and the way back from a folder."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)

from ultravox.audio.features import OtherFeatures, feature_extractor_of
from ultravox.config.model import ModelConfig
from ultravox.errors import CheckpointError, ConfigError, ModelError
from ultravox.model.adapters import add_lora, find_targets
from ultravox.model.audio_encoder import (
    AudioEncoder,
    WaveformAudioEncoder,
    WhisperAudioEncoder,
    encoder_from_config,
    keep_layers,
)
from ultravox.model.audio_tower import length_rule, load_audio_encoder, run_as, settings_of
from ultravox.model.boundaries import AUDIO_END_TOKEN, AUDIO_START_TOKEN, grow_table
from ultravox.model.configuration import ENCODERS, LAYERED_PROJECTORS, WAVEFORM_ENCODERS, UltravoxConfig
from ultravox.model.folder import find_model_folder
from ultravox.model.joint_encoder import JointAudioEncoder
from ultravox.model.kernels import use_fast_linears
from ultravox.model.loading import load_config, load_pretrained, unavailable
from ultravox.model.modeling import UltravoxModel
from ultravox.model.other_encoder import OtherAudioEncoder
from ultravox.model.pretrained import quiet_loading, resolve_model
from ultravox.model.processing import UltravoxProcessor, add_special_token
from ultravox.tokens import AUDIO_TOKEN

DEFAULT_PROJECTOR_LAYERS = 2
TEMPLATES = Path(__file__).parent / "templates"


def build_model(model: ModelConfig) -> UltravoxModel:
    """Pretrained towers, a fresh projector at the language model's embedding scale, adapters; the rest frozen.

    Raises:
        ModelError: a part that cannot be found, or is of the wrong kind.
    """
    dtype = getattr(torch, model.dtype)
    require_lora_targets(model)
    audio_tower = build_audio_tower(model, dtype)
    language_model = load_language_model(model.language_model, dtype)
    tokenizer = load_tokenizer(model.language_model, model.chat_template, boundaries=model.audio_boundaries)
    boundaries = None
    if model.audio_boundaries:
        boundaries = tokenizer.convert_tokens_to_ids([AUDIO_START_TOKEN, AUDIO_END_TOKEN])
        grow_table(language_model, max(boundaries) + 1, boundaries)
    config = UltravoxConfig(
        audio_tower.config,
        language_model.config,
        audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        audio_boundary_ids=boundaries,
        **tower_settings(model, audio_tower),
        **projector_settings(model),
    )
    for part in (config.audio_config, config.text_config, *filter(None, [config.second_audio_config])):
        part._name_or_path = ""  # a local folder's path would travel with the checkpoint
    built = UltravoxModel(config, audio_tower, language_model)
    for parameter in built.parameters():  # not the buffers: rotary frequencies in 16 bits would turn far tokens wrongly
        parameter.data = parameter.data.to(dtype)
    built.multi_modal_projector.init_scale(built.embedding_rms())
    built.choose_rows(None)
    built.generation_config.eos_token_id = end_token_ids(tokenizer, built)
    built.generation_config.pad_token_id = tokenizer.pad_token_id
    built.generation_config.suppress_tokens = boundaries

    freeze_and_adapt(built, model)
    return built


def freeze_and_adapt(built: UltravoxModel, model: ModelConfig) -> None:
    """Let the parts of a model train that its configuration says, and give it adapters."""
    built.language_model.requires_grad_(False)
    if (boundaries := getattr(built.config, "audio_boundary_ids", None)) is not None:
        built.train_boundaries(boundaries)
    built.audio_tower.requires_grad_(model.train_audio_encoder)
    for encoder in built.audio_tower.parts:
        if isinstance(encoder, WaveformAudioEncoder) and not model.train_feature_encoder:
            # not requires_grad_ alone: these convolutions would still ask for the gradient of the samples
            encoder.encoder.feature_extractor._freeze_parameters()
        if isinstance(encoder, WhisperAudioEncoder):
            encoder.embed_positions.requires_grad_(False)  # sinusoids, fixed in Whisper's training too
    for part, lora in (
        (built.language_model, model.language_model_lora),
        (built.audio_tower, model.audio_encoder_lora),
    ):
        add_lora(part, lora.rank, lora.effective_alpha, list(lora.target_modules))


def build_audio_tower(model: ModelConfig, dtype: torch.dtype) -> AudioEncoder:
    """The pretrained encoder, or both that stand side by side."""
    first = load_audio_encoder(model.audio_encoder, dtype)
    if model.audio_encoder_layers is not None:
        keep_layers(first, model.audio_encoder_layers)
    if model.second_audio_encoder is None:
        return first
    return JointAudioEncoder(first, load_audio_encoder(model.second_audio_encoder, dtype))


def tower_settings(model: ModelConfig, tower: AudioEncoder) -> dict[str, Any]:
    """How a model's configuration lets its encoder run, as arguments of `UltravoxConfig`."""
    blocks = None
    if model.encoder_window_seconds is not None:
        seconds = (model.encoder_window_seconds, model.encoder_look_ahead_seconds, model.encoder_context_seconds)
        blocks = [round(part * tower.frames_per_second) for part in seconds]
    second = tower.parts[1].config if len(tower.parts) > 1 else None
    needs_features = blocks is not None or second is not None or isinstance(tower, OtherAudioEncoder)
    return {
        "audio_padding": model.audio_padding,
        "audio_blocks": blocks,
        "audio_layer_mix": model.audio_encoder_layer_mix,
        "second_audio_config": second,
        "audio_features": [settings_of(part) for part in tower.parts] if needs_features else None,
    }


def require_lora_targets(model: ModelConfig) -> None:
    """Raise a ConfigError when adapters are asked for where there is no such layer: told by skeletons without weights.

    ModelError: a part that cannot be found.
    """
    for name, lora, build in (
        (model.language_model, model.language_model_lora, AutoModelForCausalLM.from_config),
        (model.audio_encoder, model.audio_encoder_lora, encoder_from_config),
    ):
        if lora.rank:
            config = load_config(resolve_model(name), name)
            try:
                with torch.device("meta"), quiet_loading():
                    skeleton = build(config)
            except (ModelError, ValueError):  # of another kind than it should be: told where it is loaded
                continue
            find_targets(skeleton, list(lora.target_modules))


def projector_settings(model: ModelConfig) -> dict[str, Any]:
    """What of a model's configuration decides its projector, as arguments of `UltravoxConfig`."""
    layers = model.num_projector_layers or DEFAULT_PROJECTOR_LAYERS
    return {
        "stack_factor": model.stack_factor,
        "hidden_size": model.projector_hidden_size,
        "projector_type": "swiglu" if model.projector == "swiglu_v0.4" else model.projector,
        "projector_ln_mid": model.projector != "swiglu_v0.4",
        "downsampling": model.downsampling,
        "num_projector_layers": layers if model.projector in LAYERED_PROJECTORS else 0,
        "num_projector_queries": model.num_projector_queries,
    }


def build_processor(model: ModelConfig) -> UltravoxProcessor:
    """The processor that belongs to `build_model(model)`."""
    name = resolve_model(model.audio_encoder)
    config = load_config(name, model.audio_encoder)
    try:
        audio_processor = AutoFeatureExtractor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise unavailable("feature extractor", model.audio_encoder, error) from error
    rules = []
    if model.second_audio_encoder is not None:
        rules = [length_rule(model.audio_encoder), length_rule(model.second_audio_encoder)]
        audio_processor = Wav2Vec2FeatureExtractor(do_normalize=False)  # each makes its own features of the samples
    elif config.model_type not in ENCODERS:
        rules = [length_rule(model.audio_encoder)]
    if not rules and isinstance(feature_extractor_of(audio_processor), OtherFeatures):
        raise ModelError(
            f"{model.audio_encoder!r} is a {config.model_type!r} encoder with a {type(audio_processor).__name__}, "
            "which makes none of its features: take both from one model"
        )
    return UltravoxProcessor(
        audio_processor,
        load_tokenizer(model.language_model, model.chat_template, boundaries=model.audio_boundaries),
        audio_boundaries=model.audio_boundaries,
        stack_factor=model.stack_factor,
        convolution_layers=None if rules else _convolution_layers(config),
        length_chains=[chain for chain, _ in rules] or None,
        min_samples=max((least for _, least in rules), default=None),
        audio_padding="true_length" if rules else model.audio_padding,
        raw_features=model.encoder_window_seconds is not None and not rules,
    )


def load_language_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with its weights, from a bundled name, a folder or a hub id.

    Raises:
        ModelError: not found, or no causal language model.
    """
    path = resolve_model(name)
    config = load_config(path, name)
    # Whisper's decoder alone is a causal LM to transformers, but nobody who names it here wants that
    wrong = config.model_type in ENCODERS or config.model_type == UltravoxConfig.model_type or config.is_encoder_decoder
    if wrong or type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"language_model: {name!r} is a {config.model_type!r} model; expected a causal language model, "
            "such as 'smollm2-135m-instruct'"
        )
    return load_pretrained(AutoModelForCausalLM, path, name, dtype).eval()


def load_tokenizer(name: str, chat_template: str = "model", *, boundaries: bool = False) -> Any:
    """The language model's tokenizer with ``<|audio|>``, the tokens around it if wanted, and the chosen chat template.

    Raises:
        ModelError: no tokenizer there; ConfigError: no such template, or the model has none of its own.
    """
    path = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise unavailable("tokenizer", name, error) from error
    add_special_token(tokenizer, AUDIO_TOKEN)
    for token in (AUDIO_START_TOKEN, AUDIO_END_TOKEN) if boundaries else ():
        add_special_token(tokenizer, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if chat_template != "model":
        tokenizer.chat_template = _read_template(chat_template)
    elif not tokenizer.chat_template:
        raise ConfigError(f"{name} has no chat template of its own: set model.chat_template to chatml.jinja or a file")
    return tokenizer


def end_token_ids(tokenizer: Any, model: UltravoxModel) -> list[int]:
    """Every token that ends an answer: the model's own, the tokenizer's, and the one that the template writes."""
    own = model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if whole.startswith(prompt):
        answer = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
        ids |= set([token for token in answer if token in tokenizer.all_special_ids][:1])
    return sorted(ids - {None})


def load_model(checkpoint: str | Path) -> tuple[UltravoxModel, UltravoxProcessor]:
    """Model (in evaluation mode) and processor of a run folder, its ``model/`` or any saved model folder.

    Raises:
        CheckpointError: missing or damaged; ModelError: a base model that it builds on is not to be had.
    """
    folder = find_model_folder(checkpoint)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged ({error}): copy the checkpoint again") from error
    if model_type != UltravoxConfig.model_type:
        raise CheckpointError(f"{folder} holds a {model_type!r} model: expected an 'ultravox' model")
    try:
        with quiet_loading():
            model, info = UltravoxModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
            processor = UltravoxProcessor.from_pretrained(folder)
    except (CheckpointError, ModelError):
        raise
    except Exception as error:  # safetensors, tokenizers and transformers each have errors of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder} is damaged or incomplete ({reason}): copy the checkpoint again") from error
    missing = _load_base_models(model, set(info["missing_keys"]))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights, such as {min(missing)}: copy it again")
    if processor.audio_token_index != model.config.audio_token_index:
        raise CheckpointError(
            f"{folder}: <|audio|> is token {processor.audio_token_index} to the tokenizer and "
            f"{model.config.audio_token_index} to the model; take both from one save"
        )
    use_fast_linears(model)
    return model.eval(), processor


def save_model(
    model: UltravoxModel, processor: UltravoxProcessor, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write both into `folder` in the public form; wrap it in `atomic_folder` to have it whole or not at all.

    `state` holds all of a model of which this process has a part.
    """
    with quiet_loading():
        model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


def _load_base_models(model: UltravoxModel, missing: set[str]) -> set[str]:
    """Fill the towers that the checkpoint only names; returns the weights that are still missing."""
    dtype = model.dtype
    for prefix, name, load in (
        ("audio_tower.", model.config.audio_model_id, load_audio_encoder),
        ("language_model.", model.config.text_model_id, load_language_model),
    ):
        if name is None or not any(key.startswith(prefix) for key in missing):
            continue
        try:
            part = load(name, dtype)
        except ModelError as error:
            raise ModelError(f"the checkpoint builds on {name!r}, which is not to be had: {error}") from error
        if prefix == "audio_tower.":
            run_as(part, model.config)
        setattr(model, prefix[:-1], part)
        missing = {key for key in missing if not key.startswith(prefix)}
    return missing


def _read_template(name: str) -> str:
    for path in (Path(name).expanduser(), TEMPLATES / Path(name).name, TEMPLATES / f"{name}.jinja"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    shipped = ", ".join(sorted(path.name for path in TEMPLATES.glob("*.jinja")))
    raise ConfigError(f"model.chat_template: no file {name!r}; expected 'model', a Jinja file or one of {shipped}")


def _convolution_layers(config: PretrainedConfig) -> list[list[int]] | None:
    if config.model_type not in WAVEFORM_ENCODERS:
        return None
    return [list(layer) for layer in zip(config.conv_kernel, config.conv_stride, strict=True)]
