"""What the tasks on speech train on: the rows of all sources with their tokens, and their features at each speed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ultravox.audio.content import Audio
from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.audio.waveform import load_waveform
from ultravox.config.data import SourceConfig
from ultravox.config.schema import RunConfig, StageConfig
from ultravox.data.cache import CacheReport, FeatureRequest, SizeCap
from ultravox.data.examples import TokenisedExample, tokenise
from ultravox.data.filters import Filters
from ultravox.data.fingerprint import fingerprint, uid
from ultravox.data.manifest import Clip
from ultravox.data.quarantine import Quarantine, audio_fault
from ultravox.data.source import SourceSpec
from ultravox.data.sources import load_source
from ultravox.data.streaming import ROWS_TO_JUDGE
from ultravox.data.templates import PromptTemplate, UnusableRow
from ultravox.errors import AudioError, DataError
from ultravox.metrics.normalize import normalize_english, spoken_form
from ultravox.training.features import Features
from ultravox.training.progress import bar

if TYPE_CHECKING:
    from ultravox.training.stream import SpeechStream

#: Clips of this length are looked at while training, where there are enough.
PROGRESS_SECONDS = (1.0, 6.0)


@dataclass(slots=True)
class Version:
    """An example at one speed."""

    speed: float
    seconds: float
    """Of all its recordings."""
    frames: list[list[int]]
    """Encoder frames of each window of each recording."""
    names: list[str] = field(default_factory=list)
    """Entry of the cache for each recording; empty without a cache."""


@dataclass(slots=True)
class Example:
    """One row of a source, tokenised once."""

    id: str
    uid: str
    source: int
    """Index in data.sources."""
    text: str
    recordings: list[Audio]
    prompts: list[TokenisedExample]
    """For each prompt: the conversation with one placeholder per recording, and True on what the assistant says."""
    transcript: np.ndarray
    """Tokens of the text alone, [token]."""
    versions: list[Version] = field(default_factory=list)


@dataclass(slots=True)
class SpeechData:
    """All examples of a run, those kept out for a look at progress, and how they were come by."""

    sources: list[SourceConfig]
    temperature: float | None
    examples: list[Example]
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
    sizes: dict[str, int]
    """Source → clips; 0 for a stream, which has no total."""
    seconds: float
    """Of audio, at speed 1."""
    trainable: dict[str, torch.nn.Parameter]
    """What trains in any stage of the run."""
    stream: "SpeechStream | None" = None
    """Where the examples come from while training, when they are not here."""
    epoch: int = 0
    """Of a stream: the last one that rows were looked at in."""

    def uses_cache(self, stage: StageConfig) -> bool:
        """Whether a stage reads the cache, or decodes in every epoch."""
        return self.cached and not stage.augment.waveform.active

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
        versions = sum(len(example.versions) for example in self.examples)
        quarantined = [f"{len(files)} {reason} ({files[0]})" for reason, files in self.quarantine.reasons.items()]
        left_out = f", left out {', '.join(quarantined)}" if quarantined else ""
        minutes = f"{self.seconds / 60:.0f} min of speech"
        return f"{len(self.examples)} clips ({minutes}, {versions} versions with their speeds){left_out}"


def prepare_speech(config: RunConfig, model: Any, processor: Any) -> SpeechData:
    """Load the rows of all sources, keep a few out, cache features, tokenise.

    Raises:
        DataError: too many rows that cannot be used, or none left; a prompt that names a missing column.
    """
    data = config.data
    quarantine = Quarantine()
    rows: list[Sourced] = []
    parts: dict[str, list[str]] = {}
    templates: list[PromptTemplate] = []
    num_rows = 0
    for index, source in enumerate(data.sources):
        loaded = load_source(source_spec(source))
        templates.append(PromptTemplate(source.task, source.prompts, source.response))
        templates[-1].require_columns(loaded.clips, f"source {source.name}")
        num_rows += loaded.num_rows
        for reason, names in loaded.left_out.items():
            for name in names:
                quarantine.add_row(reason, name, source_place(index))
        parts[source_key(source)] = [loaded.fingerprint]
        rows += [(index, clip) for clip in loaded.clips]
    cached = data.cache == "auto" and any(not stage.augment.waveform.active for stage in config.stages)
    features = Features(model, data.feature_dtype, config.model.audio_encoder)
    limits = audio_limits(config, features)
    progress, training = _keep_out(data.sources, rows, config.evaluation.num_progress_clips)
    if not cached:
        progress = [(index, clip) for index, clip in progress if _is_heard(clip, limits, quarantine)]

    # Text before audio: what is wrong with it is found out before hours of encoding
    found: dict[int, Example] = {}
    for index, clip in [*training, *progress]:
        key = source_key(data.sources[index])
        try:
            name = f"{key} {parts[key][0]}"
            found[id(clip)] = make_example(index, clip, templates[index], processor, config, name)
            parts[key] += tokens_of(found[id(clip)])
        except UnusableRow as error:
            quarantine.add_row(error.reason, clip.id, source_place(index))
    quarantine.require(data.max_quarantine_share, num_rows)

    wanted = [(i, clip, speed) for i, clip in training for speed in data.sources[i].speeds or data.speeds]
    wanted = [choice for choice in [*wanted, *((i, clip, 1.0) for i, clip in progress)] if id(choice[1]) in found]
    heard = [templates[index].recordings(clip) for index, clip, _ in wanted]
    requests = [FeatureRequest(a, s, wish[2]) for wish, many in zip(wanted, heard, strict=True) for a, s in many]
    report = _cache(config, features, requests, limits) if cached else _check(limits, requests)
    users = [(index, clip.id) for (index, clip, _), recordings in zip(wanted, heard, strict=True) for _ in recordings]
    _set_aside_rows(quarantine, report, requests, users)
    quarantine.require(data.max_quarantine_share, num_rows)

    remaining = iter(report.names)
    for (index, clip, speed), recordings in zip(wanted, heard, strict=True):
        mine = list(islice(remaining, len(recordings)))
        usable = [name for name in mine if name is not None]
        parts[source_key(data.sources[index])] += [name or "" for name in mine]
        if len(usable) == len(mine):
            found[id(clip)].versions.append(make_version(features, speed, [s for _, s in recordings], usable))
    examples = [found[id(clip)] for _, clip in training if id(clip) in found and found[id(clip)].versions]
    if not examples:
        raise DataError("no clip is left to train on: check data.sources and the length limits")
    return SpeechData(
        data.sources,
        data.temperature,
        examples,
        [found[id(clip)] for _, clip in progress if id(clip) in found and found[id(clip)].versions],
        features,
        cached,
        report,
        quarantine,
        data.max_quarantine_share,
        *limits,
        num_rows,
        {key: fingerprint(strings) for key, strings in parts.items()},
        {source_key(source): sum(e.source == i for e in examples) for i, source in enumerate(data.sources)},
        sum(example.versions[0].seconds * example.versions[0].speed for example in examples),
        {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad},
    )


def make_version(features: Features, speed: float, seconds: list[float], names: list[str]) -> Version:
    """A row at one speed, from its recordings' seconds and their entries in the cache ("" without one)."""
    if any(names):
        frames = [features.cached_frames(name) for name in names]
    else:
        frames = [features.expected_frames(round(duration / speed * SAMPLE_RATE)) for duration in seconds]
    return Version(speed, sum(seconds) / speed, frames, [name for name in names if name])


