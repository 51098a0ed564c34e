"""What the tasks on speech train on: the rows of all sources with their tokens, and their features at each speed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ultravox.config.data import SourceConfig
from ultravox.config.schema import RunConfig, StageConfig
from ultravox.data.cache import CacheReport, FeatureRequest, SizeCap
from ultravox.data.clip import Clip
from ultravox.data.quarantine import Quarantine, audio_fault
from ultravox.data.streaming import ROWS_TO_JUDGE
from ultravox.data.templates import UnusableRow
from ultravox.errors import AudioError, DataError
from ultravox.model.configuration import CTC_PROJECTORS
from ultravox.training.examples import Example, ExampleTable, make_version, unique_tokens
from ultravox.training.features import Features
from ultravox.training.progress import bar
from ultravox.training.rows import (
    HeardRows,
    Hearing,
    SourceRows,
    count_texts,
    keep_out,
    load_within,
    read_sources,
    requests_of,
    source_place,
    table_of,
)

if TYPE_CHECKING:
    from ultravox.training.stream import SpeechStream


@dataclass(slots=True)
class SpeechData:
    """All examples of a run, those kept out for a look at progress, and how they were come by."""

    sources: list[SourceConfig]
    temperature: float | None
    examples: ExampleTable
    """In the order of the sources; none of a stream."""
    progress_examples: list[Example]
    features: Features
    cached: bool
    """Whether the features of all examples are in the cache."""
    cache_report: CacheReport
    """What had to be encoded."""
    quarantine: Quarantine
    max_quarantine_share: float
    min_audio_seconds: float
    max_audio_seconds: float
    num_rows: int
    """Of all sources, before any was set aside; of a stream, those that were looked at since this process began."""
    fingerprints: dict[str, str]
    """Source → hash of its clips, their audio and their tokens: what a resume must find unchanged."""
    vocabularies: list[np.ndarray]
    """Of each source: the token ids of its transcripts, where a stage wants them; none of a stream."""
    sizes: dict[str, int]
    """Source → clips; 0 for a stream, which has no total."""
    seconds: float
    """Of audio, at speed 1."""
    trainable: dict[str, torch.nn.Parameter]
    """What trains in any stage of the run."""
    stream: "SpeechStream | None" = None
    """Where the examples come from while training, when they are not here."""
    num_same_text: int = 0
    """Rows that are not trained on since a clip that is kept out has their text."""
    epoch: int = 0
    """Of a stream: the last one that rows were looked at in."""

    def uses_cache(self, stage: StageConfig) -> bool:
        """Whether a stage reads the cache, or decodes in every epoch."""
        return self.cached and not stage.decodes

    def set_aside(self, faults: Sequence[tuple[str, str]], num_rows: int = 0, epoch: int = 0) -> None:
        """Take note of recordings that turned out to be unusable: reasons and names. DataError when too many are.

        Of a stream, `num_rows` more were looked at, in this `epoch`; in its first, a few rows are judged as if those to
        come were good.
        """
        if self.stream is not None and epoch > self.epoch:
            self.quarantine.require(self.max_quarantine_share, self.num_rows)  # of the whole epoch before
            self.epoch = epoch
        self.num_rows += num_rows
        for reason, name in faults:
            self.quarantine.add(reason, name)
        if faults:
            coming = max(0, ROWS_TO_JUDGE - self.num_rows) if self.stream is not None and epoch == 0 else 0
            self.quarantine.require(self.max_quarantine_share, self.num_rows, coming=coming)

    def describe(self) -> str:
        """What there is to train on, in one line."""
        if self.stream is not None:
            return self.stream.describe()
        versions = int(self.examples.lengths.exists.sum())
        quarantined = [f"{len(files)} {reason} ({files[0]})" for reason, files in self.quarantine.reasons.items()]
        left_out = f", left out {', '.join(quarantined)}" if quarantined else ""
        minutes = f"{self.seconds / 60:.0f} min of speech"
        same = f" and {self.num_same_text} rows with their texts" if self.num_same_text else ""
        kept_out = (
            f', kept out {len(self.progress_examples)} clips for "WER so far"{same}' if self.progress_examples else ""
        )
        return f"{len(self.examples)} clips ({minutes}, {versions} versions with their speeds){kept_out}{left_out}"


def prepare_speech(config: RunConfig, model: Any, processor: Any) -> SpeechData:
    """Read the rows of all sources, keep a few out, tokenise, cache features.

    Raises:
        DataError: too many rows that cannot be used, or none left; a prompt that names a missing column.
    """
    data = config.data
    quarantine = Quarantine()
    sources, num_rows = read_sources(config, processor, quarantine)
    cached = data.cache == "auto" and any(not stage.decodes for stage in config.stages)
    features = Features(model, data.feature_dtype, config.model.audio_encoder)
    limits = audio_limits(config, features)
    progress, training = keep_out(sources, config.evaluation.num_progress_clips)
    num_same_text = sum(len(source.clips) for source in sources) - sum(map(len, training)) - len(progress)
    if not cached:
        progress = [(source, clip) for source, clip in progress if _is_heard(clip, limits, quarantine)]

    # Text before audio: what is wrong with it is found out before hours of encoding
    scores_rows = config.model.projector in CTC_PROJECTORS
    aligns = any(stage.objective == "align" for stage in config.stages)
    texts = [
        count_texts(source, rows, processor.tokenizer, quarantine, ctc=aligns or scores_rows)
        for source, rows in zip(sources, training, strict=True)
    ]
    if scores_rows and len(spoken := unique_tokens([text.vocabulary for text in texts])):
        model.choose_rows(torch.from_numpy(spoken))
    watched = _make_all(progress, quarantine)
    quarantine.require(data.max_quarantine_share, num_rows)

    if cached:
        requests = [wish for part, text in zip(sources, texts, strict=True) for wish in requests_of(part, text.rows)]
        requests += [FeatureRequest(audio, seconds) for s, clip, _ in watched for audio, seconds in s.recordings(clip)]
        report = _cache(config, features, requests, limits)
        names = iter(report.names)
        hearing = Hearing(lambda _: next(names))
    else:
        report = CacheReport([])
        hearing = Hearing(_believer(limits, report.quarantine))
    stack_factor = model.config.stack_factor
    heard = [
        HeardRows(source, text, hearing, features, stack_factor) for source, text in zip(sources, texts, strict=True)
    ]
    progress_examples = []
    for source, clip, example in watched:
        entries = hearing.entries(source, clip, 1.0)
        if entries is not None:
            durations = [seconds for _, seconds in source.recordings(clip)]
            example.versions.append(make_version(features, 1.0, durations, [entry for entry in entries if entry]))
            progress_examples.append(example)
    hearing.set_aside(quarantine, report.quarantined)
    quarantine.require(data.max_quarantine_share, num_rows)
    if not any(map(len, heard)):
        raise DataError("no clip is left to train on: check data.sources and the length limits")
    return SpeechData(
        data.sources,
        data.temperature,
        table_of(heard),
        progress_examples,
        features,
        cached,
        report,
        quarantine,
        data.max_quarantine_share,
        *limits,
        num_rows,
        {part.source.key: part.fingerprint() for part in heard},
        [text.vocabulary for text in texts],
        {part.source.key: len(part) for part in heard},
        sum(part.seconds for part in heard),
        trainable_of(model),
        num_same_text=num_same_text,
    )


def trainable_of(model: Any) -> dict[str, torch.nn.Parameter]:
    """What trains in any stage of a run, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _make_all(
    progress: Sequence[tuple[SourceRows, Clip]], quarantine: Quarantine
) -> list[tuple[SourceRows, Clip, Example]]:
    """The clips that are kept out, with their examples."""
    made = []
    for source, clip in progress:
        try:
            example = source.maker.example(clip)
            example.prompts = list(example.prompts)
            made.append((source, clip, example))
        except UnusableRow as error:
            quarantine.add_row(error.reason, error.name, source_place(source.maker.source))
    return made


