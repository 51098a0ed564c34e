"""The report: complete, escaped, and without any request to elsewhere."""

import json
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from ultravox.errors import DataError
from ultravox.evaluation.curves import read_curves
from ultravox.evaluation.figures import IntervalRow, interval_chart
from ultravox.evaluation.media import compressed_audio, png
from ultravox.evaluation.report import write_report
from ultravox.evaluation.runner import Settings, evaluate


class Page(HTMLParser):
    """Collects what the browser would see: tags with attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture
def html(run_folder, dataset, questions, listening_system) -> str:
    settings = Settings(questions=str(questions), num_bootstrap=100)
    evaluate(run_folder, str(dataset), settings=settings, system=listening_system, command="ultravox evaluate <x>")
    return write_report(run_folder, run=run_folder).read_text()


def test_every_clip_is_there_with_its_player(html, run_folder):
    page = Page(html)
    rows = [json.loads(line) for line in (run_folder / "predictions.jsonl").read_text().splitlines()]
    assert page.count("audio") == len(rows) == 12
    for row in rows:
        shown = ("text", "reference", "answer", "text_answer", "swapped_answer")
        for key in shown if row["kind"] == "answer" else ("id", "reference", "hypothesis"):
            assert row[key] in page.text
    articles = [attributes for tag, attributes in page.tags if tag == "article" and "data-wer" in attributes]
    assert len(articles) == 8
    assert {float(article["data-wer"]) for article in articles} >= {0.0, 0.25}


def test_texts_are_escaped(html):
    page = Page(html)
    assert page.count("script") == 1  # the page's own
    assert page.count("b") == 4  # the tiles; the token "<b>bold</b>" is text
    assert "alert(1)" in page.text
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_no_external_request(html):
    page = Page(html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_it_shows_figures_curves_licence_and_config(html, run_folder):
    page = Page(html)
    results = json.loads((run_folder / "results.json").read_text())
    assert f"{results['wer']['value']:.1%}" in page.text
    assert page.count("polyline") == 2 * 4  # loss and WER, two stages each, for the wide and for the narrow page
    assert "CC-BY-SA-3.0" in page.text
    assert "Recorded by <Nobody>" in page.text
    assert "evaluation: {source:" in page.text
    assert "ultravox evaluate <x>" in page.text
    assert results["answers"]["rule"] in page.text
    assert "at most 64 tokens and, in a transcript, at most 4 + 6 a second of audio" in page.text
    assert page.count("image") >= 1


def test_without_log_questions_or_data(run_folder, dataset, deaf_system, tmp_path):
    evaluate(run_folder, str(dataset), system=deaf_system, output=tmp_path / "out")
    shutil.rmtree(dataset)
    page = Page(write_report(tmp_path / "out").read_text())
    assert page.count("article") == 8
    assert page.count("audio") == 0
    assert "not measured" in page.text
    assert page.count("polyline") == 0


def test_a_synthetic_stand_in_is_named(run_folder, dataset, listening_system, tmp_path):
    warning = "synthetic stand-in: the figures are not those of human speech"
    evaluate(run_folder, str(dataset), system=listening_system, output=tmp_path / "real")
    assert warning not in write_report(tmp_path / "real").read_text()
    described = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(described | {"settings": {"stand_in": True}}))
    evaluate(run_folder, str(dataset), system=listening_system, output=tmp_path / "out")
    assert warning in write_report(tmp_path / "out").read_text()


def test_no_results_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="run `ultravox evaluate` first"):
        write_report(tmp_path)


def test_curves_put_stages_after_each_other(run_folder):
    curves = read_curves(run_folder / "log.jsonl")
    assert [stage for stage, _, _ in curves.stages] == ["align", "tune"]
    assert curves.stages[0][2] == curves.stages[1][1] == pytest.approx(9.5 / 60)
    assert curves.stages[1][2] == pytest.approx((9.5 + 32) / 60)
    assert curves.wer[0].x == [pytest.approx(9.5 / 60)]  # an evaluation has the time of the step before it
    assert curves.wer[1].y == [0.3]


def test_only_the_last_line_of_a_log_may_be_half(run_folder):
    log = run_folder / "log.jsonl"
    whole, text = read_curves(log), log.read_text()
    log.write_text(text + '{"stage": "tu')
    assert read_curves(log) == whole
    log.write_text('{"stage": "al\n' + text)
    with pytest.raises(DataError, match=r"log\.jsonl, line 1: not a JSON object"):
        read_curves(log)


def test_png_holds_the_pixels():
    picture = png(np.array([[0.0, 1.0], [0.5, 0.25]]))
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (2, 2)
    data = picture[picture.index(b"IDAT") + 4 : picture.index(b"IEND") - 8]
    assert zlib.decompress(data) == bytes([0, 0, 255, 0, 128, 64])


def test_sound_is_small_and_as_long():
    import io

    import soundfile

    waveform = np.sin(np.arange(16000 * 12) * 0.2).astype(np.float32)
    content, media_type = compressed_audio(waveform)
    assert media_type in ("audio/ogg", "audio/flac")
    assert soundfile.info(io.BytesIO(content)).frames == pytest.approx(len(waveform), abs=400)
    assert len(content) < len(waveform) * 2


def test_interval_chart_escapes_and_draws_absent_rows():
    rows = [IntervalRow("<b>", 0.3, [0.2, 0.4], "model"), IntervalRow("none", None, None, "bound", "why")]
    chart = str(interval_chart(rows, width=900, title="t"))
    assert "<b>" not in chart
    assert "not measured" in chart
    assert chart.count("<circle") == 1