def audio_limits(config: RunConfig, features: Features) -> tuple[float, float]:
    """Seconds of the shortest and the longest recording that are used: as asked for, and no shorter than a frame."""
    data = config.data
    speed = max(max(source.speeds or data.speeds) for source in data.sources)
    changed = 1 + max(stage.augment.waveform.speed for stage in config.stages)
    return max(data.min_audio_seconds, features.min_seconds(speed * changed)), data.max_audio_seconds


def source_place(index: int) -> str:
    """Which of data.sources a row is of, where two have rows of one name."""
    return f"source {index + 1}"


def _set_aside_rows(
    quarantine: Quarantine,
    report: CacheReport,
    requests: Sequence[FeatureRequest],
    rows: Sequence[tuple[int, str]],
) -> None:
    """Count every row that lacks a recording: a file's first goes by the file's name, others by their own as well.

    Args:
        quarantine: of the run.
        report: of the requests; it names each file once.
        requests: for recordings.
        rows: source and id of the row of each request.
    """
    users: dict[str, dict[tuple[int, str], None]] = {}
    for name, request, row in zip(report.names, requests, rows, strict=True):
        if name is None:
            users.setdefault(str(request.audio), {})[row] = None
    for reason, files in report.quarantined.items():
        for file in files:
            quarantine.add(reason, file)
            for index, row_id in list(users.get(file, ()))[1:]:
                quarantine.add(reason, f"{file} ({row_id}, {source_place(index)})")


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


