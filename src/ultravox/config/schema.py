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
from ultravox.config.model import FRAMES_PER_SECOND, ModelConfig
from ultravox.config.objectives import AlignOptions, TuneOptions
from ultravox.config.optim import OptimConfig
from ultravox.config.performance import PerformanceConfig
from ultravox.config.section import Name, Section, misfit


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
    performance: PerformanceConfig = Field(default_factory=PerformanceConfig, description="speed and memory")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="processes")
    checkpoints: CheckpointsConfig = Field(default_factory=CheckpointsConfig, description="checkpoints")
    init_from: Name | None = Field(
        None,
        description="begin with the weights that another run has trained: its folder, one of its checkpoints, or a "
        "saved model; null = projector and adapters begin anew",
    )

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                both = [f"stages.{index}.name" for index, other in enumerate(names) if other == name]
                raise misfit(f"two stages are named {name!r}; rename one", *both)
        self.engine.require_form(self.model.dtype, compiles=self.performance.compile)
        for index, stage in enumerate(self.stages):
            if stage.max_steps:  # one that is left out need not fit: another file may have brought it in
                self._check_stage(stage, f"stages.{index}")
        steps = [f"stages.{index}.max_steps" for index in range(len(names))]
        self.stages = [stage for stage in self.stages if stage.max_steps > 0]
        if not self.stages:
            raise misfit("every stage has max_steps 0; at least one must train", *steps)
        if self.performance.checkpoint_audio_encoder and not self._encoder_trains:
            raise misfit(
                "performance.checkpoint_audio_encoder has no effect on a frozen encoder; drop it, or set "
                "model.train_audio_encoder or model.audio_encoder_lora.rank",
                "performance.checkpoint_audio_encoder",
                "model.train_audio_encoder",
            )
        position_seconds = self.model.stack_factor / FRAMES_PER_SECOND
        if position_seconds > self.data.max_audio_seconds:
            raise misfit(
                f"stack_factor {self.model.stack_factor} makes one position of {position_seconds:g} s, more than the "
                f"longest clip has (data.max_audio_seconds {self.data.max_audio_seconds:g}); lower stack_factor",
                "model.stack_factor",
                "data.max_audio_seconds",
            )
        return self

    @property
    def _encoder_trains(self) -> bool:
        return self.model.train_audio_encoder or self.model.audio_encoder_lora.rank > 0

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
        self.engine.require_shared_states(stage.name, key, stage.optim.optimizer)
        stage.tune.next_frame.require_still_target(stage.name, key, self._encoder_trains)
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
