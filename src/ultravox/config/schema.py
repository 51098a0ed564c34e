"""What a run configuration may hold: every key with its type, default, range and meaning.

The YAML file, the ``--key value`` overrides, ``docs/configuration.md`` and ``ultravox train --help`` all come from
these classes. Classes elsewhere take plain arguments; only the factories and ``cli`` read a configuration.
"""

from typing import Literal

from pydantic import Field, model_validator

from ultravox.config.checkpoints import CheckpointsConfig
from ultravox.config.data import AugmentConfig, DataConfig
from ultravox.config.engine import EngineConfig
from ultravox.config.logging import LoggingConfig
from ultravox.config.objectives import AlignOptions, TuneOptions
from ultravox.config.section import Beta, Name, Rate, Section, Share, misfit

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
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="number type of the weights and activations")
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


class LearningRates(Section):
    """Peak learning rate of each part."""

    projector: Rate = Field(1e-3, description="peak rate of the projector")
    language_model: Rate = Field(5e-4, description="peak rate of the language model's adapters")
    audio_encoder: Rate = Field(2e-5, description="peak rate of what trains in the audio encoder; LoRA bears 1e-4")


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: LearningRates = Field(default_factory=LearningRates, description="peak learning rates")
    weight_decay: float = Field(0.01, ge=0, le=1, description="decoupled weight decay, on matrices only")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="AdamW's decay rates of the two moments")
    eps: float = Field(1e-8, gt=0, le=1, description="AdamW's epsilon")
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise to the peak rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate falls after that")
    final_lr_share: Share = Field(0.0, description="share of the peak rate left at the last step")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")