def _check(limits: tuple[float, float], requests: list[FeatureRequest]) -> CacheReport:
    """Without a cache: an entry is called "", and a recording's length is believed until the loader decodes it."""
    low, high = limits
    report = CacheReport(names=[""] * len(requests))
    for index, request in enumerate(requests):
        reason = "too short" if request.seconds < low else "too long" if request.seconds > high else None
        if reason is None and isinstance(request.audio, Path) and not request.audio.is_file():
            reason = "missing audio"
        if reason:
            report.quarantine.add(reason, str(request.audio))
            report.names[index] = None
    return report


def _is_heard(clip: Clip, limits: tuple[float, float], quarantine: Quarantine) -> bool:
    """Whether a clip can be decoded; if not, it is set aside. Without a cache, nothing else tells it beforehand."""
    try:
        load_within(clip.audio, *limits)
    except AudioError as error:
        quarantine.add(audio_fault(error, clip.audio), clip.id)
        return False
    return True


def load_within(audio: Audio, min_seconds: float, max_seconds: float) -> np.ndarray:
    """`load_waveform`; AudioError also when the recording is shorter than its row may have said."""
    waveform = load_waveform(audio, max_seconds=max_seconds)
    if (seconds := len(waveform) / SAMPLE_RATE) < min_seconds:
        raise AudioError(f"{audio} is too short: {seconds:g} s, expected {min_seconds:g} s or more")
    return waveform


def source_spec(source: SourceConfig) -> SourceSpec:
    filters = Filters(**source.filters.model_dump())
    names = ("name", "format", "split", "subset", "revision", "streaming", "columns", "max_clips", "max_hours")
    options = {name: getattr(source, name) for name in names}
    return SourceSpec(**options, filters=filters, needs_audio=source.task != "text")


def source_key(source: SourceConfig) -> str:
    """What a source is called among the fingerprints; no two of a run are called the same."""
    subset = f"/{source.subset}" if source.subset else ""
    return f"{source.name}{subset}/{source.split}/{source.task}"


def tokens_of(example: Example) -> list[str]:
    """An example's tokens, for the fingerprint of its source."""
    arrays = [example.transcript, *(array for prompt in example.prompts for array in prompt)]
    return [array.tobytes().hex() for array in arrays]


Sourced = tuple[int, Clip]
"""Index of a source, and one of its rows."""


def _keep_out(sources: Sequence[SourceConfig], rows: list[Sourced], count: int) -> tuple[list[Sourced], list[Sourced]]:
    """A fixed few clips of the first transcribed source for "WER so far", chosen by hash; and all without their texts.

    They come from the training split, at most a tenth of it: the held-out split stays unseen. Clips of a few words are
    preferred, since one long clip would be most of the words and of the time that decoding takes.
    """
    first = next((index for index, source in enumerate(sources) if source.task == "transcription"), None)
    candidates = [(index, clip) for index, clip in rows if index == first and normalize_english(clip.text)]
    candidates.sort(key=lambda pair: hashlib.sha256(pair[1].id.encode()).digest())
    count = min(count, len(candidates) // 10)
    handy = [pair for pair in candidates if PROGRESS_SECONDS[0] <= pair[1].duration <= PROGRESS_SECONDS[1]]
    progress = (handy if len(handy) >= count else candidates)[:count]
    texts = {normalize_english(clip.text) for _, clip in progress}
    return progress, [(index, clip) for index, clip in rows if normalize_english(clip.text) not in texts]


def make_example(
    index: int, clip: Clip, template: PromptTemplate, processor: Any, config: RunConfig, source_fingerprint: str
) -> Example:
    """The example of a row. UnusableRow when there can be none."""
    style, tokenizer = config.data.transcript_style, processor.tokenizer
    is_text = bool(normalize_english(clip.text))
    if not is_text and "text" in template.columns_needed:
        raise UnusableRow("without text", clip.id)
    text = spoken_form(clip.text) if style == "spoken" else clip.text
    styled = replace(clip, text=text)
    prompts = [
        tokenise(styled, template, prompt, tokenizer, processor.audio_token_index)
        for prompt in range(template.num_prompts)
    ]
    # With a space in front, a word is the same token at the beginning as in the middle: CTC has fewer to tell apart.
    transcript = np.asarray(tokenizer.encode(f" {text}", add_special_tokens=False) if is_text else [], dtype=np.int64)
    recordings = [audio for audio, _ in template.recordings(clip)]
    return Example(clip.id, uid(source_fingerprint, clip.id), index, clip.text, recordings, prompts, transcript)
