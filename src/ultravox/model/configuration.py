"""The public ``ultravox`` configuration, which vLLM, llama.cpp's converter and transformers.js read too."""

from typing import Any, cast

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ultravox.errors import ModelError
from ultravox.model.downsample import DOWNSAMPLINGS, Downsampling

#: Encoders that hear the waveform itself, through convolutions without padding
WAVEFORM_ENCODERS = (
    "data2vec-audio",
    "hubert",
    "unispeech",
    "unispeech-sat",
    "wav2vec2",
    "wav2vec2-conformer",
    "wavlm",
)
ENCODERS = ("whisper", *WAVEFORM_ENCODERS, "wav2vec2-bert")
CTC_PROJECTORS = ("ctc_weighted", "ctc_compressed")
PROJECTORS = ("swiglu", "linear", "mlp", "conv", "transformer", "qformer", *CTC_PROJECTORS)
LAYERED_PROJECTORS = ("transformer", "qformer")
#: What only this package reads, and what it is in the public format, where it is not written.
OWN_KEYS: dict[str, Any] = {
    "projector_type": "swiglu",
    "downsampling": "stack",
    "num_projector_queries": 1,
    "num_projector_rows": None,
    "audio_padding": "true_length",
    "audio_blocks": None,
    "audio_layer_mix": False,
    "second_audio_config": None,
    "audio_features": None,
}
AUDIO_PADDINGS = ("true_length", "padded")


def _sub_config(config: PretrainedConfig | dict[str, Any] | None, default: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    values = dict(config or {})
    return CONFIG_MAPPING[values.pop("model_type", default)](**values)


class UltravoxConfig(PretrainedConfig):
    """An audio encoder, a projector and a causal language model.

    Args:
        audio_config: the encoder's configuration (Whisper, HuBERT, wav2vec 2.0, W2v-BERT 2.0 …), or its dictionary.
        text_config: the language model's configuration, or its dictionary.
        audio_model_id: where the encoder's weights are; None = in this checkpoint.
        text_model_id: where the language model's weights are; None = in this checkpoint.
        audio_token_index: id of ``<|audio|>``; None = one past the embedding rows.
        stack_factor: encoder frames joined into one language model position.
        hidden_size: width inside the projector, before SwiGLU halves it.
        projector_act: "swiglu", the only one here; kinds other than "swiglu" do not look at it.
        projector_ln_mid: norm before the second layer (v0.5 and later); False = after it.
        projector_init_value: first weight of the projector's norms.
        audio_boundary_ids: of the tokens before and after each clip; None = there are none.
        num_projector_layers: of the kinds with layers, "transformer" (v0.7) and "qformer".
        projector_type: one of `PROJECTORS`; None = "transformer" where there are projector layers, else "swiglu".
        downsampling: "stack", "stride", "mean" or "random": how the frames of a position become one.
        num_projector_queries: of each window of "qformer".
        num_projector_rows: of the language model's table that "ctc_weighted" and "ctc_compressed" score; None = all.
        audio_padding: "true_length", or "padded": the encoder (Whisper) hears silence behind each clip, up to 30 s.
        audio_blocks: frames of a block, of its look-ahead and of the context before it; None = clips run whole.
        audio_layer_mix: a learned mix of all the encoder's layers instead of the last one.
        second_audio_config: of an encoder whose frames stand beside the first one's; None = there is none.
        audio_features: of each encoder, what its own configuration does not say of its features.

    Raises:
        ModelError: a projector or a downsampling that this version does not know.
    """

    model_type = "ultravox"
    sub_configs = {"text_config": PretrainedConfig, "audio_config": PretrainedConfig}  # noqa: RUF012 - as in the base

    def __init__(
        self,
        audio_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        audio_model_id: str | None = None,
        text_model_id: str | None = None,
        audio_token_index: int | None = None,
        stack_factor: int = 5,
        hidden_size: int = 2048,
        projector_act: str = "swiglu",
        projector_ln_mid: bool = True,
        projector_init_value: float = 0.4,
        num_projector_layers: int = 0,
        audio_boundary_ids: list[int] | None = None,
        projector_type: str | None = None,
        downsampling: str = "stack",
        num_projector_queries: int = 1,
        num_projector_rows: int | None = None,
        audio_padding: str = "true_length",
        audio_blocks: list[int] | None = None,
        audio_layer_mix: bool = False,
        second_audio_config: PretrainedConfig | dict[str, Any] | None = None,
        audio_features: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if projector_type is None:
            projector_type = "transformer" if num_projector_layers else "swiglu"
        for name, value, known in (
            ("projector_act", projector_act, ("swiglu",)),
            ("projector_type", projector_type, PROJECTORS),
            ("downsampling", downsampling, DOWNSAMPLINGS),
            ("audio_padding", audio_padding, AUDIO_PADDINGS),
        ):
            if value not in known:
                raise ModelError(
                    f"{name} {value!r} is not known to this version: expected {' or '.join(map(repr, known))}; "
                    "a newer version may read it"
                )
        if bool(num_projector_layers) != (projector_type in LAYERED_PROJECTORS):
            raise ModelError(f"a projector of type {projector_type!r} cannot have {num_projector_layers} layers")
        self.audio_config = _sub_config(audio_config, "whisper")
        self.text_config = _sub_config(text_config, "llama")
        self.audio_model_id = audio_model_id
        self.text_model_id = text_model_id
        self.vocab_size = self.text_config.vocab_size
        self.audio_token_index = self.vocab_size if audio_token_index is None else audio_token_index
        self.stack_factor = stack_factor
        self.hidden_size = hidden_size
        self.projector_act = projector_act
        self.projector_ln_mid = projector_ln_mid
        self.projector_init_value = projector_init_value
        self.num_projector_layers = num_projector_layers
        if audio_boundary_ids is not None:
            self.audio_boundary_ids = list(audio_boundary_ids)
        self.projector_type = projector_type
        self.downsampling = cast(Downsampling, downsampling)
        self.num_projector_queries = num_projector_queries
        self.num_projector_rows = num_projector_rows
        self.audio_padding = audio_padding
        self.audio_blocks = audio_blocks
        self.audio_layer_mix = audio_layer_mix
        self.second_audio_config = second_audio_config and _sub_config(second_audio_config, "whisper")
        self.audio_features = audio_features
        for name in ("ignore_index", "vocab_size"):  # transformers.js takes ignore_index for the audio token
            kwargs.pop(name, None)
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        parts = [part for part in (self.audio_config, self.second_audio_config, self.text_config) if part is not None]
        attention = [part._attn_implementation for part in parts]
        super().__init__(**kwargs)
        # the base class has just reset it in both parts, which may belong to models that exist already: without a
        # name, those would run attention without a causal mask
        for part, implementation in zip(parts, attention, strict=True):
            if part._attn_implementation is None:
                part._attn_implementation = implementation

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: of our own keys, those that make it another model than the public format's."""
        content = super().to_dict()
        return {key: value for key, value in content.items() if key not in OWN_KEYS or value != OWN_KEYS[key]}

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The language model's configuration: generation reads its cache shape and vocabulary there."""
        return self.text_config


AutoConfig.register(UltravoxConfig.model_type, UltravoxConfig, exist_ok=True)