class StageConfig(Section):
    """One stage of training; stages run in the order of the list."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="the stage's name in logs, checkpoints and overrides")
    objective: Literal["align", "tune"] = Field(description="what is learnt")
    max_steps: int = Field(ge=0, description="optimizer steps; 0 leaves the stage out")
    max_batch_tokens: int = Field(
        4096,
        ge=1,
        description="budget of one batch: audio positions (align) or all positions (tune); padding counts, except "
        "where rows are packed (see packing)",
    )
    accumulation_steps: int = Field(1, ge=1, le=10_000, description="batches per optimizer step")
    max_batch_memory_gb: float | None = Field(
        None,
        gt=0,
        description="also keep a batch's predicted memory, beside what is in use before it, below this; measured anew "
        "at the start of a run; null = max_batch_tokens alone",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="tune: several clips in one row, none of which sees another; auto = where it is measured to be "
        "faster (Llama models in float32 on a CPU), on = with any model whose attention can keep them apart",
    )
    sources: list[Name] | None = Field(None, min_length=1, description="names of the data.sources to use; null = all")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="optimizer")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="augmentation")
    align: AlignOptions = Field(default_factory=AlignOptions, description="options of the objective `align`")
    tune: TuneOptions = Field(default_factory=TuneOptions, description="options of the objective `tune`")
    log_every: int = Field(10, ge=1, description="steps between two lines of the log")
    evaluate_every: int = Field(0, ge=0, description="steps between two looks at the word error rate; 0 = at the end")
    checkpoint_every: int = Field(
        0, ge=0, description="steps between two checkpoints; 0 = at the end of the stage. A run keeps its two newest"
    )

    @property
    def decodes(self) -> bool:
        """Whether recordings are decoded in every epoch, since what is heard of them changes."""
        return self.augment.waveform.active or self.tune.decodes

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        for name, defaults in (("align", AlignOptions()), ("tune", TuneOptions())):
            if self.objective != name and getattr(self, name) != defaults:
                message = (
                    f"options under {name!r} have no effect in a stage with objective {self.objective!r}; drop them"
                )
                raise misfit(message, name, "objective")
        if self.objective != "tune" and self.packing == "on":
            message = f"packing: on has no effect in a stage with objective {self.objective!r}; drop it"
            raise misfit(message, "packing", "objective")
        if self.max_steps and self.optim.warmup_steps > self.max_steps:
            raise misfit(
                f"optim.warmup_steps ({self.optim.warmup_steps}) exceeds max_steps ({self.max_steps}); lower it too, "
                f"such as --stages.{self.name}.optim.warmup_steps {self.max_steps // 10}",
                "optim.warmup_steps",
                "max_steps",
            )
        return self


class EvaluationConfig(Section):
    """How the trained model is measured."""

    source: Name = Field("asterisk-en", description="dataset of the word error rate")
    split: Name = Field("heldout", description="split of that dataset; never trained on")
    question_source: Name | None = Field(None, description="dataset of spoken questions with answers; null = none")
    question_split: Name = Field("heldout", description="split of that dataset")
    batch_size: int = Field(16, ge=1, le=4096, description="clips decoded at once")
    max_new_tokens: int = Field(64, ge=1, le=4096, description="longest transcript or answer, in tokens")
    num_bootstrap: int = Field(1000, ge=1, le=100_000, description="resamples behind each interval")
    num_progress_clips: int = Field(24, ge=1, description='clips behind the "WER so far" shown while training')


class RunConfig(Section):
    """Everything about one run."""

    version: Literal[1] = Field(1, description="version of this format")
    run_dir: Name = Field(
        "runs/default",
        description="the run's folder, never inherited",
        json_schema_extra={"default": "runs/<name of the YAML file>"},
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the model")
    data: DataConfig = Field(default_factory=DataConfig, description="the training data")
    stages: list[StageConfig] = Field(min_length=1, description="the stages of training, in order")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="measuring")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="logs")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to train; auto = a GPU, if any")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="processes")
    checkpoints: CheckpointsConfig = Field(default_factory=CheckpointsConfig, description="checkpoints")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                both = [f"stages.{index}.name" for index, other in enumerate(names) if other == name]
                raise misfit(f"two stages are named {name!r}; rename one", *both)
        for index, stage in enumerate(self.stages):
            if stage.max_steps:  # one that is left out need not fit: another file may have brought it in
                self._check_stage(stage, f"stages.{index}")
        steps = [f"stages.{index}.max_steps" for index in range(len(names))]
        self.stages = [stage for stage in self.stages if stage.max_steps > 0]
        if not self.stages:
            raise misfit("every stage has max_steps 0; at least one must train", *steps)
        position_seconds = self.model.stack_factor / FRAMES_PER_SECOND
        if position_seconds > self.data.max_audio_seconds:
            raise misfit(
                f"stack_factor {self.model.stack_factor} makes one position of {position_seconds:g} s, more than the "
                f"longest clip has (data.max_audio_seconds {self.data.max_audio_seconds:g}); lower stack_factor",
                "model.stack_factor",
                "data.max_audio_seconds",
            )
        return self

    def _check_stage(self, stage: StageConfig, key: str) -> None:
        """A stage that trains fits the data, and the processes."""
        distillation = stage.tune.distillation.weight
        self.engine.require_even_passes(stage.name, key, distillation, stage.max_batch_memory_gb)
        known = [source.name for source in self.data.sources]
        instead = "max_steps: 0 leaves the stage out"
        for source in stage.sources or []:
            if source not in known:
                raise misfit(
                    f"stage {stage.name!r} uses source {source!r}, but data.sources holds {', '.join(known)}: name "
                    f"one of these in its sources ({instead})",
                    f"{key}.sources",
                    "data.sources",
                )
        tasks = {s.task for s in self.data.sources if stage.sources is None or s.name in stage.sources}
        if stage.objective == "align" and "transcription" not in tasks:
            raise misfit(
                f"stage {stage.name!r} aligns to transcripts, but none of its sources has that task: give it one with "
                f"task: transcription ({instead})",
                f"{key}.sources",
                "data.sources",
                f"{key}.objective",
            )
        if stage.tune.boundary_share is not None and not self.model.audio_boundaries:
            raise misfit(
                f"stage {stage.name!r} has a boundary_share, but model.audio_boundaries is false: set that too, or "
                "drop the share",
                f"{key}.tune.boundary_share",
                "model.audio_boundaries",
            )
        encoder_trains = self.model.train_audio_encoder or self.model.audio_encoder_lora.rank > 0
        stage.tune.next_frame.require_still_target(stage.name, key, encoder_trains)
        if self.model.projector == "ctc_compressed":
            self._check_unknown_positions(stage, key)
        if self.data.streaming and stage.max_batch_memory_gb is not None:
            raise misfit(
                f"stage {stage.name!r}: max_batch_memory_gb needs all lengths before it begins, and a stream is "
                "never read as a whole: leave it out, and choose max_batch_tokens",
                f"{key}.max_batch_memory_gb",
                "data.sources",
            )

    def _check_unknown_positions(self, stage: StageConfig, key: str) -> None:
        """Nothing in the stage counts on positions that stand for times, or are known beforehand."""
        for option, used, why in (
            ("tune.next_frame.weight", stage.tune.next_frame.weight > 0, "predicts the audio at each position's time"),
            (
                "tune.end_of_audio.variant",
                stage.tune.end_of_audio.active and stage.tune.end_of_audio.variant != "late",
                "tells the end at each position's time",
            ),
            ("max_batch_memory_gb", stage.max_batch_memory_gb is not None, "plans by positions that are known before"),
        ):
            if used:
                raise misfit(
                    f"stage {stage.name!r}: {option} {why}, but ctc_compressed makes one position of each run of one "
                    "token, however long it is; leave one out, or take ctc_weighted",
                    f"{key}.{option}",
                    "model.projector",
                )
