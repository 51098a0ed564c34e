"""Synthetic speech: ``synthetic-en`` (sentences to transcribe) and ``spoken-requests-en`` (requests to answer)."""

import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ultravox.data.asterisk import NAME as ASTERISK
from ultravox.data.asterisk import fetch_asterisk_en
from ultravox.data.manifest import Clip, dataset_folder, is_whole, read_dataset, write_dataset
from ultravox.data.sources import load_clips
from ultravox.data.splits import HeldoutFilter, is_heldout
from ultravox.data.texts.sentences import request_texts, transcription_texts
from ultravox.data.voices import Voice, fetch_joe, voice_classes
from ultravox.errors import DataError
from ultravox.files import atomic_folder, ultravox_home

SAMPLE_RATE = 16_000
LICENCE = "CC0-1.0"
ATTRIBUTION = (
    "Synthetic speech made by UltraVox. Voices: Joe (en_US-joe-medium, CC0) for Piper; Heart (Hibari, Apache-2.0, "
    "distilled from Kokoro-82M). Common English words from wordfreq (Robyn Speer, CC-BY-SA-4.0)."
)
# Sentences are dealt to a fixed number of shards, whatever the machine: a voice's readings depend on its shard's seed.
NUM_SHARDS = 4
GENERATOR_VERSION = 2  # counts up when texts or readings change, so that old folders are made anew
DEFAULT_MINUTES = 36.0
STAND_IN_MINUTES, STAND_IN_SEED = 22.0, 99
STANDARD_KEYS = {"version", "name", "licence", "attribution", "splits"}
# Mean spoken length, used only to see how many sentences fill the minutes asked for; measured on both voices.
SECONDS_PER_CHARACTER, SECONDS_PER_CLIP = 0.052, 0.95


@dataclass(frozen=True, slots=True)
class Reading:
    """How one sentence is read: ``pace`` above 1 is slower, ``pitch`` above 1 is higher with a smaller throat."""

    text: str
    voice: int
    pace: float
    pitch: float
    noise: float
    level_db: float
    lead_seconds: float
    tail_seconds: float


def plan_reading(text: str, num_voices: int, generator: random.Random) -> Reading:
    """A random reading of a text, in the range of human speakers on telephone prompts."""
    voice = generator.randrange(num_voices)
    pitch = generator.choice((1.0, 1.05, 1.1, 1.16) if voice == 0 else (0.9, 1.0, 1.0, 1.08))
    return Reading(
        text=text,
        voice=voice,
        pace=generator.uniform(0.85, 1.2),
        pitch=pitch,
        noise=generator.uniform(0.4, 0.8),
        level_db=generator.uniform(-14, -2),
        lead_seconds=generator.uniform(0.05, 0.25),
        tail_seconds=generator.uniform(0.05, 0.3),
    )


def speak_reading(voice: Voice, reading: Reading) -> np.ndarray:
    """Float32 samples [sample] at 16 kHz, peak at the reading's level, silence around it."""
    import soxr

    # Played back faster by `pitch`, which raises pitch and formants together; spoken slower by as much beforehand.
    waveform = voice.speak(reading.text, reading.pace * reading.pitch, reading.noise)
    if waveform.size == 0 or not np.abs(waveform).max() > 0:
        raise DataError(f"the voice {voice.name} said nothing for {reading.text!r}")
    waveform = soxr.resample(waveform, voice.sample_rate * reading.pitch, SAMPLE_RATE)
    waveform = waveform * (10 ** (reading.level_db / 20) / np.abs(waveform).max())
    padding = [int(seconds * SAMPLE_RATE) for seconds in (reading.lead_seconds, reading.tail_seconds)]
    return np.pad(waveform, padding).astype(np.float32)


