"""What a run configuration may hold: every key with its type, default, range and meaning.

The YAML file, the ``--key value`` overrides, ``docs/configuration.md`` and ``ultravox train --help`` all come from
these classes. Classes elsewhere take plain arguments; only the factories and ``cli`` read a configuration.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Speed = Annotated[float, Field(ge=0.5, le=2)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """One block of keys: unknown keys, NaN, infinities and yes/no in place of a number are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_for_numbers(cls, data: Any) -> Any:
        # pydantic would read `max_steps: yes` as 1
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{key} takes no true/false, got {str(value).lower()}")
        return data


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


class ModelConfig(Section):
    """Which parts the model is made of, and which of them train."""

    language_model: Name = Field(
        "smollm2-135m-instruct", description="causal language model: a bundled name, a local folder or a hub id"
    )
    audio_encoder: Name = Field(
        "whisper-tiny.en", description="audio encoder: a bundled name, a local folder or a hub id"
    )
    stack_factor: int = Field(
        5, ge=1, le=50, description="encoder frames (20 ms each) joined into one position of the language model"
    )
    projector_hidden_size: int = Field(
        2048, ge=2, multiple_of=2, description="width inside the projector, before SwiGLU halves it"
    )
    chat_template: Name = Field(
        "model", description='"model" = the language model\'s own chat template, or the path of a Jinja file'
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="number type of the weights and activations")
    language_model_lora: LoraConfig = Field(default_factory=LoraConfig, description="adapters on the language model")
    audio_encoder_lora: EncoderLoraConfig = Field(
        default_factory=EncoderLoraConfig, description="adapters on the audio encoder"
    )
    train_audio_encoder: bool = Field(False, description="train every weight of the audio encoder")

    @model_validator(mode="after")
    def _one_way_to_train_the_encoder(self) -> "ModelConfig":
        if self.train_audio_encoder and self.audio_encoder_lora.rank:
            raise ValueError("train_audio_encoder: true and audio_encoder_lora.rank > 0 exclude each other; drop one")
        return self


class SourceConfig(Section):
    """One dataset that training draws from."""

    name: Name = Field(description="a bundled dataset, a dataset folder, an audio folder or a .jsonl file")
    split: Name = Field("train", description="split of that dataset")
    task: Literal["transcription", "answer"] = Field(
        "transcription", description="what the model learns to write: the transcript, or the answer to what was said"
    )
    repeat: int = Field(1, ge=1, le=1000, description="how often each clip comes in one epoch")
    max_clips: int | None = Field(None, ge=1, description="use the first so many clips only; null = all")
    speeds: list[Speed] | None = Field(None, min_length=1, description="instead of data.speeds, for this dataset")


class DataConfig(Section):
    """What the stages train on."""

    sources: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(name="asterisk-en")], min_length=1, description="datasets to mix"
    )
    speeds: list[Speed] = Field(
        [1.0], min_length=1, description="playing speeds; each is one more cached version of every clip"
    )
    transcript_style: Literal["written", "spoken"] = Field(
        "written",
        description='what the model learns to write: the text as it stands, or "spoken" = words alone, in lower case',
    )
    min_audio_seconds: float = Field(0.1, ge=0, description="shorter clips are left out")
    max_audio_seconds: float = Field(30.0, gt=0, le=600, description="longer clips are left out")
    max_quarantine_share: Share = Field(
        0.01, description="training stops when more than this share of the clips cannot be read"
    )
    feature_dtype: Literal["float16", "float32"] = Field(
        "float16", description="number type of a frozen encoder's features on disk"
    )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.min_audio_seconds >= self.max_audio_seconds:
            raise ValueError("min_audio_seconds must be less than max_audio_seconds")
        if len(set(self.speeds)) != len(self.speeds):
            raise ValueError(f"speeds holds one speed twice: {self.speeds}")
        keys = [(source.name, source.split, source.task) for source in self.sources]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"sources holds {key[0]!r} (split {key[1]}, task {key[2]}) twice; use repeat instead")
        return self


