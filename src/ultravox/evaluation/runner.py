"""One evaluation, from a checkpoint to ``results.json``: score, controls, bounds, spoken questions.

Beside it stand ``predictions.jsonl`` with every raw text and ``alignment.json`` with the token views of a few clips;
``ultravox.evaluation.report`` turns the three into a page. ``results.json`` is written last: where it is, the rest is.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ultravox import __version__
from ultravox.audio.waveform import load_waveform
from ultravox.data.manifest import Clip, read_dataset
from ultravox.data.sources import describe_source, is_manifest, load_clips
from ultravox.errors import ConfigError, DataError
from ultravox.evaluation.answers import absent_answers, score_answers
from ultravox.evaluation.bounds import CASCADE_METHOD, TEXT_METHOD
from ultravox.evaluation.checkpoint import Checkpoint, find_checkpoint, identity
from ultravox.evaluation.controls import derangement, silence_like
from ultravox.evaluation.extent import default_output, parts_left_out
from ultravox.evaluation.scoring import Bootstrap, Score, absent, audio_use
from ultravox.evaluation.system import Progress, System, in_batches, no_progress
from ultravox.evaluation.token_view import METHOD as TOKEN_VIEW_METHOD
from ultravox.files import atomic_write, require_place
from ultravox.metrics.normalize import normaliser_identity, normalize_english
from ultravox.training.measure import peak_memory_bytes

RESULTS_VERSION = 1
FAST_CLIPS = 32
FAST_QUESTIONS = 16
NUM_INVARIANCE_CLIPS = 8
NUM_VIEWED_CLIPS = 3
VIEWED_SECONDS = (1.0, 8.0)  # long enough to see something, short enough for a page


@dataclass(frozen=True, slots=True)
class Settings:
    """How to evaluate; ``questions`` None leaves the spoken questions out."""

    batch_size: int = 16
    max_new_tokens: int = 64
    limit: int | None = None
    fast: bool = False
    questions: str | None = None
    question_split: str = "heldout"
    num_bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_bootstrap < 1:
            raise ConfigError("evaluation.num_bootstrap must be at least 1: no figure is reported without its interval")

    def clip_limit(self, fast_limit: int) -> int | None:
        """How many clips at most, with --fast counted in."""
        limits = [n for n in (self.limit, fast_limit if self.fast else None) if n is not None]
        return min(limits, default=None)


def evenly_spread(clips: Sequence[Clip], limit: int | None) -> list[Clip]:
    """At most ``limit`` clips, evenly spread over the split: its first ones may be all of one kind."""
    if limit is None or limit >= len(clips):
        return list(clips)
    if limit < 1:
        raise DataError(f"cannot evaluate on {limit} clips: the limit must be at least 1")
    return [clips[index] for index in np.linspace(0, len(clips) - 1, limit).round().astype(int)]


class _Evaluation:
    """The steps of one evaluation on one list of clips, which share batching, progress and bootstrap."""

    def __init__(self, system: System, clips: list[Clip], settings: Settings, progress: Progress):
        self.system, self.clips, self.settings, self.progress = system, clips, settings, progress
        self.references = [clip.text for clip in clips]
        voices = tuple(clip.speaker.partition("@")[0] for clip in clips)  # one synthetic voice at several speeds is one
        self.bootstrap = Bootstrap(voices, settings.num_bootstrap, settings.seed)
        # Two questions with one answer are no control for each other.
        keys = [normalize_english(clip.text if clip.answer is None else clip.answer) for clip in clips]
        try:
            self.partner: list[int] | None = derangement(keys, settings.seed)
            self.no_partner = ""
        except DataError as error:
            self.partner, self.no_partner = None, str(error)

    def from_audio(self, function, task: str, clips: Sequence[Clip] | None = None, *, silent=False) -> list[str]:
        """A function's text for each clip's audio; ``silent`` puts silence of the same length in its place."""

        def load(clip: Clip) -> np.ndarray:
            waveform = load_waveform(clip.audio)
            return silence_like([waveform])[0] if silent else waveform

        clips = self.clips if clips is None else clips
        seconds = [clip.duration for clip in clips]
        return in_batches(
            function,
            clips,
            batch_size=self.settings.batch_size,
            cost=seconds,
            load=load,
            task=task,
            progress=self.progress,
        )

    def from_text(self, function, texts: Sequence[str], task: str) -> list[str]:
        """A function's text for each text."""
        return in_batches(
            function,
            texts,
            batch_size=self.settings.batch_size,
            cost=[len(text) for text in texts],
            task=task,
            progress=self.progress,
        )

    def swapped(self, function, task: str) -> list[str] | str:
        """A function's text when each clip gets its partner's audio, or the reason why there is no partner."""
        if self.partner is None:
            return self.no_partner
        by_owner = self.from_audio(function, task, [self.clips[partner] for partner in self.partner])
        return by_owner

    def optional(self, name: str, *, slow: bool = False) -> tuple[Any, str]:
        """A function of the system, or None and why it will not run. ``slow`` ones are left out by --fast."""
        function = getattr(self.system, name)
        if function is None:
            return None, self.system.reason(name)
        if slow and self.settings.fast:
            return None, "left out by --fast"
        return function, ""

    def score(self, hypotheses: Sequence[str]) -> Score:
        return Score(self.references, hypotheses, self.bootstrap)


