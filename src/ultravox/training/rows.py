"""From the rows of all sources to a table of examples: which are kept out, how long their texts are, what is heard.

Each pass looks at one row after the other and keeps numbers, so that a source that is read when it is asked for (a
prepared one) need not fit into memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ultravox.audio.content import Audio
from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.audio.waveform import load_waveform
from ultravox.config.data import SourceConfig
from ultravox.config.schema import RunConfig
from ultravox.data.cache import FeatureRequest
from ultravox.data.clip import Clip
from ultravox.data.examples import CHUNK_ROWS, token_counts
from ultravox.data.filters import Filters
from ultravox.data.fingerprint import fingerprint
from ultravox.data.prepared_clips import pick
from ultravox.data.prompts import encode_all
from ultravox.data.quarantine import Quarantine
from ultravox.data.source import SourceSpec
from ultravox.data.sources import load_source
from ultravox.data.templates import PromptTemplate, UnusableRow
from ultravox.errors import AudioError, DataError
from ultravox.metrics.normalize import is_said, spoken_form
from ultravox.training.examples import (
    Example,
    ExampleMaker,
    ExampleTable,
    KeptExamples,
    Lengths,
    count_tokens,
    ctc_tokens,
    is_one_window,
    join_lengths,
    make_version,
    tokens_of,
)
from ultravox.training.features import Features
from ultravox.training.progress import bar

#: Clips of this length are looked at while training, where there are enough.
PROGRESS_SECONDS = (1.0, 6.0)
#: A pass over so many rows shows how far it is.
MANY_ROWS = 50_000
#: Rows of a source whose tokens are in its fingerprint, and checked against their count.
SAMPLE_ROWS = 64


@dataclass(frozen=True, slots=True)
class SourceRows:
    """The rows of one source that can be used, and what becomes of them."""

    config: SourceConfig
    key: str
    """What the source is called; no two of a run are called the same."""
    fingerprint: str
    clips: Sequence[Clip]
    maker: ExampleMaker
    speeds: Sequence[float]

    @property
    def template(self) -> PromptTemplate:
        return self.maker.template

    def recordings(self, clip: Clip) -> Sequence[tuple[Audio, float]]:
        """What is heard of a clip, and its seconds."""
        return self.template.recordings(clip)


def source_spec(source: SourceConfig) -> SourceSpec:
    """A source as the configuration asks for it."""
    filters = Filters(**source.filters.model_dump())
    names = ("name", "format", "split", "subset", "revision", "streaming", "columns", "max_clips", "max_hours")
    options = {name: getattr(source, name) for name in names}
    return SourceSpec(**options, filters=filters, needs_audio=source.task != "text")


def source_key(source: SourceConfig) -> str:
    """What a source is called among the fingerprints; no two of a run are called the same."""
    subset = f"/{source.subset}" if source.subset else ""
    return f"{source.name}{subset}/{source.split}/{source.task}"


def source_place(index: int) -> str:
    """Which of data.sources a row is of, where two have rows of one name."""
    return f"source {index + 1}"


def load_within(audio: Audio, min_seconds: float, max_seconds: float) -> np.ndarray:
    """`load_waveform`; AudioError also when the recording is shorter than its row may have said."""
    waveform = load_waveform(audio, max_seconds=max_seconds)
    if (seconds := len(waveform) / SAMPLE_RATE) < min_seconds:
        raise AudioError(f"{audio} is too short: {seconds:g} s, expected {min_seconds:g} s or more")
    return waveform


def read_sources(config: RunConfig, processor: Any, quarantine: Quarantine) -> tuple[list[SourceRows], int]:
    """The rows of each source, and how many there were of all, those that are set aside included.

    Raises:
        DataError: a source that is broken or empty; a template that names a missing column.
    """
    sources, num_rows = [], 0
    for index, source in enumerate(config.data.sources):
        loaded = load_source(source_spec(source))
        template = PromptTemplate(source.task, source.prompts, source.response)
        template.require_columns(loaded.clips, f"source {source.name}", source.columns)
        num_rows += loaded.num_rows
        for reason, names in loaded.left_out.items():
            for name in names:
                quarantine.add_row(reason, name, source_place(index))
        key = source_key(source)
        maker = ExampleMaker(index, template, processor, config, f"{key} {loaded.fingerprint}")
        speeds = source.speeds or config.data.speeds
        sources.append(SourceRows(source, key, loaded.fingerprint, loaded.clips, maker, speeds))
    return sources, num_rows


def keep_out(sources: Sequence[SourceRows], count: int) -> tuple[list[tuple[SourceRows, Clip]], list[np.ndarray]]:
    """A fixed few clips of the first transcribed source for "WER so far", chosen by hash; and all without their texts.

    They come from the training split, at most a tenth of it: the held-out split stays unseen. Clips of a few words are
    preferred, since one long clip would be most of the words and of the time that decoding takes.

    Returns: these clips, and the rows of each source that are trained on.
    """
    first = next((source for source in sources if source.config.task == "transcription"), None)
    if first is None or count == 0:
        return [], [np.arange(len(source.clips)) for source in sources]
    looks = [_look(source) for source in sources]
    mine = looks[sources.index(first)]
    order = np.argsort(mine.ids, kind="stable")
    order = order[mine.texts[order] != _key("")]
    count = min(count, len(order) // 10)
    least, most = PROGRESS_SECONDS
    handy = order[(mine.seconds[order] >= least) & (mine.seconds[order] <= most)]
    chosen = (handy if len(handy) >= count else order)[:count]
    training = [np.flatnonzero(~np.isin(look.texts, mine.texts[chosen])) for look in looks]
    return [(first, first.clips[row]) for row in chosen.tolist()], training


class _Look(NamedTuple):
    """What is asked of each clip before any is chosen, [clip]."""

    texts: np.ndarray
    """uint64, what tells the texts apart, whatever their case and punctuation."""
    ids: np.ndarray
    """uint64, by which clips are chosen."""
    seconds: np.ndarray


def _look(source: SourceRows) -> _Look:
    texts, ids = np.zeros((2, len(source.clips)), dtype=np.uint64)
    seconds = np.zeros(len(source.clips))
    with _progress("reading the rows", len(source.clips)) as on_row:
        for row, clip in enumerate(source.clips):
            texts[row] = _key(spoken_form(clip.text) if is_said(clip.text) else "")
            ids[row], seconds[row] = _key(clip.id), clip.duration
            on_row(row + 1)
    return _Look(texts, ids, seconds)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@contextmanager
def _progress(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for what takes long; yields what to call with the rows that are done."""
    if total < MANY_ROWS:
        yield lambda done: None
        return
    with bar(task, unit="rows") as on_progress:
        yield lambda done: on_progress(done, total) if done % 1000 == 0 or done == total else None


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows of a source whose texts can be used, and their tokens."""

    rows: np.ndarray
    """Their numbers in the source, int [row]."""
    tokens: np.ndarray
    """Under each prompt, without placeholders, int32 [row, prompt]."""
    ctc_tokens: np.ndarray
    """See `Lengths`; zeros unless they are wanted."""
    vocabulary: np.ndarray
    """Token ids that stand in any transcript, sorted; none unless they are wanted."""


def count_texts(source: SourceRows, rows: np.ndarray, tokenizer: Any, quarantine: Quarantine, *, ctc: bool) -> Texts:
    """Tokenise the texts of some rows, and keep their lengths; rows that cannot be used are set aside.

    Args:
        source: of the rows.
        rows: their numbers, [row].
        tokenizer: of the language model.
        quarantine: is told of the rows that cannot be used.
        ctc: whether transcripts are wanted by themselves.
    """
    kept = [np.zeros(0, dtype=np.int64)]
    counts = [np.zeros((0, source.template.num_prompts), dtype=np.int32)]
    needed = [np.zeros(0, dtype=np.int32)]
    used = np.zeros(len(tokenizer), dtype=bool)
    place = source_place(source.maker.source)
    with _progress("tokenising", len(rows)) as on_row:
        clips = pick(source.clips, rows)
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk, styled, alone = [], [], []
            for row in rows[start : start + CHUNK_ROWS].tolist():
                try:
                    clip, text = source.maker.texts(next(clips))
                except UnusableRow as error:
                    quarantine.add_row(error.reason, error.name, place)
                    continue
                chunk.append(row)
                styled.append(clip)
                alone.append(text)
            unusable = np.zeros(len(chunk), dtype=bool)

            def set_aside(error: UnusableRow, number: int, unusable: np.ndarray = unusable) -> None:
                quarantine.add_row(error.reason, error.name, place)
                unusable[number] = True

            tokens = token_counts(tokenizer, source.template, styled, set_aside)
            kept.append(np.array(chunk, dtype=np.int64)[~unusable])
            counts.append(tokens[~unusable])
            wanted = [text for text, bad in zip(alone, unusable.tolist(), strict=True) if not bad] if ctc else []
            transcripts = encode_all(tokenizer, wanted)
            needed.append(np.array([ctc_tokens(ids) for ids in transcripts] or [0] * len(kept[-1]), dtype=np.int32))
            used[np.array([token for ids in transcripts for token in ids], dtype=np.int64)] = True
            on_row(min(len(rows), start + CHUNK_ROWS))
    return Texts(np.concatenate(kept), np.concatenate(counts), np.concatenate(needed), np.flatnonzero(used))


def requests_of(source: SourceRows, rows: np.ndarray) -> Iterator[FeatureRequest]:
    """What is heard of some rows: each recording at each speed, a row's first speed first."""
    for clip in pick(source.clips, rows):
        recordings = source.recordings(clip)
        for speed in source.speeds:
            for audio, seconds in recordings:
                yield FeatureRequest(audio, seconds, speed)


