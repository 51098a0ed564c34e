"""Where a run's progress goes, and where the keys for that come from."""

from typing import Literal

from pydantic import Field, model_validator

from ultravox.config.section import Name, Section, misfit

TrackerName = Literal["wandb", "mlflow", "clearml", "trackio"]


class LoggingConfig(Section):
    """Where progress goes, beside the terminal and `log.jsonl`."""

    tensorboard: bool = Field(True, description="write TensorBoard files, if TensorBoard is installed")
    samples: bool = Field(False, description="write which example went into which step, for `ultravox data audit RUN`")
    trackers: list[TrackerName] = Field(
        [], description="experiment trackers that are told as well, each an extra of its name; see docs/trackers.md"
    )
    project: Name = Field("ultravox", description="the trackers' project, or experiment")
    run_name: Name | None = Field(None, description="the run's name there; null = that of its folder")
    offline: bool = Field(
        False,
        description="trackers write to `<run>/trackers/` in their own offline formats, and need no network or key",
    )
    num_transcripts: int = Field(
        4, ge=0, le=100, description="kept-out clips that trackers show, with audio and texts, at each evaluation"
    )
    upload_checkpoints: bool = Field(False, description="trackers keep each checkpoint as an artifact")

    @model_validator(mode="after")
    def _check(self) -> "LoggingConfig":
        if len(set(self.trackers)) < len(self.trackers):
            raise misfit("trackers names one twice; drop one of them", "trackers")
        return self
