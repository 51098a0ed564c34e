"""A dataset folder from texts: who says what, answers from a language model, where every row comes from.

The folder is worked in where it will stay: audio and a journal first, ``dataset.json`` at the very end. Killed at any
moment, it goes on with the next call, and comes to the same bytes.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ultravox.data.casting import NOT_STATED, CastVoice, draw_readings, shard_seed
from ultravox.data.journal import Journal, first_difference
from ultravox.data.manifest import DATASET_FILE, Clip, is_whole, read_dataset, write_dataset
from ultravox.data.speak import Reading, Shard, Spoken, speak_shards
from ultravox.data.splits import HeldoutFilter, is_heldout
from ultravox.data.texts.items import LeftOut, SpokenText, TextSource, select_texts
from ultravox.errors import DataError
from ultravox.files import atomic_write

JOURNAL = "journal.jsonl"
QUARANTINE = "quarantine.jsonl"
GENERATOR_VERSION = 1  # counts up when the same settings come to other bytes
ANSWERS = "answers"  # of these parts in a journal
ANSWER_BATCH = 64  # texts between two notes in the journal

Answer = Callable[[list[str]], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Answerer:
    """A language model that replies to texts, one answer each; ``name`` says all that its answers depend on."""

    name: str
    answer: Answer

    def __call__(self, texts: list[str]) -> list[str]:
        """One answer to each text, or a DataError."""
        answers = list(self.answer(texts))
        if len(answers) != len(texts):
            raise DataError(f"{len(texts)} requests got {len(answers)} answers from {self.name}: expected one each")
        return answers


@dataclass(frozen=True, slots=True)
class Recipe:
    """How texts become a dataset.

    Args:
        voices: who speaks.
        speeds: how fast; 1.1 = faster.
        readings: of each text, drawn among voices × speeds by the text and the seed; None = all of them.
        num_texts: how many texts to take; None = all.
        seed: of draws and of the variation between readings.
        max_characters: longer texts are left out.
        max_seconds: longer speech is quarantined.
        max_quarantine_share: more quarantined readings than this share of all are an error.
        licence: of texts that state none themselves.
        language: of texts that state none themselves.
        hold_out: put one text in five, chosen by its words, into the split "heldout".
    """

    voices: Sequence[CastVoice]
    speeds: Sequence[float] = (1.0,)
    readings: int | None = None
    num_texts: int | None = None
    seed: int = 0
    max_characters: int = 400
    max_seconds: float = 30.0
    max_quarantine_share: float = 0.01
    licence: str = NOT_STATED
    language: str = ""
    hold_out: bool = False

    def settings(self) -> dict[str, Any]:
        """All of it, as JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "voices"}
        return {**plain, "speeds": list(self.speeds), "voices": [voice.settings() for voice in self.voices]}


@dataclass(frozen=True, slots=True)
class _Row:
    """One reading of one text: a clip to be."""

    id: str
    text: SpokenText
    voice: CastVoice
    voice_number: int
    speed: float