def _transcription(evaluation: _Evaluation) -> tuple[dict, list[dict], list[int]]:
    """The part of results.json about transcripts, the rows of predictions.jsonl, and the errors of each clip."""
    system = evaluation.system
    begin = time.monotonic()
    hypotheses = evaluation.from_audio(system.transcribe, "transcripts")
    transcription_seconds = time.monotonic() - begin
    texts: dict[str, list[str] | str] = {
        "silence": evaluation.from_audio(system.transcribe, "control: silence", silent=True),
        "swapped": evaluation.swapped(system.transcribe, "control: swapped audio"),
    }
    recognise, why_no_cascade = evaluation.optional("recognise", slow=True)
    texts["cascade"] = evaluation.from_audio(recognise, "bound: cascade") if recognise else why_no_cascade
    read, why_no_text = evaluation.optional("transcribe_text", slow=True)
    texts["text"] = evaluation.from_text(read, evaluation.references, "bound: text") if read else why_no_text

    real = evaluation.score(hypotheses)
    scores = {name: None if isinstance(given, str) else evaluation.score(given) for name, given in texts.items()}

    def described(name: str) -> dict:
        score = scores[name]
        if score is None:
            return absent(str(texts[name]))
        return score.as_dict("wer") | {"difference": score.minus(real).as_dict()}

    results = {
        "wer": real.as_dict(),
        "cer": Score(evaluation.references, hypotheses, evaluation.bootstrap, "character").as_dict(),
        "controls": {name: described(name) for name in ("silence", "swapped")},
        "bounds": {
            "cascade": described("cascade") | {"method": CASCADE_METHOD},
            "text": described("text") | {"method": system.text_method or TEXT_METHOD},
        },
        "audio_use": audio_use(real, scores["swapped"], evaluation.no_partner),
        "batch_invariance": _batch_invariance(evaluation, hypotheses),
        "transcription_seconds": transcription_seconds,
    }
    rows = []
    for index, clip in enumerate(evaluation.clips):
        counts = real.per_clip[index]
        row = {"kind": "transcription", "id": clip.id, "duration": clip.duration, "speaker": clip.speaker}
        row |= {"licence": clip.licence, "reference": clip.text, "hypothesis": hypotheses[index]}
        row |= {"errors": counts.errors, "num_words": counts.reference_length}
        row |= {f"{name}_hypothesis": None if isinstance(given, str) else given[index] for name, given in texts.items()}
        row["swapped_id"] = evaluation.clips[evaluation.partner[index]].id if evaluation.partner else None
        rows.append(row)
    return results, rows, real.errors


def _batch_invariance(evaluation: _Evaluation, hypotheses: Sequence[str]) -> dict:
    """Whether some clips give the same text alone as in their batch (padding must not leak into the result)."""
    function, why = evaluation.optional("transcribe_one", slow=True)
    if function is None:
        return {"n": 0, "absent": why}
    chosen = np.linspace(0, len(hypotheses) - 1, min(NUM_INVARIANCE_CLIPS, len(hypotheses))).round().astype(int)
    alone = evaluation.from_audio(function, "one by one", [evaluation.clips[index] for index in chosen])
    equal = sum(text == hypotheses[index] for text, index in zip(alone, chosen, strict=True))
    return {"n": len(alone), "equal": equal}


