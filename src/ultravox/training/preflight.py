"""What of the data does not fit the objectives, looked for before any weight is loaded."""

from itertools import islice

from ultravox.config.schema import RunConfig
from ultravox.data.sources import load_source
from ultravox.data.templates import PromptTemplate
from ultravox.training.examples import has_teacher, require_transcript
from ultravox.training.rows import source_spec

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