def make_speech_dataset(
    folder: Path,
    source: TextSource,
    recipe: Recipe,
    *,
    allowed: HeldoutFilter | None = None,
    answerer: Answerer | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make a dataset folder, or go on with one; nothing is done when it is there already.

    Args:
        folder: named as the dataset.
        source: the texts.
        recipe: how they become speech.
        allowed: refuses held-out texts.
        answerer: answers the texts that have no answer of their own.
        workers: readings made at once; None = one for each processor core. It changes no result.
        overwrite: remove a dataset that is there, once the texts are known to be good.

    Returns:
        The content of ``dataset.json``.

    Raises:
        DataError: no usable text; the folder holds something else, or other settings; too many readings failed.
        NetworkError: a server cannot be reached. What was made stays, and the next call goes on.
    """
    folder = folder.absolute()
    allowed = allowed or HeldoutFilter([])
    settings = {
        "generator": GENERATOR_VERSION,
        "texts": source.settings(),
        **recipe.settings(),
        "heldout": allowed.digest,
        "answers": answerer.name if answerer else None,
    }
    settings = json.loads(json.dumps(settings))
    if overwrite:
        _require_dataset(folder)
    elif (info := _finished(folder, settings)) is not None:
        return info
    chosen = None if source.costly else _choose(source, None, recipe, allowed)
    if chosen is not None:  # what is wrong with the texts is found before anything is written
        list(_rows(chosen[0], folder.name, recipe))
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    journal = Journal(folder / JOURNAL, settings)
    try:
        for half_written in folder.rglob(".*"):  # what a kill left of atomic writes
            half_written.unlink()
        texts, left_out = chosen or _choose(source, journal, recipe, allowed)
        texts, unanswered = _answered(texts, answerer, journal, recipe)
        rows = list(_rows(texts, folder.name, recipe))
        shards, order = _shards(rows, folder, recipe.seed)
        spoken = speak_shards(
            shards,
            [voice.make for voice in recipe.voices],
            title=f"speaking {folder.name}",
            workers=workers,
            max_seconds=recipe.max_seconds,
            max_faults=int(recipe.max_quarantine_share * len(rows)),
            journal=journal,
        )
        _write(folder, settings, recipe, rows, _in_order(shards, order, spoken), left_out + unanswered, answerer)
        (folder / JOURNAL).unlink()
    finally:
        journal.close()
    return read_dataset(folder)


def _require_dataset(folder: Path) -> None:
    """DataError when what is to be overwritten is no dataset, finished or not."""
    is_dataset = folder.is_dir() and ((folder / DATASET_FILE).is_file() or (folder / JOURNAL).is_file())
    if folder.exists() and not is_dataset:
        raise DataError(f"{folder} is no dataset, so it is not overwritten: choose another place")


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What ``dataset.json`` says when the folder is whole and of these settings; None when there is work to do."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: choose another place")
    if not (folder / DATASET_FILE).is_file():
        if folder.is_dir() and any(folder.iterdir()) and not (folder / JOURNAL).is_file():
            raise DataError(f"{folder} holds other files: choose another place")
        return None
    info = read_dataset(folder)
    if difference := first_difference(info.get("settings", {}), settings):
        raise DataError(f"{folder} was made with {difference}: choose another place, or --overwrite it")
    if not is_whole(folder):
        (folder / DATASET_FILE).unlink()  # its journal is gone: all of it is made again
        return None
    (folder / JOURNAL).unlink(missing_ok=True)  # a kill came between the two
    return info


def _choose(
    source: TextSource, journal: Journal | None, recipe: Recipe, allowed: HeldoutFilter
) -> tuple[list[SpokenText], list[LeftOut]]:
    """The texts to be spoken, with licence and language, and those that are not."""
    texts, left_out = select_texts(source.texts(journal), recipe.num_texts, allowed, recipe.max_characters)
    completed = [
        replace(text, licence=text.licence or recipe.licence, language=text.language or recipe.language)
        for text in texts
    ]
    return completed, left_out


def _answered(
    texts: list[SpokenText], answerer: Answerer | None, journal: Journal, recipe: Recipe
) -> tuple[list[SpokenText], list[LeftOut]]:
    """The texts with answers, those of their own first; and those that the language model has nothing to say to."""
    if answerer is None:
        return texts, []
    wanting = [number for number, text in enumerate(texts) if text.answer is None]
    answered, silent = list(texts), []
    for part, start in enumerate(range(0, len(wanting), ANSWER_BATCH)):
        numbers = wanting[start : start + ANSWER_BATCH]
        answers = journal.get(ANSWERS, part)
        if answers is None:
            answers = answerer([texts[number].text for number in numbers])
            journal.add(ANSWERS, part, answers)
        for number, answer in zip(numbers, answers, strict=True):
            columns = {**texts[number].columns, "answered_by": answerer.name}
            answered[number] = replace(texts[number], answer=answer, columns=columns)
            if not answer.strip():
                silent.append(LeftOut(texts[number], f"no answer from {answerer.name}"))
    if len(silent) > recipe.max_quarantine_share * len(texts):
        raise DataError(
            f"{answerer.name} has no answer to {len(silent)} of {len(texts)} texts, such as {silent[0].text.text!r}: "
            "take another model or other texts"
        )
    return [text for text in answered if text.answer is None or text.answer.strip()], silent


def _rows(texts: Sequence[SpokenText], name: str, recipe: Recipe) -> Iterator[_Row]:
    seen: set[str] = set()
    for number, text in enumerate(texts):
        readings = draw_readings(text.text, recipe.voices, recipe.speeds, recipe.readings, recipe.seed)
        for index, (voice, speed) in enumerate(readings):
            identifier = (text.id or f"{name}-{number:06d}") + (f"-{index}" if len(readings) > 1 else "")
            if identifier in seen:
                raise DataError(f"{text.source}: two clips would have the id {identifier!r}; give the texts other ids")
            seen.add(identifier)
            yield _Row(identifier, text, recipe.voices[voice], voice, speed)


def _shards(rows: Sequence[_Row], folder: Path, seed: int) -> tuple[list[Shard], list[list[int]]]:
    """The work, and the numbers of each shard's rows: neighbours of one voice share a shard."""
    of_voice: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        of_voice.setdefault(row.voice_number, []).append(number)
    shards, order = [], []
    for voice_number, numbers in sorted(of_voice.items()):
        voice = rows[numbers[0]].voice
        for part, start in enumerate(range(0, len(numbers), voice.shard_size)):
            chosen = numbers[start : start + voice.shard_size]
            jobs = [(Reading(rows[n].text.text, voice_number, 1 / rows[n].speed), _audio(folder, n)) for n in chosen]
            shards.append(Shard(shard_seed(seed, voice.name, part), jobs))
            order.append(chosen)
    return shards, order


def _audio(folder: Path, number: int) -> Path:
    return folder / "audio" / f"{number // 10_000:04d}" / f"{number:08d}.flac"


def _in_order(
    shards: Sequence[Shard], order: Sequence[Sequence[int]], spoken: Sequence[Sequence[Spoken]]
) -> list[tuple[Spoken, int]]:
    """What became of each row, and its shard's seed."""
    found = {
        number: (one, shard.seed)
        for shard, numbers, shard_spoken in zip(shards, order, spoken, strict=True)
        for number, one in zip(numbers, shard_spoken, strict=True)
    }
    return [found[number] for number in range(len(found))]


def _write(
    folder: Path,
    settings: dict[str, Any],
    recipe: Recipe,
    rows: Sequence[_Row],
    spoken: Sequence[tuple[Spoken, int]],
    left_out: Sequence[LeftOut],
    answerer: Answerer | None,
) -> None:
    splits: dict[str, list[Clip]] = {"train": []}
    quarantine = [{"text": one.text.text, "text_source": one.text.source, "reason": one.reason} for one in left_out]
    for number, (row, (one, seed)) in enumerate(zip(rows, spoken, strict=True)):
        clip = _clip(row, _audio(folder, number), one.seconds, seed)
        if one.fault:
            kept = {"id": clip.id, "text": clip.text, **clip.columns}
            quarantine.append({**kept, "reason": one.fault})
        else:
            split = "heldout" if recipe.hold_out and is_heldout(clip.text) else "train"
            splits.setdefault(split, []).append(clip)
    if quarantine:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in quarantine]
        atomic_write(folder / QUARANTINE, "".join(lines))
    else:
        (folder / QUARANTINE).unlink(missing_ok=True)
    licences = sorted({clip.licence for clips in splits.values() for clip in clips})
    voices = ", ".join(f"{voice.name} ({voice.engine} {voice.engine_version})" for voice in recipe.voices)
    answered = {"answered_by": answerer.name} if answerer else {}
    counts = {"texts_left_out": len(left_out), "readings_quarantined": len(quarantine) - len(left_out)}
    write_dataset(
        folder,
        name=folder.name,
        licence="; ".join(licences),
        attribution=f"Synthetic speech made by UltraVox. Voices: {voices}.",
        splits={split: clips for split, clips in splits.items() if clips},
        extra={"settings": settings, **answered, **counts},
    )


def _clip(row: _Row, audio: Path, seconds: float, seed: int) -> Clip:
    text, voice = row.text, row.voice
    same = text.licence == voice.licence
    columns = {
        **text.columns,
        "text_source": text.source,
        "voice": voice.name,
        "engine": voice.engine,
        "engine_version": voice.engine_version,
        "speed": row.speed,
        "seed": seed,
        "text_licence": text.licence,
        "voice_licence": voice.licence,
    }
    return Clip(
        id=row.id,
        audio=audio,
        text=text.text,
        duration=seconds,
        speaker=f"{voice.name}@{row.speed:g}",
        licence=voice.licence if same else f"{text.licence} (text), {voice.licence} (voice)",
        answer=text.answer,
        language=text.language,
        columns=columns,
    )