def _speak_shard(
    shard: Sequence[tuple[Reading, Path]], seed: int, advance: Callable[[], None]
) -> list[tuple[float, str]]:
    import soundfile

    voices: dict[int, Voice] = {}
    spoken = []
    for reading, path in shard:
        if reading.voice not in voices:
            voices[reading.voice] = voice_classes()[reading.voice](seed)
        voice = voices[reading.voice]
        waveform = speak_reading(voice, reading)
        soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
        spoken.append((len(waveform) / SAMPLE_RATE, f"{voice.name}@{reading.pitch:g}"))
        advance()
    return spoken


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def speak_texts(texts: Sequence[str], folder: Path, name: str, seed: int) -> list[Clip]:
    """Say each text into ``folder/audio``; the clips, in the order of the texts. Uses every processor core."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    num_voices = len(voice_classes())
    fetch_joe()  # before the threads, which would each download it
    generator = random.Random(seed)
    (folder / "audio").mkdir(exist_ok=True)
    jobs = [
        (plan_reading(text, num_voices, generator), folder / "audio" / f"{name}-{number:05d}.flac")
        for number, text in enumerate(texts)
    ]
    spoken: list[tuple[float, str]] = [(0.0, "")] * len(jobs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(max_workers=min(NUM_SHARDS, _num_cores())) as pool,
    ):
        task = progress.add_task(f"speaking {name}", total=len(jobs))
        shards = [
            pool.submit(
                _speak_shard, jobs[number::NUM_SHARDS], seed * NUM_SHARDS + number, lambda: progress.advance(task)
            )
            for number in range(NUM_SHARDS)
        ]
        try:
            for number, shard in enumerate(shards):
                spoken[number::NUM_SHARDS] = shard.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [
        Clip(path.stem, path, reading.text, duration, speaker, LICENCE)
        for (reading, path), (duration, speaker) in zip(jobs, spoken, strict=True)
    ]


def texts_for_minutes(minutes: float, seed: int, allowed: HeldoutFilter) -> list[str]:
    """The sentences of ``synthetic-en``: as many as fill about so many minutes of speech."""
    texts: list[str] = []
    remaining = minutes * 60
    for text in transcription_texts(seed, allowed):
        if remaining <= 0:
            break
        texts.append(text)
        remaining -= SECONDS_PER_CLIP + SECONDS_PER_CHARACTER * len(text)
    return texts


def heldout_filter() -> HeldoutFilter:
    """The filter for the held-out texts of ``asterisk-en``, which is fetched when it is not there."""
    fetch_asterisk_en(make_stand_in)
    return HeldoutFilter(clip.text for clip in load_clips(ASTERISK, "heldout"))


def fetch_synthetic_en(minutes: float = DEFAULT_MINUTES, seed: int = 0) -> Path:
    """The folder of ``synthetic-en``, made on first use, and again when minutes or seed are others."""

    def texts() -> list[str]:
        return texts_for_minutes(minutes, seed, heldout_filter())

    return _fetch("synthetic-en", {"minutes": minutes, "seed": seed}, texts, lambda text: "train")


def fetch_spoken_requests_en(seed: int = 0) -> Path:
    """The folder of ``spoken-requests-en``, made on first use; its answers are added by ``add_answers``."""

    def texts() -> list[str]:
        return request_texts(seed, heldout_filter())

    return _fetch("spoken-requests-en", {"seed": seed}, texts, lambda text: "heldout" if is_heldout(text) else "train")


def make_stand_in(folder: Path) -> None:
    """Fill a folder with synthetic clips under the name ``asterisk-en``, for machines without Debian's packages."""
    texts = texts_for_minutes(STAND_IN_MINUTES, STAND_IN_SEED, HeldoutFilter([]))
    _write(folder, ASTERISK, {"stand_in": True}, texts, lambda text: "heldout" if is_heldout(text) else "train")


def _fetch(
    name: str, settings: dict[str, Any], texts: Callable[[], Sequence[str]], split_of: Callable[[str], str]
) -> Path:
    folder = ultravox_home() / "data" / name
    settings = {"generator": GENERATOR_VERSION, **settings}
    if is_whole(folder) and read_dataset(folder).get("settings") == settings:
        return folder
    sentences = texts()
    with atomic_folder(folder) as target:
        _write(target, name, settings, sentences, split_of)
    return folder


def _write(
    folder: Path, name: str, settings: dict[str, Any], texts: Sequence[str], split_of: Callable[[str], str]
) -> None:
    clips = speak_texts(texts, folder, name, settings.get("seed", STAND_IN_SEED))
    splits: dict[str, list[Clip]] = {}
    for clip in clips:
        splits.setdefault(split_of(clip.text), []).append(clip)
    write_dataset(
        folder, name=name, licence=LICENCE, attribution=ATTRIBUTION, splits=splits, extra={"settings": settings}
    )


def add_answers(source: str | Path, answer: Callable[[list[str]], list[str]], answered_by: str) -> Path:
    """Write into each clip of a dataset what a language model answers to its text; the model's name is kept.

    ``answer`` maps texts to answers, one each. Nothing is done when the dataset was answered by that model already.
    """
    folder, info = dataset_folder(source), read_dataset(source)
    if info.get("answered_by") == answered_by:
        return folder
    splits: dict[str, list[Clip]] = {}
    for split in info["splits"]:
        clips = load_clips(folder, split)
        answers = answer([clip.text for clip in clips])
        if len(answers) != len(clips):
            raise DataError(f"{len(clips)} requests got {len(answers)} answers from {answered_by}: expected one each")
        splits[split] = [replace(clip, answer=text) for clip, text in zip(clips, answers, strict=True)]
    extra = {key: value for key, value in info.items() if key not in STANDARD_KEYS}
    write_dataset(
        folder,
        name=info["name"],
        licence=info["licence"],
        attribution=info["attribution"],
        splits=splits,
        extra={**extra, "answered_by": answered_by},
    )
    return folder