class Hearing:
    """What became of each recording that is asked for, and which rows cannot be used for want of one."""

    def __init__(self, entry: Callable[[FeatureRequest], str | None]) -> None:
        """Args:
        entry: of a recording in the cache ("" without a cache), or None = it cannot be used. It is asked about each of
            `requests_of`, in their order.
        """
        self._entry = entry
        self._rows: dict[str, dict[tuple[int, str], None]] = {}
        """Recording → source and id of the rows that it is in; of those that cannot be used."""

    def entries(self, source: SourceRows, clip: Clip, speed: float) -> list[str] | None:
        """The entries of a row's recordings at one speed; None when one of them cannot be used."""
        found, whole = [], True
        for audio, seconds in source.recordings(clip):
            entry = self._entry(FeatureRequest(audio, seconds, speed))
            if entry is None:
                self._rows.setdefault(str(audio), {})[(source.maker.source, clip.id)] = None
                whole = False
            else:
                found.append(entry)
        return found if whole else None

    def set_aside(self, quarantine: Quarantine, faults: Mapping[str, Iterable[str]]) -> None:
        """Count every row that lacks a recording: a file's first goes by the file's name, others by their own as well.

        Args:
            quarantine: of the run.
            faults: reason → recordings, each named once.
        """
        for reason, recordings in faults.items():
            for recording in recordings:
                quarantine.add(reason, recording)
                for index, row_id in list(self._rows.get(recording, ()))[1:]:
                    quarantine.add(reason, f"{recording} ({row_id}, {source_place(index)})")


