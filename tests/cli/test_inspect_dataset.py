"""``ultravox data inspect``, as it is called in a terminal."""

import json

import numpy as np
import pytest

from ultravox.audio.waveform import write_waveform
from ultravox.cli.main import main


@pytest.fixture
def files(tmp_path):
    """Two manifests; a text stands in both."""
    random = np.random.default_rng(0)
    for split, texts in (
        ("train", ["Hello there", "<b>Good</b> morning"]),
        ("heldout", ["hello, there!", "Good night"]),
    ):
        rows = []
        for index, text in enumerate(texts):
            name = f"{split}-{index}"
            write_waveform(tmp_path / f"{name}.flac", (0.1 * random.standard_normal(16000)).astype(np.float32))
            rows.append(json.dumps({"id": name, "audio": f"{name}.flac", "text": text, "licence": "CC0-1.0"}) + "\n")
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    return [str(tmp_path / "train.jsonl"), str(tmp_path / "heldout.jsonl")]


def test_tables_and_page(files, tmp_path, capsys):
    page = tmp_path / "pages" / "data.html"
    assert main(["data", "inspect", *files, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "1 × text in two splits: a training text is also an evaluation text" in out
    assert "heldout-0  as train-0 of train: hello, there!" in out
    assert f"page  {page}" in out
    html = page.read_text()
    assert html.count("<svg") == 8  # two splits, two histograms, two widths
    assert html.count('src="data:audio/') == 1 + 4
    assert "&lt;b&gt;Good&lt;/b&gt; morning" in html
    assert "<b>Good" not in html


def test_json_and_strict(files, capsys):
    assert main(["data", "inspect", *files, "--json", "--strict"]) == 2
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["version"] == 1
    assert [split["num_clips"] for split in content["splits"]] == [2, 2]
    assert captured.err == "ultravox: error: faults: 1, the first in row heldout-0 of heldout\n"
    assert main(["data", "inspect", files[0], "--strict", "--no-decode"]) == 0
    assert "no row to look at (no file was decoded)" in capsys.readouterr().out


def test_bad_sources(files, capsys):
    for sources, message in (
        (["nowhere"], "no dataset nowhere"),
        ([files[0]] * 2, "another source has a split 'train'"),
    ):
        assert main(["data", "inspect", *sources]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("ultravox: error: ")
        assert message in captured.err
        assert captured.out == ""
