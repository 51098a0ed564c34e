"""What the model is made of, and which of its parts train."""

from typing import Literal

from pydantic import Field, model_validator

from ultravox.config.section import Name, Section, misfit

FRAMES_PER_SECOND = 50  # of every encoder's published models; audio/lengths.py, which this may not import, derives it


class LoraConfig(Section):
    """Low-rank adapters on the linear layers of one part of the model."""

    rank: int = Field(0, ge=0, le=1024, description="rank of the adapters; 0 = this part stays frozen")
    alpha: float | None = Field(None, gt=0, description="scale numerator (scale = alpha / rank); null = 2 × rank")
    target_modules: list[Name] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="last names of the linear layers that get an adapter",
    )

    @property
    def effective_alpha(self) -> float:
        """The alpha in force: the given one, else twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class EncoderLoraConfig(LoraConfig):
    """The same for the audio encoder, whose layers have other names."""

    target_modules: list[Name] = Field(
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        min_length=1,
        description="last names of the linear layers that get an adapter",
    )


_WITHOUT_LAYERS = ("swiglu", "swiglu_v0.4", "linear", "mlp", "conv")
_CTC = ("ctc_weighted", "ctc_compressed")


class ModelConfig(Section):
    """Which parts the model is made of, and which of them train."""

    language_model: Name = Field(
        "smollm2-135m-instruct", description="causal language model: a bundled name, a local folder or a hub id"
    )
    audio_encoder: Name = Field(
        "whisper-tiny.en", description="audio encoder: a bundled name, a local folder or a hub id"
    )
    stack_factor: int = Field(
        5,
        ge=1,
        le=50,
        description="encoder frames joined into one position of the language model; 5 of Whisper's 20 ms are 100 ms",
    )
    downsampling: Literal["stack", "stride", "mean", "random"] = Field(
        "stack",
        description="how they become one: joined side by side, the first one, their mean, or a random one of them "
        "(while training; else the middle one)",
    )
    projector: Literal[
        "swiglu", "swiglu_v0.4", "linear", "mlp", "conv", "transformer", "qformer", "ctc_weighted", "ctc_compressed"
    ] = Field(
        "swiglu", description="what makes embeddings of them; only swiglu and swiglu_v0.4 are what other programs read"
    )
    projector_hidden_size: int = Field(
        2048, ge=2, multiple_of=2, description="width inside the projector, before SwiGLU halves it"
    )
    num_projector_layers: int | None = Field(
        None, ge=1, le=48, description="layers of the projectors transformer and qformer; null = 2"
    )
    num_projector_queries: int = Field(
        1, ge=1, le=64, description="positions that the projector qformer makes of each window of as many stack_factors"
    )
    audio_encoder_layers: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="keep only so many of the encoder's layers, from the first one on: quicker, and earlier layers of "
        "some encoders carry more of what is said; null = all",
    )
    audio_encoder_layer_mix: bool = Field(
        False,
        description="a learned mix of all the encoder's layers (a weight each, softmax) instead of the last one; the "
        "cache keeps them all",
    )
    second_audio_encoder: Name | None = Field(
        None,
        description="an encoder beside the first one, of as many frames a second; a frame holds the channels of both",
    )
    audio_padding: Literal["true_length", "padded"] = Field(
        "true_length",
        description="Whisper: what it hears behind a clip: nothing, or silence up to 30 s, as it was trained (slower)",
    )
    encoder_window_seconds: float | None = Field(
        None,
        ge=0.1,
        le=30,
        description="encode in blocks of so many seconds, each by itself, so that audio can be encoded as it comes; "
        "null = each clip as a whole",
    )
    encoder_look_ahead_seconds: float = Field(
        0.0, ge=0, le=10, description="seconds behind a block that are heard with it: what a block waits for"
    )
    encoder_context_seconds: float = Field(
        0.0, ge=0, le=30, description="seconds before a block that are heard with it once more"
    )
    chat_template: Name = Field(
        "model", description='"model" = the language model\'s own chat template, or the path of a Jinja file'
    )
    audio_boundaries: bool = Field(
        False,
        description="a learned token before each recording and one after it; the language model's table grows by them",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="number type of the weights and activations; what trains is updated in float32. float16 scales the "
        "loss, so that small gradients do not vanish",
    )
    language_model_lora: LoraConfig = Field(default_factory=LoraConfig, description="adapters on the language model")
    audio_encoder_lora: EncoderLoraConfig = Field(
        default_factory=EncoderLoraConfig, description="adapters on the audio encoder"
    )
    train_audio_encoder: bool = Field(
        False, description="train the weights of the audio encoder; see train_feature_encoder"
    )
    train_feature_encoder: bool = Field(
        False,
        description="with train_audio_encoder, also train the convolutions over the samples (wav2vec 2.0 and its kin); "
        "encoders without them train whole either way",
    )

    @model_validator(mode="after")
    def _projector_uses_its_options(self) -> "ModelConfig":
        for key, default, unused_by in (
            ("downsampling", "stack", ("conv", "qformer")),
            ("projector_hidden_size", 2048, ("linear", "transformer")),
            ("num_projector_layers", None, (*_WITHOUT_LAYERS, *_CTC)),
            ("num_projector_queries", 1, (*_WITHOUT_LAYERS, "transformer", *_CTC)),
        ):
            value = getattr(self, key)
            if value != default and self.projector in unused_by:
                raise misfit(
                    f"{key}: {value} has no effect with projector: {self.projector}; drop it", key, "projector"
                )
        if self.downsampling != "stack" and self.stack_factor == 1:
            message = f"downsampling: {self.downsampling} has no effect with stack_factor: 1; drop it"
            raise misfit(message, "downsampling", "stack_factor")
        return self

    @model_validator(mode="after")
    def _the_encoder_can_run_so(self) -> "ModelConfig":
        window = self.encoder_window_seconds
        for key in ("encoder_look_ahead_seconds", "encoder_context_seconds"):
            if window is None and getattr(self, key):
                raise misfit(
                    f"{key} has no effect without encoder_window_seconds; set both or none",
                    key,
                    "encoder_window_seconds",
                )
        if window is not None and self.audio_padding == "padded":
            message = "audio_padding: padded is for whole clips, encoder_window_seconds cuts them into blocks; drop one"
            raise misfit(message, "audio_padding", "encoder_window_seconds")
        frames = None if window is None else window * FRAMES_PER_SECOND
        if frames is not None and (abs(frames - round(frames)) > 1e-6 or round(frames) % self.stack_factor):
            raise misfit(
                f"encoder_window_seconds: {window:g} is no whole number of positions of "
                f"{self.stack_factor / FRAMES_PER_SECOND:g} s (stack_factor {self.stack_factor}), so a position would "
                "wait for the next block; choose a multiple",
                "encoder_window_seconds",
                "stack_factor",
            )
        if self.audio_encoder_layer_mix and self.second_audio_encoder is not None:
            message = "audio_encoder_layer_mix mixes the layers of one encoder, and there are two; drop one"
            raise misfit(message, "audio_encoder_layer_mix", "second_audio_encoder")
        return self

    @model_validator(mode="after")
    def _one_way_to_train_the_encoder(self) -> "ModelConfig":
        if self.train_audio_encoder and self.audio_encoder_lora.rank:
            message = "train_audio_encoder: true and audio_encoder_lora.rank > 0 exclude each other; drop one"
            raise misfit(message, "train_audio_encoder", "audio_encoder_lora.rank")
        if self.train_feature_encoder and not self.train_audio_encoder:
            message = "train_feature_encoder: true has no effect without train_audio_encoder: true; set both or none"
            raise misfit(message, "train_feature_encoder", "train_audio_encoder")
        return self
