"""Cases 21, 22 and 24: transcripts that are not there, files that are not whole, tokens that must not be lost."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from faulty_runs import config_for, losses_of, one_line, set_aside, summary_of, write_rows, write_shards, written
from transformers import AutoTokenizer

from ultravox.cli.main import main
from ultravox.data.collate import collate_tokens
from ultravox.data.manifest import Clip
from ultravox.data.prepared import iter_prepared
from ultravox.data.templates import PromptTemplate
from ultravox.errors import DataError
from ultravox.model.factory import build_model, build_processor
from ultravox.tokens import IGNORE_INDEX
from ultravox.training import tune
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.stream import prepare_stream
from ultravox.training.tune import TuneTask

# Case 21

BLANK = {"null": None, "empty": "", "blank": " \t\n", "punctuation": " … - "}


def with_blank(rows, **changes):
    """The rows, and one with each kind of text that says nothing."""
    return [*rows, *({**rows[0], "id": f"text-{name}", "text": text, **changes} for name, text in BLANK.items())]


@pytest.mark.parametrize("way", ["align", "tune", "decoded", "streamed"])
def test_a_transcript_that_says_nothing_is_never_learnt_from(parts, rows, tmp_path, way):
    """Case 21: set aside by either objective, and no step is without a label."""
    bad = with_blank(rows, answer=None)
    streaming = way == "streamed"
    source = write_shards(tmp_path / "set", bad) if streaming else write_rows(tmp_path / "set.jsonl", bad)
    stage = {"name": "align", "objective": "align", "max_batch_tokens": 100} if way == "align" else {}
    changes = {"stage": stage, "streaming": streaming, "cache": "none" if way == "decoded" else "auto", "steps": 14}
    run = run_training(config_for(parts, source, tmp_path / "run", max_quarantine_share=0.2, **changes))
    assert set_aside(run) == {"without text": sorted(f"text-{name}" for name in BLANK)}
    assert summary_of(run)["stages"][0]["skipped_steps"] == 0
    assert all(math.isfinite(loss) for loss in losses_of(run))
    with pytest.raises(DataError, match=r"\d of \d+ clips cannot be used \(\d without text\), more than data"):
        run_training(config_for(parts, source, tmp_path / "strict", **changes))


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_an_answer_that_says_nothing_is_never_learnt_from(parts, rows, tmp_path, answer):
    """Case 21, for a task whose answer is not the transcript."""
    source = write_rows(tmp_path / "set.jsonl", [*rows, {**rows[0], "id": "mute", "answer": answer}])
    changes = {"source": {"task": "answer"}, "max_quarantine_share": 0.1}
    run = run_training(config_for(parts, source, tmp_path / "run", **changes))
    assert set_aside(run) == {"without answer": ["mute"]}
    assert all(math.isfinite(loss) for loss in losses_of(run))


def test_a_missing_transcript_is_an_error_with_its_line(parts, rows, tmp_path, capsys):
    """Case 21: a key that is not there is a broken file, not a bad row."""
    rows[4] = {key: value for key, value in rows[4].items() if key not in ("text", "answer")}
    source = write_rows(tmp_path / "set.jsonl", rows)
    commands = [
        ["train", written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run"))],
        ["data", "prepare", source, "--output", tmp_path / "out"],
        ["data", "inspect", source],
    ]
    for words in commands:
        assert "set.jsonl, line 5: the key 'text' is missing" in one_line(words, capsys)
    assert not (tmp_path / "out").exists()


def test_blank_transcripts_are_prepared_and_inspected_as_such(rows, tmp_path, capsys):
    """Case 21: preparing leaves out what has no text at all, an inspection names what has no word."""
    source, out = write_rows(tmp_path / "train.jsonl", with_blank(rows, answer=None)), tmp_path / "out"
    message = one_line(["data", "prepare", source, "--output", out], capsys)
    assert "3 of 36 clips cannot be used (3 without text)" in message
    assert main(["data", "prepare", str(source), "--output", str(out), "--max-quarantine-share", "0.1"]) == 0
    assert [clip.id for clip in iter_prepared(out, "train")][32:] == ["text-punctuation"], "a text, to whom it may be"
    capsys.readouterr()
    assert main(["data", "inspect", str(source), "--json", "--strict"]) == 2
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {finding["id"] for finding in findings if finding["kind"] == "no text"} == {f"text-{n}" for n in BLANK}


# Case 22

GOOD = b'{"id": "%d", "audio": "%s", "text": "one two %d", "duration": 0.5}'
BROKEN = {
    "latin-1": (b'{"id": "x", "audio": "a.wav", "text": "caf\xe9"}', "line 4: not UTF-8"),
    "half a line": (b'{"id": "x", "audio": "a.wa', "line 4: not a whole JSON object"),
    "half a character": (b'{"id": "x", "audio": "a.wav", "text": "caf\xc3', "line 4: not UTF-8"),
    "zeros of a crash": (b"\0" * 64, "line 4: not a whole JSON object"),
    "no object": (b'["x"]', "line 4: expected a JSON object"),
    "too deep": (b"[" * 100_000, "line 4: not an object that can be read"),
    "too many digits": (b'{"id": "x", "n": ' + b"9" * 5000 + b"}", "line 4: not an object that can be read"),
    "a number as text": (b'{"id": "x", "audio": "a.wav", "text": 7}', "line 4: 'text' must be a string"),
}


def manifest_lines(rows, count=3):
    return [json.dumps(row).encode() for row in rows[:count]]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_named_by_every_command(parts, rows, tmp_path, kind, capsys):
    """Case 22: file and line, exit code 2, nothing begun."""
    content, message = BROKEN[kind]
    source = tmp_path / "set.jsonl"
    for after in (b"", b"\n" + manifest_lines(rows)[0]):  # at the end, as a crash leaves it, and before other lines
        source.write_bytes(b"\r\n".join([*manifest_lines(rows), content]) + after)
        commands = [
            ["train", written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run"))],
            ["data", "prepare", source, "--output", tmp_path / "out"],
            ["data", "inspect", source],
        ]
        for words in commands:
            assert f"{source}, {message}" in one_line(words, capsys)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("name", ["set.jsonl", "metadata.csv"])
def test_marks_and_line_ends_of_windows_change_nothing(rows, tmp_path, name, capsys):
    """Case 22: a byte order mark and CRLF are read, UTF-16 is an error with its line."""
    if name.endswith(".csv"):
        text = "file_name,text\r\n" + "".join(f"{row['audio']},{row['text']}\r\n" for row in rows)
        source = tmp_path
    else:
        text, source = "".join(json.dumps(row) + "\r\n" for row in rows), tmp_path / name
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert main(["data", "inspect", str(source), "--json"]) == 0
    (split,) = json.loads(capsys.readouterr().out)["splits"]
    assert (split["num_clips"], split["vocabulary"]) == (32, 8)
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    assert f"{name}, line 1: not UTF-8" in one_line(["data", "inspect", source], capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"a.wav,caf\xe9", "line 3: not UTF-8"), (b"a.wav", "line 3: expected 2 columns"), (b'a.wav,"one', "not CSV")],
)
def test_a_broken_line_of_a_table_is_named(rows, tmp_path, line, message, capsys):
    """Case 22, in the metadata of an audio folder."""
    first = f"file_name,text\n{rows[0]['audio']},one\n".encode()
    (tmp_path / "metadata.csv").write_bytes(first + line + b"\n")
    assert message in one_line(["data", "inspect", tmp_path], capsys)
    found = one_line(["data", "prepare", tmp_path, "--output", tmp_path / "out"], capsys)
    assert f"{tmp_path}/metadata.csv, line " in found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fault", ["cut", "not UTF-8"])
def test_a_broken_parquet_file_is_named(parts, rows, tmp_path, fault, streaming, capsys):
    """Case 22: a table has no lines, so the file, or the row, is named."""
    folder = write_shards(tmp_path / "set", rows)
    path = folder / "train-00002-of-00004.parquet"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-300])
        message = f"{path} is damaged"
    else:
        table = pq.read_table(path)
        texts = pa.array([b"one"] * 3 + [b"caf\xe9"] * (len(table) - 3), pa.binary()).view(pa.string())
        pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", texts), path)
        message = "row 3: the column 'text' is not UTF-8" if streaming else "row 19: the column 'text' is not UTF-8"
    config = config_for(parts, folder, tmp_path / "run", steps=12, streaming=streaming)
    path = written(tmp_path / "run.yaml", config)
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ultravox: error")]
    assert [message in error for error in errors] == [True]
    if not streaming:
        assert message in one_line(["data", "inspect", folder], capsys)
        assert message in one_line(["data", "prepare", folder, "--output", tmp_path / "out"], capsys)


def test_half_of_a_character_is_a_bad_row(parts, rows, tmp_path, capsys):
    """Case 22's kin: JSON may name half of a surrogate pair, which no tokenizer and no file takes."""
    half = [{**rows[0], "id": "in-text", "text": "one \ud83d"}, {**rows[1], "id": "in-column", "topic": ["\udc00"]}]
    half.append({**rows[2], "id": "\ud83d"})
    source = write_rows(tmp_path / "train.jsonl", [*rows, *half])
    run = run_training(config_for(parts, source, tmp_path / "run", max_quarantine_share=0.1))
    assert set_aside(run) == {"not Unicode": sorted(["in-text", "in-column", "\\ud83d"])}
    assert "3 not Unicode" in one_line(["data", "prepare", source, "--output", tmp_path / "out"], capsys)
    assert main(["data", "inspect", str(source), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert sum(finding["kind"] == "unusable" for finding in findings) == 3


# Case 24


@pytest.mark.parametrize("pad", ["<|im_end|>", None, "<|endoftext|>"], ids=["pad is end", "no pad", "pad of its own"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_end_is_trained_whatever_the_padding_is(parts, rows, tmp_path, monkeypatch, pad, streaming):
    """Case 24: in a padded batch of a real run, each row's end token is a label, and no padding is."""
    folder = tmp_path / "llm"
    shutil.copytree(parts[0][0], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    source = write_shards(tmp_path / "set", rows) if streaming else write_rows(tmp_path / "set.jsonl", rows)
    changes = {"model": {"language_model": str(folder)}, "streaming": streaming}
    config = config_for(((folder, parts[0][1]), parts[1]), source, tmp_path / "run", **changes)
    model, processor = build_model(config.model), build_processor(config.model)
    assert processor.tokenizer.eos_token == "<|im_end|>"
    data = (prepare_stream if streaming else prepare_speech)(config, model, processor)
    task = TuneTask(model, processor, data, config.stages[0], 1)
    made = []
    monkeypatch.setattr(tune, "collate_tokens", lambda *a, **k: made.append(collate_tokens(*a, **k)) or made[-1])
    task.loss(task.batch())
    (tokens,) = made
    assert not tokens.mask.all(), "there is padding"
    for labels, mask in zip(tokens.labels, tokens.mask, strict=True):
        said = labels[labels != IGNORE_INDEX].tolist()
        assert said.count(processor.tokenizer.eos_token_id) == 1, "the end, once"
        assert torch.equal(labels[~mask], torch.full_like(labels[~mask], IGNORE_INDEX))
    run = run_training(config)
    assert all(math.isfinite(loss) for loss in losses_of(run))


@pytest.mark.parametrize(
    "prompt",
    ["<|audio|> or <|audio|>: {{ text }}", "{{ question }}"],
    ids=["in the template", "in the row's own words"],
)
def test_other_placeholders_than_recordings_are_an_error(parts, rows, tmp_path, prompt, capsys):
    """Case 24: one recording, two places to hear it."""
    for row in rows:
        row["question"] = "What does <|audio|> say?"
    source = write_rows(tmp_path / "set.jsonl", rows)
    config = config_for(parts, source, tmp_path / "run", source={"prompts": [prompt]})
    error = one_line(["train", written(tmp_path / "run.yaml", config)], capsys)
    assert "cannot be used" in error
    assert "placeholders" in error or "special token" in error


def test_frames_that_do_not_fit_the_placeholders_name_the_row(parts, rows, tmp_path):
    """Case 24: were there other frames than the text has room for, no step would be made of them."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    config = config_for(parts, source, tmp_path / "run")
    model, processor = build_model(config.model), build_processor(config.model)
    data = prepare_speech(config, model, processor)
    task = TuneTask(model, processor, data, config.stages[0], 1)
    batch = task.batch()
    batch.audio_tokens[1] = [count + 1 for count in batch.audio_tokens[1]]
    with pytest.raises(DataError, match=r"row 1 has \d+ <\|audio\|> positions, but its audio clips fill \d+"):
        task.loss(batch)


def test_a_row_brings_as_many_placeholders_as_recordings():
    """Case 24, where a row is a conversation of its own."""
    from ultravox.data.clip import RowFault, RowReader
    from ultravox.data.columns import Columns

    reader = RowReader(Columns(), lambda value: value, seconds_of=lambda audio: 1.0)
    turns = [{"role": "user", "content": "<|audio|>"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(RowFault, match=r"line 3: 2 recordings, 1 <\|audio\|> placeholders in row talk"):
        reader.clip({"id": "talk", "audio": ["a", "b"], "messages": turns}, "x.jsonl, line 3")
    clip = reader.clip({"id": "talk", "audio": ["a"], "messages": turns}, "x.jsonl, line 3")
    assert isinstance(clip, Clip)
    assert len(PromptTemplate("conversation").messages(clip)) == 2
