"""What a dataset holds and what is wrong with it, before anybody trains on it.

Distributions are of the rows' own durations; with decoding, each file is also heard, and held against its row.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from ultravox.audio.content import NO_AUDIO, Audio, audio_sha256
from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.audio.waveform import load_waveform
from ultravox.data.clip import Clip, RowFault
from ultravox.data.filters import characters_per_second, num_characters, total_seconds
from ultravox.data.quarantine import ID_TWICE
from ultravox.errors import AudioError
from ultravox.metrics.normalize import spoken_form
from ultravox.tokens import AUDIO_TOKEN

FORMAT_VERSION = 1
PLACEHOLDER = re.compile(re.escape(AUDIO_TOKEN))

# Fluent English is at 12 to 18 characters a second; outside of these, text and audio rarely belong together.
FAST_CHARACTERS_PER_SECOND = 30.0
SLOW_CHARACTERS_PER_SECOND = 2.0
MIN_SLOW_SECONDS = 2.0  # a letter or a number may well stand alone in a second
SILENT_PEAK = 0.005  # of full scale: about -46 dB
CLIPPED_SHARE = 0.01  # of the samples at full scale
DURATION_TOLERANCE = 0.02, 0.1  # share of the row's duration, and seconds

#: Kinds of findings, the gravest first; those that fail a strict inspection, and what each means.
FAULTS = {
    "unusable": "the row is damaged: no such file, no duration, recordings and messages that do not fit",
    ID_TWICE: "another row of the split has this id",
    "unreadable": "the audio cannot be decoded",
    "no text": "no letter or digit in the transcript",
    "special token": "a text holds what a tokenizer takes for the beginning or end of a turn or for a recording",
    "text in two splits": "a training text is also an evaluation text",
    "audio in two splits": "one file's content stands in two splits",
    "audio twice": "one file's content stands under two ids of a split",
    "wrong duration": "the row's duration is not the audio's",
}
DOUBTS = {
    "no audio": 'a text alone, which only the task "text" can use',
    "silent": f"no sample above {SILENT_PEAK:g} of full scale",
    "clipped": f"more than {CLIPPED_SHARE:.0%} of the samples at full scale",
    "fast": f"more than {FAST_CHARACTERS_PER_SECOND:g} characters a second",
    "slow": f"fewer than {SLOW_CHARACTERS_PER_SECOND:g} characters a second in {MIN_SLOW_SECONDS:g} s or more",
}
MEANINGS = {**FAULTS, **DOUBTS}
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """Figures of one split."""

    name: str
    num_clips: int
    seconds: float
    num_words: int
    vocabulary: int
    """Different words."""
    num_texts: int
    """Different texts."""
    num_speakers: int
    """Different ones that are named."""
    licences: dict[str, int]
    """Licence → clips."""
    languages: dict[str, float]
    """Language → seconds."""
    duration: dict[str, float]
    """`QUANTILES` of the seconds."""
    characters_per_second: dict[str, float]


@dataclass(frozen=True, slots=True)
class Finding:
    """One row that somebody should look at. `kind` is among `MEANINGS`."""

    kind: str
    split: str
    id: str
    detail: str


@dataclass(slots=True)
class Inspection:
    """All of it. `decoded` tells whether the audio was heard."""

    splits: list[SplitSummary]
    findings: list[Finding]
    decoded: bool

    @property
    def faults(self) -> list[Finding]:
        """What a strict inspection fails for."""
        return [finding for finding in self.findings if finding.kind in FAULTS]

    def counts(self) -> dict[str, int]:
        """Findings of each kind that occurs, the gravest first."""
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in MEANINGS if found[kind]}

    def to_json(self) -> dict[str, Any]:
        return {"version": FORMAT_VERSION, **asdict(self)}


def inspect_splits(
    splits: Mapping[str, Sequence[Clip]],
    *,
    faults: Mapping[str, Sequence[RowFault]] | None = None,
    decode: bool = True,
    special: re.Pattern[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look at every row, and hear every file.

    Args:
        splits: name → clips. The training splits (`training_splits`) are held against each other one.
        faults: name of a split → its rows that gave no clip.
        decode: also decode the audio; without it a row's duration is believed.
        special: what no text may hold (`data.examples.special_tokens`); None = the placeholder of a recording alone.
        on_progress: told how many clips of how many are done.
    """
    findings: list[Finding] = []
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    total, done = sum(map(len, splits.values())), 0
    for split, clips in splits.items():
        for fault in (faults or {}).get(split, ()):
            kind = fault.reason if fault.reason == ID_TWICE else "unusable"
            findings.append(Finding(kind, split, fault.name, str(fault)))
        for clip in clips:
            found = _of_text(clip) + _of_tokens(clip, special or PLACEHOLDER)
            for audio, seconds in [(clip.audio, clip.duration), *clip.more_audio]:
                found += _of_audio(audio, seconds, decode)
                if digest := _digest(audio):
                    places[digest].append((split, clip.id))
            findings += [Finding(kind, split, clip.id, detail) for kind, detail in found]
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    findings += _repeated_audio(places) + _shared_texts(splits)
    order = list(MEANINGS)
    findings.sort(key=lambda finding: order.index(finding.kind))
    return Inspection([_summary(name, clips) for name, clips in splits.items()], findings, decode)


