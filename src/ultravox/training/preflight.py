"""What would end a run later, looked for first: data, objectives, trackers and their keys."""

from itertools import islice
from typing import Any

from ultravox.auth.credentials import Found, Service, find_credentials, of_services
from ultravox.config.schema import RunConfig, StageConfig
from ultravox.data.sources import load_source
from ultravox.data.templates import PromptTemplate
from ultravox.training.audio_learning import EndOfAudio, NextFrames
from ultravox.training.examples import has_teacher, require_transcript
from ultravox.training.features import Features
from ultravox.training.rows import source_spec
from ultravox.training.summary import tell
from ultravox.training.trackers.registry import TRACKERS

#: Rows of each source that are looked at here; the rest are when they are tokenised.
FIRST_ROWS = 10_000


def require_objectives(config: RunConfig, model: Any, processor: Any) -> None:
    """Find out before hours of encoding, and of the stages before, what a later stage's objective cannot do.

    Raises:
        ConfigError: a text that is not one token of this language model; targets that this encoder does not have.
    """
    for stage in config.stages:
        if stage.objective != "tune":
            continue
        if stage.tune.end_of_audio.active:
            EndOfAudio(stage.tune.end_of_audio, model, processor.tokenizer, 1.0)
        if stage.tune.next_frame.weight:
            NextFrames(stage.tune.next_frame, model, Features(model, config.data.feature_dtype))


def require_transcripts(config: RunConfig) -> None:
    """Raise a DataError when a row that a distillation's student is to hear has no text for the teacher to read.

    Streams are looked at when their first rows are tried.
    """
    if config.data.streaming:
        return
    for source in config.data.sources:
        if not has_teacher(config, source.name):
            continue
        template = PromptTemplate(source.task, source.prompts, source.response)
        for clip in islice(load_source(source_spec(source)).clips, FIRST_ROWS):
            require_transcript(clip, template)


def tell_idle_rates(config: RunConfig, stage: StageConfig) -> None:
    """Say which of a stage's rates have no effect."""
    for part in idle_rates(config, stage):
        tell(f"stage {stage.name}: optim.lr.{part} is set, but nothing of the {part} trains: it has no effect")


def idle_rates(config: RunConfig, stage: StageConfig) -> list[str]:
    """Parts of the model for which a file or the command line sets a rate, though nothing in them trains."""
    model = config.model
    trains = {
        "language_model": model.language_model_lora.rank > 0,
        "audio_encoder": model.train_audio_encoder or model.audio_encoder_lora.rank > 0,
    }
    rates = stage.optim.lr
    return [p for p, it_does in trains.items() if not it_does and p in rates.model_fields_set and getattr(rates, p) > 0]


def preflight(config: RunConfig) -> dict[str, Found]:
    """Variable → the credentials that the run may need: Hugging Face's, and those of its trackers.

    Raises:
        ConfigError: a tracker is not installed, or plainly cannot start as it is set up.
        UltravoxError: a place of credentials cannot be read.
    """
    logging = config.logging
    trackers = [TRACKERS[name] for name in logging.trackers]
    for tracker in trackers:
        tracker.require_installed()
    services: set[Service] = {"huggingface"}
    if not logging.offline:
        services |= {tracker.service for tracker in trackers if tracker.service is not None}
    found = find_credentials(of_services(*services))
    for tracker in trackers:
        tracker.require_ready(logging.offline, found)
    return found