class AugmentConfig(Section):
    """Changes to the encoder frames, drawn anew in every epoch; they work on cached features too."""

    time_masks: int = Field(0, ge=0, le=100, description="stretches of time set to zero, per clip")
    max_time_mask_seconds: float = Field(0.2, ge=0, le=30, description="longest such stretch")
    channel_masks: int = Field(0, ge=0, le=100, description="bands of feature channels set to zero, per clip")
    max_channel_mask_share: Share = Field(0.1, description="widest such band, as a share of the channels")
    noise_std: float = Field(
        0.0, ge=0, le=10, description="Gaussian noise, in standard deviations of the clip's features"
    )


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


class AlignOptions(Section):
    """Objective `align`: CTC through the language model's own embedding rows."""

    match_weight: float = Field(
        0.5, ge=0, le=100, description="weight of pulling each position towards its expected embedding row, beside CTC"
    )
    vocabulary: Literal["transcripts"] = Field(
        "transcripts", description="which rows CTC chooses among: those of the tokens that occur in the transcripts"
    )


class TuneOptions(Section):
    """Objective `tune`: cross-entropy on the text through the language model."""

    loss_mask: Literal["response", "after_audio", "all_text", "assistant_turns"] = Field(
        "response",
        description="where the loss counts: the last answer and its end token, all that follows the audio, "
        "all text, or what the assistant says in any turn",
    )


class StageConfig(Section):
    """One stage of training; stages run in the order of the list."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="the stage's name in logs, checkpoints and overrides")
    objective: Literal["align", "tune"] = Field(description="what is learnt")
    max_steps: int = Field(ge=0, description="optimizer steps; 0 leaves the stage out")
    max_batch_tokens: int = Field(
        4096,
        ge=1,
        description="budget of one batch: audio positions (align) or all positions (tune); padding counts, except "
        "where rows are packed: a Llama model tuned in float32 on a CPU",
    )
    accumulation_steps: int = Field(1, ge=1, le=10_000, description="batches per optimizer step")
    sources: list[Name] | None = Field(None, min_length=1, description="names of the data.sources to use; null = all")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="optimizer")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="augmentation")
    align: AlignOptions = Field(default_factory=AlignOptions, description="options of the objective `align`")
    tune: TuneOptions = Field(default_factory=TuneOptions, description="options of the objective `tune`")
    log_every: int = Field(10, ge=1, description="steps between two lines of the log")
    evaluate_every: int = Field(0, ge=0, description="steps between two looks at the word error rate; 0 = at the end")
    checkpoint_every: int = Field(0, ge=0, description="steps between two checkpoints; 0 = at the end of the stage")

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        for name, defaults in (("align", AlignOptions()), ("tune", TuneOptions())):
            if self.objective != name and getattr(self, name) != defaults:
                raise ValueError(f"options under {name!r} have no effect in a stage with objective {self.objective!r}")
        if self.max_steps and self.optim.warmup_steps > self.max_steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) exceeds max_steps ({self.max_steps}); lower it too, "
                f"such as --stages.{self.name}.optim.warmup_steps {self.max_steps // 10}"
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


class LoggingConfig(Section):
    """Where progress goes, beside the terminal and `log.jsonl`."""

    tensorboard: bool = Field(True, description="write TensorBoard files, if TensorBoard is installed")


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

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are named {name!r}")
        known = [source.name for source in self.data.sources]
        for stage in self.stages:
            for source in stage.sources or []:
                if source not in known:
                    raise ValueError(
                        f"stage {stage.name!r} uses source {source!r}, but data.sources holds {', '.join(known)}"
                    )
            tasks = {s.task for s in self.data.sources if stage.sources is None or s.name in stage.sources}
            if stage.objective == "align" and "transcription" not in tasks:
                raise ValueError(f"stage {stage.name!r} aligns to transcripts, but none of its sources has that task")
        self.stages = [stage for stage in self.stages if stage.max_steps > 0]
        if not self.stages:
            raise ValueError("every stage has max_steps 0; at least one must train")
        return self