def _questions(evaluation: _Evaluation) -> tuple[dict, list[dict]]:
    """The ``answers`` object of results.json and its rows of predictions.jsonl."""
    clips, system = evaluation.clips, evaluation.system
    given: dict[str, list[str] | str] = {
        "audio": evaluation.from_audio(system.answer, "spoken questions"),
        "swapped": evaluation.swapped(system.answer, "questions: swapped audio"),
    }
    read, why_no_text = evaluation.optional("answer_text", slow=True)
    given["text"] = evaluation.from_text(read, evaluation.references, "questions: as text") if read else why_no_text
    recognise, why_no_cascade = evaluation.optional("recognise", slow=True)
    if read and recognise:
        heard = evaluation.from_audio(recognise, "questions: cascade's ear")
        given["cascade"] = evaluation.from_text(read, heard, "questions: cascade's answer")
    else:
        given["cascade"] = why_no_text or why_no_cascade
    expected = [clip.answer or "" for clip in clips]
    results, verdicts = score_answers(evaluation.references, expected, given, evaluation.bootstrap)
    rows = []
    for index, clip in enumerate(clips):
        row = {"kind": "answer", "id": clip.id, "duration": clip.duration, "speaker": clip.speaker}
        row |= {"licence": clip.licence, "text": clip.text, "reference": clip.answer}
        for kind, texts in given.items():
            prefix = "" if kind == "audio" else f"{kind}_"
            row[f"{prefix}answer"] = None if isinstance(texts, str) else texts[index]
            row[f"{prefix}equal"] = verdicts[kind][index] if kind in verdicts else None
        row["swapped_id"] = clips[evaluation.partner[index]].id if evaluation.partner else None
        rows.append(row)
    return results, rows


def _answers(system: System, questions: list[Clip], settings: Settings, progress: Progress) -> tuple[dict, list[dict]]:
    """The ``answers`` object and its rows of predictions.jsonl; null shares where nothing can be asked."""
    if not questions:
        return absent_answers("no dataset of spoken questions was named"), []
    if system.answer is None:
        return absent_answers(system.reason("answer")), []
    results, rows = _questions(_Evaluation(system, questions, settings, progress))
    asked = {"source": settings.questions, "split": settings.question_split}
    return results | asked | {"answered_by": describe_source(str(settings.questions)).get("answered_by")}, rows


