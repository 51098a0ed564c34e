"""``ultravox data inspect``, as it is called in a terminal."""

import json
import re

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


def test_languages_are_shown_in_the_table_and_on_the_page(files, tmp_path, capsys):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[0]["language"] = "de"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "inspect", files[0], "--html", str(tmp_path / "data.html")]) == 0
    assert "languages of train: de 0.00 h, not stated 0.00 h" in capsys.readouterr().out
    assert re.search(r"<span>languages</span><b>1</b><span>de [^<]*, not stated", (tmp_path / "data.html").read_text())


def test_columns_are_named(tmp_path, files, capsys):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    renamed = [{"key": row["id"], "wav": row["audio"], "said": {"words": row["text"]}} for row in rows]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    words = ["data", "inspect", str(tmp_path / "own.jsonl"), "--json", "--columns", "id=key", "--columns", "audio=wav"]
    assert main([*words, "--columns", "text=said.words"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"][0]["num_words"] == 6
    assert main([*words, "--columns", "text=nothing"]) == 2
    assert "no column 'nothing' (named for 'text'): its columns are key, wav, said" in capsys.readouterr().err
    assert main([*words, "--columns", "text"]) == 2
    assert "--columns takes OURS=THEIRS" in capsys.readouterr().err


def test_damaged_rows_are_reported_and_fail_when_strict(tmp_path, files, capsys):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows += [rows[0], rows[0] | {"id": "gone", "audio": "gone.flac"}, rows[0] | {"id": "twin"}]
    rows += [rows[1] | {"id": "mute", "text": " - "}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "data.html"
    assert main(["data", "inspect", files[0], "--html", str(page)]) == 0
    out = capsys.readouterr().out
    for line in ("1 × unusable", "1 × id twice", "2 × audio twice", "1 × no text"):
        assert line in out
    assert "gone.flac does not exist" in page.read_text()
    assert main(["data", "inspect", files[0], "--strict"]) == 2
    assert "ultravox: error: faults: 5, the first in row gone of train" in capsys.readouterr().err
    assert main(["data", "inspect", files[0], "--max-clips", "2", "--strict"]) == 0
    assert main(["data", "inspect", files[0], "--max-clips", "0"]) == 2


def test_every_kind_of_source_is_inspected(tmp_path, monkeypatch, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    write_waveform(tmp_path / "a.wav", (0.1 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32))
    content = (tmp_path / "a.wav").read_bytes()
    for split in ("train", "test"):
        table = pa.table({"text": [f"{split} words"], "audio": [{"bytes": content, "path": "a.wav"}]})
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    assert main(["data", "inspect", str(tmp_path / "set"), "--strict"]) == 2
    captured = capsys.readouterr()
    assert "1 × audio in two splits" in captured.out
    assert main(["data", "inspect", str(tmp_path / "set"), "--split", "test", "--strict", "--json"]) == 0
    assert [split["name"] for split in json.loads(capsys.readouterr().out)["splits"]] == ["test"]
    assert main(["data", "inspect", str(tmp_path / "a.wav")]) == 2


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
