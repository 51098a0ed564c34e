"""Streams as training data: their windows become examples when they come, and nothing is cached.

The loader's thread reads and tokenises, ahead of the step; its workers decode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np

from ultravox.config.data import SourceConfig
from ultravox.config.schema import RunConfig
from ultravox.data.cache import CacheReport
from ultravox.data.clip import Clip
from ultravox.data.fingerprint import fingerprint
from ultravox.data.plan import Limits
from ultravox.data.quarantine import UNFIT_FOR_OBJECTIVE, Quarantine
from ultravox.data.stream_mixture import StreamMixture
from ultravox.data.stream_order import Examples, StreamOrder
from ultravox.data.streaming import StreamSource, Window
from ultravox.data.templates import PromptTemplate, UnusableRow
from ultravox.training.examples import Example, ExampleMaker, ExampleTable, make_version, tokens_of, unique_tokens
from ultravox.training.features import Features
from ultravox.training.rows import source_key, source_spec
from ultravox.training.speech import SpeechData, audio_limits, trainable_of

ROWS_TO_TRY = 64  # before the run begins

Select = Callable[[ExampleTable], tuple[ExampleTable, np.ndarray, np.ndarray]]
"""Examples → those that can be trained on, their audio tokens [example, version] and text tokens [example, prompt]."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """One source of a run that streams."""

    index: int
    """In data.sources."""
    key: str
    config: SourceConfig
    maker: ExampleMaker
    speeds: list[float]
    stream: StreamSource
    """In windows of a run's size where it is the only one, else of one clip each."""


class SpeechStream:
    """The sources of a run that streams, and what their clips become."""

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
        self._config, self._processor, self._features = config, processor, features
        self.limits = audio_limits(config, features)
        num = len(config.data.sources)
        self._opened: list[_Opened] = []
        self.tried: list[list[Example]] = []
        """Examples of the first rows, of each source."""
        self.fingerprints: dict[str, str] = {}
        """Of each dataset, and of its first rows' tokens: other templates or another tokenizer change them."""
        for index, source in enumerate(config.data.sources):
            stream = StreamSource(
                source_spec(source),
                window=config.data.stream_window if num == 1 else 1,
                seed=config.seed,
                rank=rank,
                world_size=world_size,
                max_quarantine_share=config.data.max_quarantine_share,
                key=source_key(source),
            )
            self._try(index, source, stream)

    def _try(self, index: int, source: SourceConfig, stream: StreamSource) -> None:
        """Make the examples of a source's first rows."""
        template = PromptTemplate(source.task, source.prompts, source.response)
        speeds = source.speeds or self._config.data.speeds
        key = source_key(source)
        name = f"{index} {source.task} {stream.fingerprint}"  # no path: a moved dataset keeps its order
        maker = ExampleMaker(index, template, self._processor, self._config, name)
        one = _Opened(index, key, source, maker, speeds, stream)
        rows = islice(stream.source.shard_rows(0), ROWS_TO_TRY)
        clips = [found for _, found in rows if isinstance(found, Clip)]
        template.require_columns(clips, f"source {source.name}", source.columns)
        made = [self._example(clip, one) for clip in clips]
        tried = [found for found in made if isinstance(found, Example)]
        self._opened.append(one)
        self.tried.append(tried)
        self.fingerprints[one.key] = fingerprint([stream.fingerprint, *(part for e in tried for part in tokens_of(e))])

    def order(self, select: Select, limits: Limits, *, seed: int, sources: Sequence[int]) -> StreamOrder:
        """The batches of a stage, from the beginning of the streams that it reads: indices in data.sources."""
        chosen = [self._opened[index] for index in sources]
        data = self._config.data
        source: StreamSource | StreamMixture = chosen[0].stream
        if len(self._opened) > 1:
            streams = {one.key: one.stream for one in chosen}
            weights = {one.key: one.config.weight or 1.0 for one in chosen}
            share = data.max_quarantine_share
            source = StreamMixture(streams, weights, window=data.stream_window, max_quarantine_share=share)

        def read(window: Window) -> Examples:
            return self._examples(window, chosen, select)

        of_data = fingerprint([self.fingerprints[one.key] for one in chosen])
        return StreamOrder(source, read, limits, seed=seed, fingerprint=of_data)

    def epoch_uids(self, select: Select, sources: Sequence[int]) -> dict[str, list[str]]:
        """Of each of some sources, the uids of what one epoch trains on. Reads all of its rows: for an audit."""
        found: dict[str, list[str]] = {}
        for one in (self._opened[index] for index in sources):
            one.stream.rewind()
            epoch = takewhile(lambda window: window.epoch == 0, one.stream)
            found[one.key] = [e.uid for window in epoch for e in self._examples(window, [one], select).examples]
        return found

    def describe(self) -> str:
        """What there is to train on, in one line."""
        streams = ", ".join(f"{one.config.name}, streamed from {one.stream.num_shards} shards" for one in self._opened)
        window = self._config.data.stream_window
        return f'{streams} in windows of {window} clips (none are kept out for "WER so far")'

    def _examples(self, window: Window, streams: Sequence[_Opened], select: Select) -> Examples:
        """The examples of a window's clips, which are of these streams, that a stage can train on."""
        made = [self._example(clip, streams[i]) for clip, i in zip(window.clips, window.streams, strict=True)]
        places = {id(found): place for place, found in enumerate(made) if isinstance(found, Example)}
        left_out = [found for found in made if not isinstance(found, Example)]
        table = ExampleTable.of(
            [found for found in made if isinstance(found, Example)], self._config.model.stack_factor
        )
        kept, audio_tokens, text_tokens = select(table)
        chosen = [places.pop(id(example)) for example in kept]
        left_out += [(UNFIT_FOR_OBJECTIVE, window.clips[place].id) for place in places.values()]
        return Examples(list(kept), audio_tokens, text_tokens, left_out, np.array(chosen, dtype=np.int64))

    def _example(self, clip: Clip, stream: _Opened) -> Example | tuple[str, str]:
        """The example of a clip; or a reason and its id."""
        seconds = [length for _, length in stream.maker.template.recordings(clip)]
        if any(length < self.limits[0] for length in seconds):
            return "too short", clip.id
        if any(length > self.limits[1] for length in seconds):
            return "too long", clip.id
        try:
            example = stream.maker.example(clip)
            example.prompts = list(example.prompts)
        except UnusableRow as error:
            return error.reason, error.name
        example.versions = [make_version(self._features, speed, seconds, ()) for speed in stream.speeds]
        return example


def prepare_stream(config: RunConfig, model: Any, processor: Any, *, rank: int = 0, world_size: int = 1) -> SpeechData:
    """Open the run's streams, and try their first rows.

    Raises:
        DataError: see `SpeechStream`.
    """
    data = config.data
    features = Features(model, data.feature_dtype, config.model.audio_encoder)
    stream = SpeechStream(config, processor, features, rank=rank, world_size=world_size)
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
        fingerprints=stream.fingerprints,
        vocabularies=[unique_tokens([example.transcript for example in tried]) for tried in stream.tried],
        sizes=dict.fromkeys(stream.fingerprints, 0),
        seconds=0.0,
        trainable=trainable_of(model),
        stream=stream,
    )