def _of_text(clip: Clip) -> list[tuple[str, str]]:
    if clip.messages is not None:
        return []
    if not num_characters(clip.text):
        return [("no text", repr(clip.text))]
    if clip.audio == NO_AUDIO:
        return [("no audio", clip.text)]
    rate = characters_per_second(clip)
    if rate > FAST_CHARACTERS_PER_SECOND:
        return [("fast", f"{rate:.1f} characters a second")]
    if rate < SLOW_CHARACTERS_PER_SECOND and clip.duration >= MIN_SLOW_SECONDS:
        return [("slow", f"{rate:.1f} characters a second")]
    return []


def _of_tokens(clip: Clip, special: re.Pattern[str]) -> list[tuple[str, str]]:
    """Of the transcript, the answer and each turn; a conversation's placeholders were counted on reading."""
    texts = [clip.text, clip.answer or "", *(turn["content"].replace(AUDIO_TOKEN, "") for turn in clip.messages or ())]
    found = [match[0] for text in texts if (match := special.search(text))]
    return [("special token", f"{found[0]} as a text")] if found else []


def _of_audio(audio: Audio, declared: float, decode: bool) -> list[tuple[str, str]]:
    if not decode or audio == NO_AUDIO:
        return []
    try:
        waveform = load_waveform(audio)
    except AudioError as error:
        return [("unreadable", str(error))]
    found = []
    seconds, loudness = len(waveform) / SAMPLE_RATE, np.abs(waveform)
    share, slack = DURATION_TOLERANCE
    if abs(seconds - declared) > share * declared + slack:
        found.append(("wrong duration", f"{declared:.2f} s in the row, {seconds:.2f} s of audio"))
    if loudness.max() < SILENT_PEAK:
        found.append(("silent", f"peak {loudness.max():.4f}"))
    if (clipped := float((loudness >= 0.999).mean())) > CLIPPED_SHARE:
        found.append(("clipped", f"{clipped:.1%} of the samples"))
    return found


def _digest(audio: Audio) -> str | None:
    """What tells a recording from every other; None where there is none, which is found elsewhere."""
    try:
        return None if audio == NO_AUDIO else audio_sha256(audio)
    except AudioError:
        return None


def _repeated_audio(places: Mapping[str, Sequence[tuple[str, str]]]) -> list[Finding]:
    findings = []
    for same in places.values():
        (first_split, first_id), *others = same
        for split, clip_id in others:
            kind = "audio twice" if split == first_split else "audio in two splits"
            findings.append(Finding(kind, split, clip_id, f"as {first_id} of {first_split}"))
    return findings


def _shared_texts(splits: Mapping[str, Sequence[Clip]]) -> list[Finding]:
    """Texts of the training splits that other splits have too, named there; compared as `spoken_form` leaves them."""
    training = training_splits(list(splits))
    first: dict[str, str] = {}
    for split in training:
        for clip in splits[split]:
            first.setdefault(spoken_form(clip.text), f"{clip.id} of {split}")
    first.pop("", None)
    return [
        Finding("text in two splits", split, clip.id, f"as {first[text]}: {clip.text}")
        for split, clips in splits.items()
        if split not in training
        for clip in clips
        if (text := spoken_form(clip.text)) in first
    ]


def training_splits(names: Sequence[str]) -> list[str]:
    """Those that are trained on, by their names ("train", "train-clean-100", "calls_train"); else the first of all."""
    return [name for name in names if "train" in name.lower()] or list(names[:1])


def _summary(name: str, clips: Sequence[Clip]) -> SplitSummary:
    words = Counter(word for clip in clips for word in spoken_form(clip.text).split())
    languages: dict[str, float] = defaultdict(float)
    for clip in clips:
        languages[clip.language or "not stated"] += total_seconds(clip)
    heard = [clip for clip in clips if clip.duration]
    return SplitSummary(
        name,
        len(clips),
        sum(map(total_seconds, clips)),
        words.total(),
        len(words),
        len({spoken_form(clip.text) for clip in clips}),
        len({clip.speaker for clip in clips} - {""}),
        dict(Counter(clip.licence or "not stated" for clip in clips).most_common()),
        dict(sorted(languages.items(), key=lambda language: -language[1])),
        _quantiles([total_seconds(clip) for clip in heard]),
        _quantiles([characters_per_second(clip) for clip in heard if clip.messages is None]),
    )


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    found = np.quantile(np.asarray(values or [0.0], dtype=float), list(QUANTILES.values()))
    return {name: round(float(value), 3) for name, value in zip(QUANTILES, found, strict=True)}


def worst_rows(inspection: Inspection, most: int) -> list[Finding]:
    """At most so many findings, of each kind in turn, so that a frequent one hides no other."""
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in inspection.findings:
        by_kind[finding.kind].append(finding)
    queues = list(by_kind.values())
    turns = [finding for turn in zip_longest(*queues) for finding in turn if finding is not None]
    return sorted(turns[:most], key=inspection.findings.index)
