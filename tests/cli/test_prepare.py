"""``ultravox data prepare``: what it prints, counts and refuses; a real kill of its processes."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ultravox.cli.main import main
from ultravox.data.prepared import iter_prepared, read_index, read_prepared, verify


@pytest.fixture
def corpus(tmp_path):
    """A folder with `train.jsonl` (20 rows) and `held-out.jsonl` (5 rows)."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, count in (("train", 20), ("held-out", 5)):
        lines = []
        for index in range(count):
            name = f"{split}-{index}.flac"
            samples = np.random.default_rng(hash_of(name)).integers(-9000, 9000, 8000 + 100 * index)
            soundfile.write(folder / name, samples.astype(np.int16), 16000)
            lines.append(json.dumps({"id": name, "audio": name, "text": f"row {index}", "licence": "CC0-1.0"}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def hash_of(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare(*words):
    return main(["data", "prepare", *map(str, words)])


def test_sources_become_one_folder(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    words = [corpus / "train.jsonl", corpus / "held-out.jsonl", "--output", out, "--workers", "1"]
    assert prepare(*words, "--shards-multiple-of", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["split", "rows", "audio", "shards", "MB"],
        ["train", "20", "11.2", "s", "4", "0.4"],
        ["held_out", "5", "2.6", "s", "4", "0.1"],
        ["prepared", str(out)],
    ]
    verify(out)
    assert [clip.text for clip in iter_prepared(out, "held_out")] == [f"row {index}" for index in range(5)]
    assert prepare(*words, "--shards-multiple-of", "4") == 0
    assert capsys.readouterr().out.endswith("(it was there already)\n")
    assert prepare(*words) == 2
    assert "holds another prepared dataset" in capsys.readouterr().err
    assert prepare(*words, "--overwrite") == 0
    assert len(read_prepared(out)["splits"]["train"]["shards"]) == 8


def test_a_split_may_be_chosen_and_sources_of_one_split_are_joined(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    (corpus / "more").mkdir()
    soundfile.write(corpus / "more" / "x.flac", np.ones(8000, np.int16), 16000)
    (corpus / "more" / "train.jsonl").write_text('{"id": "x", "audio": "x.flac", "text": "more"}\n')
    sources = [corpus / "train.jsonl", corpus / "held-out.jsonl", corpus / "more" / "train.jsonl"]
    assert prepare(*sources, "--output", out, "--splits", "train", "--workers", "1") == 0
    assert list(read_prepared(out)["splits"]) == ["train"]
    assert [clip.text for clip in iter_prepared(out, "train")][-2:] == ["row 19", "more"]
    assert [source["name"] for source in read_prepared(out)["sources"]] == list(map(str, sources))
    assert prepare(*sources, "--output", tmp_path / "no", "--splits", "dev") == 2
    assert "no source has a split 'dev': there is held-out, train" in capsys.readouterr().err


def test_what_a_dataset_says_of_itself_is_kept(tmp_path, monkeypatch, capsys):
    from ultravox.data.manifest import Clip, write_dataset

    folder = tmp_path / "set"
    (folder / "audio").mkdir(parents=True)
    soundfile.write(folder / "audio" / "a.flac", np.ones(8000, np.int16), 16000)
    clips = [Clip("a", folder / "audio" / "a.flac", "one", 0.5, licence="CC-BY-4.0")]
    write_dataset(folder, name="set", licence="CC-BY-4.0", attribution="By Ann.", splits={"train": clips})
    assert prepare(folder, "--output", tmp_path / "out", "--workers", "1") == 0
    info = read_prepared(tmp_path / "out")
    assert (info["licence"], info["attribution"], info["licences"]) == ("CC-BY-4.0", "By Ann.", {"CC-BY-4.0": 1})


def test_tokens_are_counted_by_the_model_named(corpus, tiny_models, tmp_path):
    out = tmp_path / "out"
    words = ["--tokenizer", tiny_models.llama, "--workers", "1"]
    assert prepare(corpus / "train.jsonl", "--output", out, *words) == 0
    counts = [len(clip.text) for clip in iter_prepared(out, "train")]  # a token is a byte there
    assert read_index(out, "train").num_tokens.tolist() == counts
    assert read_prepared(out)["options"]["tokenizer"] == str(tiny_models.llama)


def test_faults_are_printed_and_too_many_end_in_code_2(corpus, tmp_path, capsys):
    words = [corpus / "train.jsonl", "--output", tmp_path / "out", "--workers", "1"]
    (corpus / "train-3.flac").write_bytes(b"no audio at all, but many words")
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    (corpus / "train.jsonl").write_text("".join(json.dumps({**row, "duration": 0.5}) + "\n" for row in rows))
    assert prepare(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ultravox: error: 1 of 20 clips cannot be used (1 not readable as audio), more than")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert prepare(*words, "--max-quarantine-share", "0.05") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2:4] == ["1 × left out: not readable as audio", f"each is named in {tmp_path}/out/quarantine.jsonl"]


def test_the_same_recording_twice_fails_when_strict(corpus, tmp_path, capsys):
    (corpus / "train-3.flac").write_bytes((corpus / "train-9.flac").read_bytes())
    words = [corpus / "train.jsonl", "--output", tmp_path / "out", "--workers", "1"]
    assert prepare(*words) == 0
    assert "1 × the same recording as a row before: " in capsys.readouterr().out
    assert prepare(*words, "--strict") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "--workers takes a whole number from 1 to 1024, got 0"),
        (["--shards-multiple-of", "0"], "--shards-multiple-of takes a whole number from 1"),
        (["--max-shard-mb", "-1"], "--max-shard-mb takes a whole number from 1"),
        (["--max-quarantine-share", "1.5"], "--max-quarantine-share takes 0 to 1, got 1.5"),
        (["--min-seconds", "5", "--max-seconds", "4"], "in this order, and at most 600, got 5 and 4"),
        (["--max-seconds", "nan"], "in this order, and at most 600"),
        (["--engine", "spark"], "invalid choice: 'spark'"),
        (["--tokenizer", "no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(corpus, words, message, tmp_path, capsys):
    assert prepare(corpus / "train.jsonl", "--output", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("ultravox: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_without_ray_its_extra_is_named(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert prepare(corpus / "train.jsonl", "--output", tmp_path / "out", "--engine", "ray") == 2
    assert "pip install 'ultravox[ray]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at processes as Linux shows them")
def test_kill_9_of_the_command_leaves_no_worker_and_the_next_run_ends_it(corpus, tmp_path):
    words = [corpus / "train.jsonl", "--shards-multiple-of", "20", "--output"]
    assert prepare(*words, tmp_path / "whole", "--workers", "1") == 0
    output = tmp_path / "out"
    command = [sys.executable, "-m", "ultravox", "data", "prepare", *map(str, [*words, output, "--workers", "2"])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    workers: list[int] = []
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out.partial/work/*.json"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
        workers = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(workers) >= 2
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker waits for a parent that is gone"
        time.sleep(0.02)
    assert not output.exists()
    kept = {path.name: os.stat(path).st_ino for path in tmp_path.glob("out.partial/data/*.parquet")}
    assert len(kept) >= 3
    assert prepare(*words, output, "--workers", "1") == 0
    assert contents(output) == contents(tmp_path / "whole")
    same = [name for name, inode in kept.items() if os.stat(output / "data" / name).st_ino == inode]
    assert len(same) >= 3, "what was finished was not built again"


def test_columns_of_another_name_parts_of_recordings_and_missing_files(corpus, tmp_path, capsys):
    rows = [
        {"key": "whole", "audio": "train-0.flac", "sentence": "all of it", "topic": "a"},
        {"key": "part", "audio": "train-1.flac", "sentence": "the middle", "offset": 0.1, "duration": 0.25},
        {"key": "gone", "audio": "nowhere.flac", "sentence": "nothing"},
    ]
    (corpus / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [corpus / "theirs.jsonl", "--output", tmp_path / "out", "--workers", "1", "--columns", "id=key"]
    words += ["--columns", "text=sentence", "--max-quarantine-share", "0.5"]
    assert prepare(*words) == 0
    assert "1 × left out: missing audio" in capsys.readouterr().out
    whole, part = iter_prepared(tmp_path / "out", "theirs")
    assert (whole.id, whole.text, dict(whole.columns)) == ("whole", "all of it", {"topic": "a"})
    assert part.duration == 0.25
    samples, _ = soundfile.read(corpus / "train-1.flac", dtype="int16")
    assert np.array_equal(soundfile.read(io.BytesIO(part.audio.read()), dtype="int16")[0], samples[1600:5600])
    assert prepare(*words[:-2], "--columns", "text") == 2
    assert "--columns takes OURS=THEIRS" in capsys.readouterr().err


def test_columns_of_one_source_alone(corpus, tmp_path, capsys):
    """The other source has a column of that name, and means something else by it."""
    rows = [{"id": "theirs", "audio": "train-0.flac", "sentence": "what they say", "text": "a page number"}]
    (corpus / "train:2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [corpus / "train.jsonl", corpus / "train:2.jsonl"]
    words = [*sources, "--output", tmp_path / "out", "--workers", "1"]
    assert prepare(*words, "--columns", f"{sources[1]}:text=sentence") == 0
    assert [clip.text for clip in iter_prepared(tmp_path / "out", "train:2".replace(":", "_"))] == ["what they say"]
    assert next(iter(iter_prepared(tmp_path / "out", "train"))).text == "row 0"
    assert prepare(*words, "--columns", "text=sentence") == 2, "of all sources, and the first has no such column"
    assert "no column 'sentence' (named for 'text')" in capsys.readouterr().err
    assert prepare(*words, "--columns", "nowhere.jsonl:text=sentence") == 2
    assert "no source is called 'nowhere.jsonl' on this command line" in capsys.readouterr().err
    assert prepare(*words, "--columns", f"{sources[1]}:text") == 2
    assert "--columns takes OURS=THEIRS" in capsys.readouterr().err


def test_an_empty_split_is_named(tmp_path, capsys):
    for split, rows in (("train", "a.wav,one\n"), ("test", "")):
        (tmp_path / "set" / split).mkdir(parents=True)
        soundfile.write(tmp_path / "set" / split / "a.wav", np.sin(np.arange(8000) * 0.1) * 0.3, 16000)
        (tmp_path / "set" / split / "metadata.csv").write_text(f"file_name,text\n{rows}")
    assert main(["data", "inspect", str(tmp_path / "set")]) == 2
    assert "set, split 'test', holds no clips" in capsys.readouterr().err
    assert prepare(tmp_path / "set", "--output", tmp_path / "out", "--workers", "1") == 2
    assert "split 'test' holds no rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'?"),
        ("no-one/SmolLM2-135M-Instruct", "did you mean 'smollm2-135m-instruct'?"),
        ("bert-base", "be loaded"),
    ],
)
def test_a_misspelt_tokenizer(corpus, name, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert prepare(corpus / "train.jsonl", "--output", tmp_path / "out", "--workers", "1", "--tokenizer", name) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert ("did you mean" in error) == ("mean" in hint)
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_what_is_prepared_is_a_source_again(corpus, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert prepare(corpus / "train.jsonl", "--output", first, "--workers", "1") == 0
    assert prepare(first, "--output", second, "--workers", "1") == 0
    again = contents(second)
    assert {name: again[name] for name in again if "/" in name} == {
        name: content for name, content in contents(first).items() if "/" in name
    }