class HeardRows:
    """Rows of a source whose text and audio can be used."""

    def __init__(
        self, source: SourceRows, texts: Texts, hearing: Hearing, features: Features, stack_factor: int
    ) -> None:
        """Args:
        source: of the rows.
        texts: of the rows.
        hearing: tells of their recordings.
        features: tell how long the encoder's output is.
        stack_factor: of the projector.
        """
        self.source, self._features = source, features
        shape = (len(texts.rows), len(source.speeds))
        tokens, places = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int8)
        exists, one_window = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        seconds, starts = np.zeros(shape), np.zeros(shape, dtype=np.int64)
        num_recordings = np.zeros(len(texts.rows), dtype=np.int32)
        names: list[str] = []
        with _progress("measuring the audio", len(texts.rows)) as on_row:
            for index, clip in enumerate(pick(source.clips, texts.rows)):
                durations = [duration for _, duration in source.recordings(clip)]
                num_recordings[index] = len(durations)
                place = 0
                for number, speed in enumerate(source.speeds):
                    entries = hearing.entries(source, clip, speed)
                    if entries is None:
                        continue
                    version = make_version(features, speed, durations, [entry for entry in entries if entry])
                    tokens[index, place] = count_tokens(version, stack_factor)
                    one_window[index, place] = is_one_window(version)
                    seconds[index, place], exists[index, place] = version.seconds, True
                    places[index, place], starts[index, place] = number, len(names)
                    names += version.names
                    place += 1
                on_row(index + 1)
        kept = exists[:, 0]
        lengths = Lengths(texts.tokens, texts.ctc_tokens, tokens, exists, one_window, seconds, num_recordings)
        self.lengths = lengths[kept]
        self._names = np.array(names, dtype=np.bytes_)  # a quarter of the memory of strings
        self._rows, self._places, self._starts = texts.rows[kept], places[kept], starts[kept]
        self.seconds = float((seconds[:, 0] * np.array(source.speeds)[places[:, 0]])[kept].sum())
        """Of all recordings, at speed 1."""

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, number: int) -> Example:
        """One of the rows, counted from 0."""
        clip = self.source.clips[int(self._rows[number])]
        example = self.source.maker.example(clip)
        durations = [duration for _, duration in self.source.recordings(clip)]
        for place in np.flatnonzero(self.lengths.exists[number]).tolist():
            start = int(self._starts[number, place])
            names = self._names[start : start + len(durations)] if len(self._names) else ()
            speed = self.source.speeds[int(self._places[number, place])]
            entries = [name.decode() for name in names]
            example.versions.append(make_version(self._features, speed, durations, entries))
        return example

    def fingerprint(self) -> str:
        """Of the source, of its audio where it is cached, and of the tokens of some rows, which are counted again.

        DataError when a row has other tokens than were counted.
        """
        parts = [self.source.fingerprint, hashlib.sha256(self._names.tobytes()).hexdigest()]
        for number in np.unique(np.linspace(0, len(self) - 1, SAMPLE_ROWS).astype(int)) if len(self) else ():
            example = self.example(int(number))
            counted = self.lengths.text_tokens[number, : len(example.prompts)].tolist()
            found = [len(ids) - len(example.recordings) for ids, _ in example.prompts]
            if found != counted:
                raise DataError(
                    f"row {example.id} of {self.source.key} has {found} tokens, expected {counted}: the tokenizer "
                    "reads texts together otherwise than one by one; choose another language model"
                )
            parts += tokens_of(example)
        return fingerprint(parts)


def table_of(parts: Sequence[HeardRows]) -> ExampleTable:
    """All examples of a run, in the order of the sources."""
    ends = np.cumsum([len(part) for part in parts])

    def example(number: int) -> Example:
        part = int(np.searchsorted(ends, number, side="right"))
        return parts[part].example(number - int(ends[part]) + len(parts[part]))

    sources = np.repeat([part.source.maker.source for part in parts], [len(part) for part in parts])
    return ExampleTable(KeptExamples(example), join_lengths([part.lengths for part in parts]), sources.astype(np.int32))
