"""Bundled synthetic speech: ``synthetic-en`` (sentences to transcribe) and ``spoken-requests-en`` (requests to answer).

What speaks is ``data/speak.py``; datasets of a user's own texts are made in ``data/speech_dataset.py``.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultravox.data.asterisk import NAME as ASTERISK
from ultravox.data.asterisk import fetch_asterisk_en
from ultravox.data.manifest import Clip, dataset_folder, is_whole, read_dataset, write_dataset
from ultravox.data.sources import load_clips
from ultravox.data.speak import Reading, Shard, Spoken, speak_shards
from ultravox.data.speech_dataset import Answerer
from ultravox.data.splits import HeldoutFilter, is_heldout
from ultravox.data.texts.sentences import request_texts, transcription_texts
from ultravox.data.voices import fetch_joe, voice_classes
from ultravox.files import atomic_folder, ultravox_home
from ultravox.packages import say_new_home

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


def speak_texts(texts: Sequence[str], folder: Path, name: str, seed: int) -> list[Clip]:
    """Say each text into ``folder/audio``; the clips, in the order of the texts. Uses every processor core."""
    voices = voice_classes()
    fetch_joe()  # before the threads, which would each download it
    generator = random.Random(seed)
    jobs = [
        (plan_reading(text, len(voices), generator), folder / "audio" / f"{name}-{number:05d}.flac")
        for number, text in enumerate(texts)
    ]
    shards = [Shard(seed * NUM_SHARDS + number, jobs[number::NUM_SHARDS]) for number in range(NUM_SHARDS)]
    spoken = [Spoken(0.0)] * len(jobs)
    for number, shard in enumerate(speak_shards(shards, voices, title=f"speaking {name}")):
        spoken[number::NUM_SHARDS] = shard
    return [
        Clip(path.stem, path, reading.text, one.seconds, f"{voices[reading.voice].name}@{reading.pitch:g}", LICENCE)
        for (reading, path), one in zip(jobs, spoken, strict=True)
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
    say_new_home()
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
        answers = Answerer(answered_by, answer)([clip.text for clip in clips])
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
