"""Case 23: ids that stand twice, one recording under two ids, training data among the evaluation's."""

import json
import shutil
from pathlib import Path

import pytest
from faulty_runs import config_for, one_line, summary_of, write_rows, write_shards

from ultravox.cli.main import main
from ultravox.config.schema import RunConfig
from ultravox.data.prepared import iter_prepared
from ultravox.errors import DataError
from ultravox.training.run import run_training


def findings_of(words, capsys, code=0):
    capsys.readouterr()
    assert main(["data", "inspect", *map(str, words), "--json"]) == code
    return [(f["kind"], f["split"], f["id"]) for f in json.loads(capsys.readouterr().out)["findings"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_each_row_of_a_repeated_id_counts(parts, rows, tmp_path, streaming):
    """Case 23: twelve rows of one id are eleven too many, not one."""
    for row in rows[20:]:
        row["id"] = "same"
    source = write_shards(tmp_path / "set", rows) if streaming else write_rows(tmp_path / "set.jsonl", rows)
    changes = {"streaming": streaming, "stream_window": 64, "steps": 12}
    message = r"11 of 32 clips cannot be used \(11 id twice\).* the first is same \((shard \d, )?(line|row) \d+\)"
    with pytest.raises(DataError, match=message):
        run_training(config_for(parts, source, tmp_path / "strict", max_quarantine_share=0.3, **changes))
    run = run_training(config_for(parts, source, tmp_path / "run", max_quarantine_share=0.35, **changes))
    (count,) = summary_of(run)["quarantined"].values()
    assert count in ((11, 12) if streaming else (11,)), "in another epoch of a stream, another row comes first"
    assert all(name.startswith("same (") for name in summary_of(run)["quarantined_files"]["id twice"])


def test_repeated_ids_of_damaged_rows_count_too(parts, rows, tmp_path):
    """Case 23 and the threshold: rows of one name are as many faults as rows."""
    for row in rows[28:]:
        row |= {"id": "same", "audio": "nowhere.wav"}
    source = write_rows(tmp_path / "set.jsonl", rows)
    with pytest.raises(DataError, match=r"4 of 32 clips cannot be used \(4 missing audio\)"):
        run_training(config_for(parts, source, tmp_path / "run", max_quarantine_share=0.1))


def test_one_damaged_recording_of_many_rows_is_as_many_faults(parts, rows, tmp_path):
    """Case 23 and the threshold, where rows share a file that cannot be decoded."""
    broken = tmp_path / "broken.wav"
    broken.write_bytes(Path(rows[0]["audio"]).read_bytes()[:400])
    for row in rows[28:]:
        row["audio"] = str(broken)
    source = write_rows(tmp_path / "set.jsonl", rows)
    with pytest.raises(DataError, match=r"4 of 32 clips cannot be used \(4 damaged or truncated\)"):
        run_training(config_for(parts, source, tmp_path / "strict", max_quarantine_share=0.1))
    run = run_training(config_for(parts, source, tmp_path / "run", max_quarantine_share=0.13))
    (names,) = summary_of(run)["quarantined_files"].values()
    assert len(names) == 4
    assert str(broken) in names


@pytest.mark.parametrize("fault", ["missing audio", "without text", "damaged or truncated", "decoded"])
def test_one_dataset_for_two_tasks_has_its_faults_twice(parts, rows, tmp_path, fault):
    """The threshold, where two sources read the same rows: 2 of 64 and not 1, so that tasks do not thin faults out."""
    broken = tmp_path / "broken.wav"
    broken.write_bytes(Path(rows[0]["audio"]).read_bytes()[:400])
    bad = {"audio": "nowhere.wav"} if fault == "missing audio" else {"audio": str(broken)}
    rows[9] |= {"text": None, "answer": None} if fault == "without text" else bad
    source = write_rows(tmp_path / "set.jsonl", rows)
    cache = "none" if fault == "decoded" else "auto"
    content = config_for(parts, source, tmp_path / "run", cache=cache, steps=25).model_dump(mode="json")
    content["data"] |= {"max_quarantine_share": 1.5 / 64}
    content["data"]["sources"].append({**content["data"]["sources"][0], "task": "answer"})
    with pytest.raises(DataError, match=r"2 of 64 clips cannot be used"):
        run_training(RunConfig.model_validate(content))


def test_repeated_ids_are_left_out_of_what_is_prepared_and_fail_when_strict(rows, tmp_path, capsys):
    """Case 23: reported; with --strict by exit code 2, however few they are."""
    different = list({row["text"]: row for row in rows}.values())  # tones of one text are one recording
    many = [{**row, "id": f"{n}-{row['id']}", "audio": row["audio"]} for n, row in enumerate(different)]
    again = {**many[3], "text": "another text"}
    source, out = write_rows(tmp_path / "train.jsonl", [*many, again]), tmp_path / "out"
    words = ["data", "prepare", source, "--output", out, "--max-quarantine-share", "0.05"]
    assert main([str(word) for word in words]) == 0
    assert "1 × left out: id twice" in capsys.readouterr().out
    assert len(list(iter_prepared(out, "train"))) == len(many)
    assert main([*map(str, words), "--strict"]) == 2
    assert ("id twice", "train", again["id"]) in findings_of([source], capsys)
    assert findings_of([source, "--strict"], capsys, 2)
    assert "id twice" in one_line([*words[:5]], capsys), "one in thirty is more than 1%"


def test_one_recording_under_two_ids_is_reported(rows, tmp_path, capsys):
    """Case 23: by its content, wherever the file lies and whatever it is called."""
    shutil.copy(rows[5]["audio"], tmp_path / "copy.wav")
    twin = {**rows[5], "id": "twin", "audio": str(tmp_path / "copy.wav")}
    source = write_rows(tmp_path / "train.jsonl", [rows[5], rows[6], twin])
    assert findings_of([source], capsys)[-1] == ("audio twice", "train", "twin")
    assert findings_of([source, "--strict"], capsys, 2)
    words = ["data", "prepare", str(source), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "1 × the same recording as a row before" in capsys.readouterr().out
    assert main([*words, "--strict"]) == 2


@pytest.mark.parametrize(
    ("training", "evaluation"), [("train", "test"), ("calls_train", "calls"), ("a", "b"), ("validation", "train")]
)
@pytest.mark.parametrize("what", ["audio", "text"])
def test_training_data_in_the_evaluation_is_reported(rows, tmp_path, training, evaluation, what, capsys):
    """Case 23: a text or a recording that stands in both fails a strict inspection, whatever the splits are called."""
    first, shared = rows[0], {**rows[1], "id": "shared"}
    if what == "audio":
        shared |= {"audio": first["audio"], "text": "something else"}
    else:
        shared |= {"text": first["text"].upper() + "!"}
    paths = [
        write_rows(tmp_path / f"{training}.jsonl", [first]),
        write_rows(tmp_path / f"{evaluation}.jsonl", [shared]),
    ]
    kind = f"{what} in two splits"
    found = [finding for finding in findings_of(paths, capsys) if finding[0] == kind]
    assert len(found) == 1
    assert found[0][1] in (training, evaluation)
    assert findings_of([*paths, "--strict"], capsys, 2)
    (tmp_path / "unlike").mkdir()
    clean = write_rows(tmp_path / "unlike" / f"{evaluation}.jsonl", [{**rows[1], "text": "quite another"}])
    assert kind not in {finding[0] for finding in findings_of([paths[0], clean, "--strict"], capsys)}


def test_the_prepared_keep_both_and_say_so(rows, tmp_path, capsys):
    """Case 23: an overlap between the splits of one prepared dataset."""
    train = write_rows(tmp_path / "train.jsonl", rows[:3])
    test = write_rows(tmp_path / "test.jsonl", [{**rows[0], "id": "again"}])
    words = ["data", "prepare", str(train), str(test), "--output", str(tmp_path / "out")]
    assert main([*words, "--strict"]) == 2
    (line,) = (tmp_path / "out" / "same_audio.jsonl").read_text().splitlines()
    assert json.loads(line) == {"split": "test", "id": "again", "same_as": {"split": "train", "id": rows[0]["id"]}}
    kinds = {kind for kind, *_ in findings_of([tmp_path / "out", "--strict"], capsys, 2)}
    assert {"audio in two splits", "text in two splits"} <= kinds
