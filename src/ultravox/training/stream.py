"""A stream as training data: its windows become examples when they come, and nothing is cached.

The loader's thread reads and tokenises, ahead of the step; its workers decode.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from ultravox.config.schema import RunConfig
from ultravox.data.cache import CacheReport
from ultravox.data.clip import Clip
from ultravox.data.fingerprint import fingerprint
from ultravox.data.plan import Limits
from ultravox.data.quarantine import Quarantine
from ultravox.data.stream_order import Examples, StreamOrder
from ultravox.data.streaming import StreamSource, Window
from ultravox.data.templates import PromptTemplate, UnusableRow
from ultravox.training.examples import Example, ExampleMaker, ExampleTable, make_version, tokens_of
from ultravox.training.features import Features
from ultravox.training.rows import source_key, source_spec
from ultravox.training.speech import SpeechData, audio_limits, trainable_of

ROWS_TO_TRY = 64  # before the run begins

Select = Callable[[ExampleTable], tuple[ExampleTable, np.ndarray, np.ndarray]]
"""Examples → those that can be trained on, their audio tokens [example, version] and text tokens [example, prompt]."""


class SpeechStream:
    """The one source of a run that streams, and what its clips become."""

    def __init__(
        self, config: RunConfig, processor: Any, features: Features, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """Args:
        config: of the run.
        processor: of the model.
        features: tell how long the encoder's output is.
        rank, world_size: which part of the shards is this process's. Each process has windows of its own, so its
            loader is that of a single one.

        Raises:
            DataError: no such dataset, shards that cannot be dealt out, or a template that names a missing column.
        """
        (source,) = config.data.sources
        self._features, self._stack_factor = features, config.model.stack_factor
        self._speeds = source.speeds or config.data.speeds
        self.limits = audio_limits(config, features)
        self.source = StreamSource(
            source_spec(source),
            window=config.data.stream_window,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            max_quarantine_share=config.data.max_quarantine_share,
        )
        self._template = PromptTemplate(source.task, source.prompts, source.response)
        self._maker = ExampleMaker(0, self._template, processor, config, self.source.fingerprint)
        rows = islice(self.source.source.shard_rows(0), ROWS_TO_TRY)
        clips = [found for _, found in rows if isinstance(found, Clip)]
        self._template.require_columns(clips, f"source {source.name}")
        tried, _ = self._examples(clips)
        self.fingerprint = fingerprint([self.source.fingerprint, *(part for one in tried for part in tokens_of(one))])
        """Of the dataset, and of the first rows' tokens: other templates or another tokenizer change them."""

    def order(self, select: Select, limits: Limits, *, seed: int) -> StreamOrder:
        """The batches of a stage, from the stream's beginning."""

        def read(window: Window) -> Examples:
            examples, left_out = self._examples(window.clips)
            return Examples(*select(ExampleTable.of(examples, self._stack_factor)), left_out)

        return StreamOrder(self.source, read, limits, seed=seed, fingerprint=self.fingerprint)

    def describe(self) -> str:
        """What there is to train on, in one line."""
        return (
            f"{self.source.spec.name}, streamed from {self.source.num_shards} shards in windows of "
            f'{self.source.window} clips (none are kept out for "WER so far")'
        )

    def _examples(self, clips: list[Clip]) -> tuple[list[Example], list[tuple[str, str]]]:
        """The examples of some clips, and reason and id of those that give none."""
        examples: list[Example] = []
        left_out: list[tuple[str, str]] = []
        least, most = self.limits
        for clip in clips:
            seconds = [length for _, length in self._template.recordings(clip)]
            if any(length < least for length in seconds):
                left_out.append(("too short", clip.id))
                continue
            if any(length > most for length in seconds):
                left_out.append(("too long", clip.id))
                continue
            try:
                example = self._maker.example(clip)
                example.prompts = list(example.prompts)
            except UnusableRow as error:
                left_out.append((error.reason, clip.id))
                continue
            example.versions = [make_version(self._features, speed, seconds, ()) for speed in self._speeds]
            examples.append(example)
        return examples, left_out


def prepare_stream(config: RunConfig, model: Any, processor: Any, *, rank: int = 0, world_size: int = 1) -> SpeechData:
    """Open the run's stream, and try its first rows.

    Raises:
        DataError: see `SpeechStream`.
    """
    data = config.data
    features = Features(model, data.feature_dtype, config.model.audio_encoder)
    stream = SpeechStream(config, processor, features, rank=rank, world_size=world_size)
    key = source_key(data.sources[0])
    return SpeechData(
        sources=data.sources,
        temperature=data.temperature,
        examples=ExampleTable.of([], config.model.stack_factor),
        progress_examples=[],
        features=features,
        cached=False,
        cache_report=CacheReport([]),
        quarantine=Quarantine(),
        max_quarantine_share=data.max_quarantine_share,
        min_audio_seconds=stream.limits[0],
        max_audio_seconds=stream.limits[1],
        num_rows=0,
        fingerprints={key: stream.fingerprint},
        vocabularies=[],
        sizes={key: 0},
        seconds=0.0,
        trainable=trainable_of(model),
        stream=stream,
    )
