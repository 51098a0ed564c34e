"""``report.html``: one file with everything that was measured, which opens in a browser without any other file.

Texts come from datasets and models, so none of them is trusted: the template escapes everything, and a content security
policy in the page forbids every request and every script but the page's own.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ultravox.audio.content import Audio
from ultravox.audio.waveform import load_waveform
from ultravox.data.sources import load_clips
from ultravox.errors import AudioError, DataError
from ultravox.evaluation.checkpoint import read_json
from ultravox.evaluation.curves import read_curves
from ultravox.evaluation.figures import (
    IntervalRow,
    interval_chart,
    line_chart,
    percent,
    percent_interval,
    token_chart,
)
from ultravox.evaluation.media import compressed_audio, data_uri, log_mel_png
from ultravox.files import atomic_write
from ultravox.metrics.error_rate import align, tokens

REPORT_FILE = "report.html"
WIDE, NARROW = 940, 340  # CSS pixels that the charts are drawn for
# Bytes of sound in the page, which grow by a third as base64; the clips after that stand there without a player.
AUDIO_BUDGET = 7_000_000
QUESTION_AUDIO_BUDGET = 3_000_000


@lru_cache(maxsize=1)
def page_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ultravox.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": _duration, "gigabytes": lambda n: f"{n / 1e9:.2f} GB"}
    environment.globals |= {"percent_interval": percent_interval}
    return environment


def page_style() -> str:
    """The style sheet that all pages share."""
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def both_widths(draw) -> Markup:
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


@dataclass(slots=True)
class _Sound:
    """Players for the clips of one dataset, until its budget of bytes is spent.

    The dataset may have moved away since: then the texts are still worth a report.
    """

    files: dict[str, Audio]
    left: int

    @classmethod
    def of(cls, data: dict, budget: int) -> "_Sound":
        try:
            files = {clip.id: clip.audio for clip in load_clips(data["source"], data["split"])}
        except (DataError, KeyError):
            files = {}
        return cls(files, budget)

    def waveform(self, clip_id: str) -> np.ndarray | None:
        if clip_id not in self.files:
            return None
        try:
            return load_waveform(self.files[clip_id])
        except AudioError:
            return None

    def uri(self, clip_id: str) -> str | None:
        waveform = self.waveform(clip_id) if self.left > 0 else None
        if waveform is None:
            return None
        content, media_type = compressed_audio(waveform)
        self.left -= len(content)
        return data_uri(content, media_type)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``predictions.jsonl``. DataError names the line that is broken."""
    if not path.is_file():
        raise DataError(f"no {path}: run `ultravox evaluate` first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not a JSON object; evaluate again") from error
    return rows


def _score_rows(results: dict) -> list[IntervalRow]:
    controls, bounds = results["controls"], results["bounds"]

    def row(label: str, score: dict, role: str, key: str = "wer") -> IntervalRow:
        return IntervalRow(label, score[key], score["interval"], role, score.get("absent", ""))

    return [
        row("transcript given as text", bounds["text"], "bound"),
        row("Whisper's own decoder", bounds["cascade"], "bound"),
        row("this model", results["wer"], "model", "value"),
        row("another clip's audio", controls["swapped"], "control"),
        row("silence", controls["silence"], "control"),
    ]


def _answer_rows(answers: dict) -> list[IntervalRow]:
    def row(label: str, kind: str, role: str) -> IntervalRow:
        score = answers[kind] if kind else answers
        return IntervalRow(label, score["share"], score["interval"], role, score.get("absent", ""))

    return [
        row("question given as text", "text", "bound"),
        row("Whisper's text given", "cascade", "bound"),
        row("this model, from audio", "", "model"),
        row("another question's audio", "swapped", "control"),
        row("the question, repeated", "echo", "control"),
    ]


def _clip_rows(predictions: list[dict], sound: _Sound) -> list[dict]:
    rows = []
    for index, row in enumerate(row for row in predictions if row["kind"] == "transcription"):
        edits = align(tokens(row["reference"], "word"), tokens(row["hypothesis"], "word"))
        wer = row["errors"] / max(1, row["num_words"])
        rows.append(row | {"index": index, "edits": edits, "wer": wer, "audio_uri": sound.uri(row["id"])})
    return rows


def _pictures(folder: Path, predictions: list[dict], sound: _Sound) -> list[dict]:
    from ultravox.audio.features import LogMel

    clips = {row["id"]: row for row in predictions if row["kind"] == "transcription"}
    pictures = []
    for view in read_json(folder / "alignment.json").get("clips", []):
        row = clips.get(view["id"])
        waveform = sound.waveform(row["id"]) if row else None
        if row is None or waveform is None:
            continue
        log_mel = LogMel(80)(waveform).numpy()
        uri = data_uri(log_mel_png(log_mel), "image/png")
        chart = token_chart(uri, log_mel.shape[1], view["tokens"], view["cosines"], view["seconds"])
        pictures.append(row | {"chart": chart})
    return pictures


def render(folder: Path, results: dict, predictions: list[dict], run: Path | None) -> str:
    """The page's HTML. ``run`` is the folder with log.jsonl and config.yaml, where there is one."""
    environment = page_environment()
    sound = _Sound.of(results["data"], AUDIO_BUDGET)
    curves = read_curves(run / "log.jsonl") if run else read_curves(folder / "log.jsonl")
    config = run / "config.yaml" if run else folder / "config.yaml"
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    rows, answers = _score_rows(results), results["answers"]
    question_sound = _Sound.of(answers, QUESTION_AUDIO_BUDGET)
    questions = [row | {"audio_uri": question_sound.uri(row["id"])} for row in predictions if row["kind"] == "answer"]
    clips = _clip_rows(predictions, sound)
    charts = {
        "scores": both_widths(
            lambda w: interval_chart(rows, width=w, title="Word error rate with its bounds and controls")
        ),
        "answers": ""
        if answers.get("share") is None
        else both_widths(
            lambda w: interval_chart(_answer_rows(answers), width=w, title="Share of answers equal in meaning")
        ),
        "loss": both_widths(
            lambda w: line_chart(
                curves.loss, curves.stages, width=w, height=240, title="Training loss", logarithmic=True
            )
        ),
        "wer": both_widths(
            lambda w: line_chart(
                curves.wer, curves.stages, width=w, height=200, title="Word error rate", as_percent=True, dots=True
            )
        ),
    }
    return environment.get_template("report.html.jinja").render(
        results=results,
        name=Path(results["checkpoint"]["path"]).absolute().name,
        rows=rows,
        charts=charts,
        has_loss=bool(curves.loss),
        has_wer=bool(curves.wer),
        clips=clips,
        questions=questions,
        pictures=_pictures(folder, predictions, sound),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        silent=sum(1 for row in [*clips, *questions] if row["audio_uri"] is None),
        style=Markup(page_style()),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_report(run_folder: str | Path, *, run: str | Path | None = None) -> Path:
    """Write ``report.html`` into the folder of a ``results.json``.

    Args:
        run_folder: a folder with results.json and predictions.jsonl: the run's own, or another that evaluate wrote.
        run: the run's folder (log.jsonl, config.yaml) where that is another one.

    Returns:
        the report's path.
    """
    folder = Path(run_folder)
    results = read_json(folder / "results.json")
    if not results:
        raise DataError(f"no {folder / 'results.json'}: run `ultravox evaluate` first")
    predictions = read_predictions(folder / "predictions.jsonl")
    atomic_write(folder / REPORT_FILE, render(folder, results, predictions, Path(run) if run else None))
    return folder / REPORT_FILE