def audio_limits(config: RunConfig, features: Features) -> tuple[float, float]:
    """Seconds of the shortest and the longest recording that are used: as asked for, and no shorter than a frame."""
    data = config.data
    speed = max(max(source.speeds or data.speeds) for source in data.sources)
    changed = 1 + max(stage.augment.waveform.speed for stage in config.stages)
    return max(data.min_audio_seconds, features.min_seconds(speed * changed)), data.max_audio_seconds


def _cache(
    config: RunConfig, features: Features, requests: list[FeatureRequest], limits: tuple[float, float]
) -> CacheReport:
    """Compute the features that are not cached yet."""
    data = config.data
    with bar("computing log-mel features" if features.trains else "encoding speech once") as on_progress:
        return features.cache.build(
            requests,
            features.encode,
            min_seconds=limits[0],
            max_seconds=limits[1],
            cap=SizeCap(round(data.max_cache_gb * 1e9), features.steps_per_second) if data.max_cache_gb else None,
            on_progress=on_progress,
        )


def _believer(limits: tuple[float, float], quarantine: Quarantine) -> Callable[[FeatureRequest], str | None]:
    """Without a cache: an entry is called "", and a recording's length is believed until the loader decodes it."""
    low, high = limits

    def entry(request: FeatureRequest) -> str | None:
        reason = "too short" if request.seconds < low else "too long" if request.seconds > high else None
        if reason is None and isinstance(request.audio, Path) and not request.audio.is_file():
            reason = "missing audio"
        if reason:
            quarantine.add(reason, str(request.audio))
        return None if reason else ""

    return entry


def _is_heard(clip: Clip, limits: tuple[float, float], quarantine: Quarantine) -> bool:
    """Whether a clip can be decoded; if not, it is set aside. Without a cache, nothing else tells it beforehand."""
    try:
        load_within(clip.audio, *limits)
    except AudioError as error:
        quarantine.add(audio_fault(error, clip.audio), clip.id)
        return False
    return True
