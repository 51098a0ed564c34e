"""The page of ``ultravox data inspect``: one HTML file with figures, histograms and the rows to look at and to hear."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from ultravox.audio.waveform import load_waveform
from ultravox.data.clip import Clip
from ultravox.data.filters import characters_per_second, total_seconds
from ultravox.errors import AudioError
from ultravox.evaluation.figures import histogram
from ultravox.evaluation.inspection import MEANINGS, Inspection, worst_rows
from ultravox.evaluation.media import compressed_audio, data_uri
from ultravox.evaluation.report import both_widths, page_environment, page_style
from ultravox.files import atomic_write

MOST_ROWS = 60
NUM_SAMPLES = 5  # rows of each split, evenly spread, as they are
MAX_PLAYER_SECONDS = 60.0
WITHOUT_CLIP = ("unusable", "id twice")  # the row itself could not be read, or is the second of its name


def write_dataset_page(path: Path, name: str, splits: Mapping[str, Sequence[Clip]], inspection: Inspection) -> None:
    """Write the page; it opens without any other file. `splits` are those that were inspected."""
    clips = {(split, clip.id): clip for split, many in splits.items() for clip in many}
    worst = []
    for finding in worst_rows(inspection, MOST_ROWS):
        clip = None if finding.kind in WITHOUT_CLIP else clips.get((finding.split, finding.id))
        worst.append({"finding": finding, "clip": clip, "sound": clip and _sound(clip)})
    content = (
        page_environment()
        .get_template("dataset.html.jinja")
        .render(
            name=name,
            inspection=inspection,
            counts=inspection.counts(),
            meanings=MEANINGS,
            charts={split: _charts(split, many) for split, many in splits.items()},
            worst=worst,
            samples={
                split: [
                    {"clip": clip, "sound": _sound(clip)}
                    for clip in many[:: max(1, len(many) // NUM_SAMPLES)][:NUM_SAMPLES]
                ]
                for split, many in splits.items()
            },
            style=Markup(page_style()),
        )
    )
    atomic_write(path, content)


def _charts(split: str, clips: Sequence[Clip]) -> dict[str, Markup]:
    heard = [clip for clip in clips if clip.duration]
    if not heard:
        return {}
    rates, durations = list(map(characters_per_second, heard)), list(map(total_seconds, heard))
    return {
        "duration": both_widths(
            lambda w: histogram(durations, width=w, height=180, title=f"Durations of {split}", unit="s")
        ),
        "characters a second": both_widths(
            lambda w: histogram(rates, width=w, height=180, title=f"Characters a second of {split}", unit="a second")
        ),
    }


def _sound(clip: Clip) -> str | None:
    """The clip for a player, or None where it cannot be decoded or is long."""
    try:
        waveform = load_waveform(clip.audio, max_seconds=MAX_PLAYER_SECONDS)
    except AudioError:
        return None
    return data_uri(*compressed_audio(waveform))