def _write(folder: Path, results: dict, rows: list[dict], views: dict) -> None:
    lines = [json.dumps({"version": RESULTS_VERSION, **row}, ensure_ascii=False) + "\n" for row in rows]
    atomic_write(folder / "predictions.jsonl", "".join(lines))
    atomic_write(folder / "alignment.json", json.dumps(views, indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _load_questions(settings: Settings) -> list[Clip]:
    """All spoken questions, none where no dataset is named. DataError when one of them has no answer."""
    if settings.questions is None:
        return []
    clips = load_clips(settings.questions, settings.question_split)
    for clip in clips:
        if clip.answer is None:
            raise DataError(
                f"{settings.questions}, clip {clip.id} has no answer: spoken questions need the language model's own "
                "answer to their text; fetch the dataset again, or use --questions none"
            )
    return clips


def _token_views(evaluation: _Evaluation, errors: Sequence[int]) -> dict:
    """``alignment.json``: token views of a few clips, from the fewest errors to the most."""
    function = evaluation.system.view_tokens
    if function is None:
        return {"version": RESULTS_VERSION, "absent": evaluation.system.reason("view_tokens"), "clips": []}
    low, high = VIEWED_SECONDS
    fitting = [index for index, clip in enumerate(evaluation.clips) if low <= clip.duration <= high]
    ranked = sorted(fitting, key=lambda index: (errors[index], -evaluation.clips[index].duration))
    count = min(NUM_VIEWED_CLIPS, len(ranked))
    chosen = sorted({ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, count)}, key=ranked.index)
    clips = []
    for index in chosen:
        clip = evaluation.clips[index]
        clips.append({"id": clip.id, **function(load_waveform(clip.audio)).as_dict()})
    return {"version": RESULTS_VERSION, "method": TOKEN_VIEW_METHOD, "clips": clips}


def is_stand_in(source: str) -> bool:
    """Whether a dataset says that it was synthesised in the place of recordings that could not be had."""
    return bool(describe_source(source).get("settings", {}).get("stand_in", False))


def attribution(source: str, clips: Sequence[Clip]) -> dict[str, str]:
    """Name, licence and attribution of a dataset; where it does not tell its licence, those that its rows name."""
    path = Path(source).expanduser()
    try:
        info = read_dataset(path.parent) if is_manifest(source) else describe_source(source)
    except DataError:
        info = {}
    licences = sorted({clip.licence for clip in clips if clip.licence})
    return {
        "name": str(info.get("name") or (path.name if path.exists() else source)),
        "licence": str(info.get("licence") or ", ".join(licences) or "licence not stated"),
        "attribution": str(info.get("attribution") or ""),
    }


def _provenance(checkpoint: Checkpoint, settings: Settings, system: System, command: str) -> dict[str, Any]:
    """What was measured and how: everything in results.json that is no measurement of this evaluation."""
    return {
        "version": RESULTS_VERSION,
        "ultravox_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "checkpoint": identity(checkpoint),
        "train_seconds": checkpoint.train.get("train_seconds"),
        "peak_memory_bytes": checkpoint.train.get("peak_memory_bytes"),
        "fast": settings.fast,
        "normaliser": normaliser_identity(),
        "generation": {
            "decoding": "greedy",
            "batch_size": settings.batch_size,
            "max_new_tokens": settings.max_new_tokens,
            "transcript_limit": system.transcript_limit,
            "prompt": system.prompt,
        },
    }


def evaluate(
    checkpoint: str | Path,
    source: str,
    split: str = "heldout",
    *,
    settings: Settings | None = None,
    output: str | Path | None = None,
    system: System | None = None,
    progress: Progress = no_progress,
    command: str = "",
) -> tuple[dict[str, Any], Path]:
    """Measure a checkpoint and write results.json, predictions.jsonl and alignment.json.

    Args:
        checkpoint: a run folder, its ``model/``, or a saved model folder.
        source, split: the clips of the error rates.
        output: folder for the results; ``default_output`` by default, so that a part never replaces the whole.
        system: what to measure in place of the checkpoint's model (tests).
        progress: called with (task, done, total) after every batch.
        command: how this evaluation was asked for, for the report.

    Returns:
        the content of results.json, and the folder that it lies in.
    """
    begin = time.monotonic()
    settings = settings or Settings()
    found = find_checkpoint(checkpoint)
    all_clips = load_clips(source, split)
    clips = evenly_spread(all_clips, settings.clip_limit(FAST_CLIPS))
    all_questions = _load_questions(settings)
    questions = evenly_spread(all_questions, settings.clip_limit(FAST_QUESTIONS))
    missing = parts_left_out(
        found,
        clips=(len(clips), len(all_clips)),
        questions=(len(questions), len(all_questions)),
        question_source=(settings.questions, settings.question_split),
        fast=settings.fast,
    )
    folder = Path(output) if output is not None else default_output(found, source, split, is_partial=bool(missing))
    require_place(folder)  # before the minutes that the rest takes
    if system is None:
        from ultravox.evaluation.loading import load_system

        progress("loading the model", 0, 1)
        system = load_system(found, batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens)
        progress("loading the model", 1, 1)

    evaluation = _Evaluation(system, clips, settings, progress)
    results, rows, errors = _transcription(evaluation)
    answers, answer_rows = _answers(system, questions, settings, progress)
    views = _token_views(evaluation, errors)
    sources = [attribution(source, clips)]
    if settings.questions is not None:
        sources.append(attribution(settings.questions, questions))
    results = {
        **_provenance(found, settings, system, command),
        "data": {
            "source": source,
            "split": split,
            "num_clips": len(clips),
            "split_clips": len(all_clips),
            "limit": len(clips) if len(clips) < len(all_clips) else None,
            "seconds": round(sum(clip.duration for clip in clips), 3),
            "stand_in": is_stand_in(source),
        },
        "left_out": missing,
        **results,
        "answers": answers,
        "bootstrap": evaluation.bootstrap.as_dict(),
        "attributions": sources,
        "evaluation_seconds": time.monotonic() - begin,
        "evaluation_peak_memory_bytes": peak_memory_bytes(),
    }
    _write(folder, results, rows + answer_rows, views)
    return results, folder
