"""What would end a run later, looked for before any weight is loaded: data, trackers, their keys."""

from itertools import islice

from ultravox.auth.credentials import Found, Service, find_credentials, of_services
from ultravox.config.schema import RunConfig
from ultravox.data.sources import load_source
from ultravox.data.templates import PromptTemplate
from ultravox.training.examples import has_teacher, require_transcript
from ultravox.training.rows import source_spec
from ultravox.training.trackers.registry import TRACKERS

#: Rows of each source that are looked at here; the rest are when they are tokenised.
FIRST_ROWS = 10_000


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
