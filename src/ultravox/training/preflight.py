"""What does not fit the objectives, looked for before anything is encoded or trained."""

from itertools import islice
from typing import Any

from ultravox.config.schema import RunConfig, StageConfig
from ultravox.data.sources import load_source
from ultravox.data.templates import PromptTemplate
from ultravox.training.audio_learning import EndOfAudio, NextFrames
from ultravox.training.examples import has_teacher, require_transcript
from ultravox.training.features import Features
from ultravox.training.rows import source_spec

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


def idle_rates(config: RunConfig, stage: StageConfig) -> list[str]:
    """Parts of the model for which a file or the command line sets a rate, though nothing in them trains."""
    model = config.model
    trains = {
        "language_model": model.language_model_lora.rank > 0,
        "audio_encoder": model.train_audio_encoder or model.audio_encoder_lora.rank > 0,
    }
    rates = stage.optim.lr
    return [p for p, it_does in trains.items() if not it_does and p in rates.model_fields_set and getattr(rates, p) > 0]
