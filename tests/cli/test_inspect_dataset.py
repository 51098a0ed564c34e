"""``ultravox data inspect``, as it is called in a terminal."""

import json
import re

import numpy as np
import pytest

from ultravox.audio.waveform import write_waveform
from ultravox.cli.main import main
from ultravox.cli.names import hours
from ultravox.evaluation.inspection import MEANINGS


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
    assert "languages of train: de 1.0 s, not stated 1.0 s" in capsys.readouterr().out
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


def test_special_tokens_and_wrong_durations_fail_when_strict(tmp_path, files, tiny_models, capsys):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]

    def inspect(row: dict, *words: str) -> tuple[int, str]:
        (tmp_path / "train.jsonl").write_text(json.dumps(rows[0] | row) + "\n")
        code = main(["data", "inspect", files[0], "--strict", *words])
        return code, capsys.readouterr().out

    tokenizer = ["--tokenizer", str(tiny_models.llama)]
    assert inspect({}, *tokenizer)[0] == 0
    assert inspect({"text": "Hello there <|im_end|>"})[0] == 0, "nobody said which tokenizer"
    for row in ({"text": "Hello there <|im_end|>"}, {"answer": "Hi. <|im_end|>"}):
        code, out = inspect(row, *tokenizer)
        assert code == 2
        assert "1 × special token: a text holds what a tokenizer takes" in out
        assert "special token  train  train-0  <|im_end|> as a text" in out
    assert inspect({"text": "Hello <|audio|> there"})[0] == 2
    talk = [{"role": "user", "content": "<|audio|> What is it?"}, {"role": "assistant", "content": "Rain."}]
    assert inspect({"messages": talk}, *tokenizer)[0] == 0, "a placeholder is at home there"
    assert inspect({"messages": [talk[0], talk[1] | {"content": "Rain.<|im_end|>"}]}, *tokenizer)[0] == 2
    code, out = inspect({"duration": 3.0})
    assert (code, "1 × wrong duration" in out) == (2, True)
    assert "wrong duration  train  train-0  3.00 s in the row, 1.00 s of audio" in out
    assert inspect({"duration": 1.05})[0] == 0, "the tolerance"


def test_labels_of_findings_fit_into_their_column(tmp_path, files, capsys):
    (tmp_path / "words.wav").write_text("words, not sounds " * 30)
    row = {"id": "x", "audio": "words.wav", "text": "seven", "duration": 1.0}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["data", "inspect", files[0], "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert re.search(r'<article class="item finding">\s*<div class="rate high">unreadable</div>', page)
    [*_, column] = map(int, re.findall(r"\.item\.finding \{ grid-template-columns: (\d+)px 210px", page))
    longest = max((word for kind in MEANINGS for word in kind.split()), key=len)
    assert 10.6 * len(longest) <= column, "bold, 16 px: 103 px for 'unreadable' as Chromium draws it"


@pytest.mark.parametrize(
    ("files_there", "source", "message"),
    [
        ({"a.jsonl": "{}", "b.jsonl": "{}"}, ".", "it has no dataset.json, but a.jsonl, b.jsonl: name such a file"),
        ({"x/0.wav": "RIFF"}, ".", "it holds recordings, such as x/0.wav, and nothing says what is said in them"),
        ({"note.txt": "hello"}, ".", "it has neither dataset.json nor metadata.csv"),
        ({"note.txt": "hello"}, "note.txt", "a file of rows ends in .jsonl or .json, or is a Parquet file"),
        ({"a.json": '[{"id": "a"}]'}, "a.json", "a.json, line 1: a JSON array begins here: expected one JSON object"),
        ({"a.json": '[\n {"id": "a"}\n]'}, "a.json", "as `jq -c '.[]' "),
        ({"metadata.csv": "file_name;text\n0.wav;one, two\n"}, ".", "line 1: the columns are separated by semicolons"),
        ({"metadata.csv": "file_name\ttext\n"}, ".", "line 1: the columns are separated by tabs"),
        ({"metadata.csv": "0.wav,one\n", "0.wav": "RIFF"}, ".", "line 1: expected the names of the columns, found a"),
        ({"metadata.csv": ""}, ".", "metadata.csv is empty: expected a first line such as file_name,text"),
    ],
)
def test_what_is_no_dataset_is_told_by_what_it_is(files_there, source, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, content in files_there.items():
        (tmp_path / "here" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "here" / name).write_text(content)
    assert main(["data", "inspect", source]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_is_no_recording(files, tmp_path, capsys):
    (tmp_path / "sounds").mkdir()
    rows = [{"id": "f", "audio": "sounds", "text": "one"}, {"id": "e", "audio": "", "text": "two"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "inspect", files[0], "--strict"]) == 2
    out = capsys.readouterr().out
    assert f"{tmp_path / 'sounds'} is a folder: name an audio file in it" in out
    assert "'audio' names no file: it is empty" in out


def test_lengths_are_shown_in_a_unit_that_fits():
    assert [hours(seconds) for seconds in (0, 7.44, 59.9, 60, 192, 359, 360, 45000)] == [
        *("0.0 s", "7.4 s", "59.9 s", "1.0 min", "3.2 min", "6.0 min", "0.10 h", "12.50 h")
    ]


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
