"""Whole runs on a stream of tones: what they train on, what they tell, resuming, refusals, rows that cannot be used."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config

from ultravox.config.load import parse_config
from ultravox.config.schema import RunConfig
from ultravox.data.fingerprint import uid
from ultravox.data.order import Position
from ultravox.data.source import SourceSpec
from ultravox.data.streaming import StreamSource
from ultravox.errors import CheckpointError, ConfigError, DataError
from ultravox.model.factory import build_model, build_processor
from ultravox.training.checkpoint import list_checkpoints, load_checkpoint
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.run import run_training
from ultravox.training.stream import prepare_stream
from ultravox.training.tune import TuneTask

SHARDS, CLIPS = 4, 32
STEPS = 14


def write_shards(tones: Path, folder: Path, **changes: dict) -> Path:
    """The tones as a few Parquet files with the audio inside; `changes` to some rows, by their ids."""
    folder.mkdir()
    rows = [json.loads(line) for line in (tones / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = {"bytes": (tones / row["audio"]).read_bytes(), "path": row["audio"]}
        row.update(changes.get(row["id"].replace("-", "_"), {}))
    for shard in range(SHARDS):
        mine = rows[shard * CLIPS // SHARDS : (shard + 1) * CLIPS // SHARDS]
        pq.write_table(pa.Table.from_pylist(mine), folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def shards(parts, tmp_path_factory):
    return write_shards(parts[1], tmp_path_factory.mktemp("shards") / "tones")


def stream_config(parts, shards, run_dir, workers=0, window=10, source=(), **stage):
    """Two speeds, all prompts, accumulation over windows, masks on frames, and another speed in every epoch."""
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    tune = content["stages"][1]
    tune["augment"]["waveform"]["speed"] = 0.1
    content["stages"] = [{**tune, "max_steps": STEPS, "max_batch_tokens": 250, "accumulation_steps": 3, **stage}]
    content["data"] |= {
        "sources": [{"name": str(shards), "streaming": True, "prompts": "all", **dict(source)}],
        "stream_window": window,
        "loader": {"workers": workers, "prefetch": 2},
    }
    content["logging"]["samples"] = True
    return RunConfig.model_validate(content)


def log(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def attempts(run, stage="tune"):
    """A row for each example that was trained on, with its step counted from 1."""
    lines = (run / "samples" / stage / "samples-rank0.jsonl").read_text().splitlines()
    batches = [batch for batch in map(json.loads, lines) if "uids" in batch]
    return [batch | {"step": batch["step"] + 1, "uid": name} for batch in batches for name in batch["uids"]]


def samples(run):
    """Step → (micro batch, epoch, uid) of the examples, by the last attempt at it."""
    found = {}
    rows = attempts(run)
    last = {row["step"]: row["attempt"] for row in rows}
    for row in rows:
        if row["attempt"] == last[row["step"]]:
            found.setdefault(row["step"], []).append((row["micro_batch"], row["epoch"], row["uid"]))
    return found


@pytest.fixture(scope="module")
def whole(parts, shards, tmp_path_factory):
    """One uninterrupted run, to hold the others against."""
    os.environ.setdefault("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    return run_training(stream_config(parts, shards, tmp_path_factory.mktemp("whole") / "run", checkpoint_every=9))


def assert_same_run(run, other):
    assert log(run) == log(other)
    assert samples(run) == samples(other)
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_a_run_trains_on_each_row_once_in_an_epoch(whole, shards):
    fingerprint = StreamSource(SourceSpec(str(shards), streaming=True), window=10, seed=1).fingerprint
    fingerprint = f"0 transcription {fingerprint}"
    everything = {uid(fingerprint, f"tone-{number:03d}") for number in range(CLIPS)}
    seen = Counter((epoch, name) for rows in samples(whole).values() for _, epoch, name in rows)
    assert set(seen.values()) == {1}
    last = max(epoch for epoch, _ in seen)
    assert last >= 1
    for epoch in range(last):
        assert {name for e, name in seen if e == epoch} == everything


def test_what_a_run_on_a_stream_tells(whole):
    summary = json.loads((whole / "train.json").read_text())
    (stage,) = summary["stages"]
    seen = [epoch for rows in samples(whole).values() for _, epoch, _ in rows]
    assert stage["epochs"] == pytest.approx(len(seen) / CLIPS, abs=0.3)
    assert max(seen) <= stage["epochs"] <= max(seen) + 1
    assert [*stage["mixture"].values()] == [{"requested": 1.0, "realised": 1.0}]
    assert (summary["num_clips"], summary["audio_seconds"], stage["num_examples"]) == (None, None, None)
    assert (summary["num_progress_clips"], summary["feature_cache_seconds"], summary["quarantined"]) == (0, 0.0, {})
    assert stage["audio_seconds"] > 0
    assert [step for step, *_ in log(whole)] == list(range(1, STEPS + 1))
    assert all(loss > 0 for _, loss, _ in log(whole))
    assert (whole / "model" / "model.safetensors").is_file()


def test_a_run_says_where_its_clips_come_from_and_caches_nothing(parts, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    run_training(stream_config(parts, shards, tmp_path / "run", max_steps=1, optim={}))
    said = " ".join(capsys.readouterr().err.split())
    assert 'streamed from 4 shards in windows of 10 clips (none are kept out for "WER so far")' in said
    assert not list((tmp_path / "home").rglob("*.*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_bit_for_bit(parts, shards, whole, tmp_path, monkeypatch, workers):
    """The signal comes in mid-step, mid-window and mid-epoch, while the loader has gone on to later windows."""
    config = stream_config(parts, shards, tmp_path / "run", workers)
    inner, calls = TuneTask.loss, []

    def loss(self, batch):
        calls.append(batch)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TuneTask, "loss", loss)
        with pytest.raises(TrainingInterrupted):
            run_training(config)
    state = load_checkpoint(list_checkpoints(tmp_path / "run", ["tune"])[-1]).state
    assert (state["step"], state["loop"]["epoch"]) == (5, 0)
    assert state["loop"]["window"] > 0
    assert state["loop"]["batch"] > 0
    assert state["stream"]["row"] > 0
    torch.manual_seed(99)
    run_training(stream_config(parts, shards, tmp_path / "run", 2 - workers), resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_run_goes_on_from_an_earlier_checkpoint(parts, shards, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    earlier, last = list_checkpoints(tmp_path / "run", ["tune"])
    assert earlier.name == "tune-000009"
    shutil.rmtree(last)
    run_training(stream_config(parts, shards, tmp_path / "run"), resume=True)
    assert_same_run(tmp_path / "run", whole)
    assert {row["attempt"] for row in attempts(tmp_path / "run")} == {0, 1}


def test_each_stage_begins_at_the_streams_beginning(parts, shards, whole, tmp_path):
    content = stream_config(parts, shards, tmp_path / "run", max_steps=3, optim={}).model_dump(mode="json")
    content["stages"].append({**content["stages"][0], "name": "more"})
    run = run_training(RunConfig.model_validate(content))
    rows = {stage: [row["uid"] for row in attempts(run, stage)] for stage in ("tune", "more")}
    assert rows["tune"] == rows["more"]
    assert rows["tune"] == [name for step in (1, 2, 3) for *_, name in samples(whole)[step]]


def test_another_dataset_template_or_number_of_processes_is_refused(parts, shards, whole, tmp_path):
    shutil.copytree(shards, tmp_path / "tones")
    run_training(stream_config(parts, tmp_path / "tones", tmp_path / "run", max_steps=1, optim={}))
    config = stream_config(parts, tmp_path / "tones", tmp_path / "run", max_steps=1, optim={})
    model, processor = build_model(config.model), build_processor(config.model)
    data = prepare_stream(config, model, processor, rank=1, world_size=2)
    state = load_checkpoint(list_checkpoints(whole, ["tune"])[-1]).state
    task = TuneTask(model, processor, data, config.stages[0], 1)
    with pytest.raises(CheckpointError, match="was saved with number of processes 1, now it is 2: go on"):
        task.go_to(Position(0, state["loop"]["window"], 0), state["stream"])

    template = processor.tokenizer.chat_template
    processor.tokenizer.chat_template = template.replace("<|im_end|>\n", "<|im_end|>")
    other = prepare_stream(config, model, processor, rank=1, world_size=2)
    assert other.fingerprints != data.fingerprints, "tokens are part of what a resume must find unchanged"

    pq.write_table(
        pq.read_table(tmp_path / "tones" / "train-00000-of-00004.parquet").slice(1),
        tmp_path / "tones" / "train-00000-of-00004.parquet",
    )
    with pytest.raises(
        CheckpointError,
        match=r"the training data differs: .*tones/train/transcription has other texts",
    ):
        run_training(config, resume=True)


YAML = """
version: 1
data:
  sources:
    - {name: talks, streaming: true}
stages:
  - {name: tune, objective: tune, max_steps: 1}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("true}", "true}\n    - {name: asterisk-en}"),
            "'talks' is streamed and 'asterisk-en' is not: set streaming: true on all sources (a folder of",
        ),
        (
            ("sources:", "temperature: 2\n  sources:"),
            "temperature weighs sources by their sizes, and a stream has none: give sources weights",
        ),
        (
            ("true}", "true, weight: 1}\n    - {name: books, streaming: true, repeat: 2, weight: 1}"),
            "source 'books' has repeat beside weights",
        ),
        (
            ("true}", "true}\n    - {name: books, streaming: true, repeat: 2}"),
            "'books' is streamed, each clip once in an epoch: leave out repeat; give sources weights",
        ),
        (
            ("true}", "true}\n    - {name: books, streaming: true, weight: 2}"),
            "'books' has a weight and 'talks' has none",
        ),
        (("true}", "true, repeat: 2}"), "'talks' is streamed, each clip once in an epoch: leave out repeat"),
        (("true}", "true, max_hours: 2}"), "leave out max_hours"),
        (("steps: 1}", "steps: 1, max_batch_memory_gb: 2}"), "max_batch_memory_gb needs all lengths before it begins"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(change, message):
    assert parse_config(YAML, "c.yaml").data.streaming
    with pytest.raises(ConfigError) as caught:
        parse_config(YAML.replace(*change), "c.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stage_of_no_steps_may_align(parts):
    text = YAML + "  - {name: align, objective: align, max_steps: 0}\n"
    assert [stage.name for stage in parse_config(text, "c.yaml").stages] == ["tune"]


def test_a_template_that_names_a_missing_column_stops_the_run_before_it_begins(parts, shards, tmp_path):
    config = stream_config(parts, shards, tmp_path / "run", source={"prompts": ["In {{ dialect }}"]})
    with pytest.raises(DataError, match=r"needs the column 'dialect', which source .*tones has not"):
        run_training(config)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_rows_that_cannot_be_used_are_left_out_and_named(parts, tmp_path):
    """Of each kind one: what the source, the template, the limits and the decoder refuse."""
    whole = (parts[1] / "audio" / "004.wav").read_bytes()
    shards = write_shards(
        parts[1],
        tmp_path / "tones",
        tone_001={"text": " ", "answer": None},
        tone_002={"text": "one <|im_end|> two"},
        tone_003={"duration": 99.0},
        tone_004={"audio": {"bytes": whole[:44], "path": "004.wav"}},
    )
    config = stream_config(parts, shards, tmp_path / "run").model_dump(mode="json")
    with pytest.raises(DataError, match=r"\d of \d+ clips cannot be used"):
        run_training(RunConfig.model_validate(config))
    config["data"]["max_quarantine_share"] = 0.2
    run = run_training(RunConfig.model_validate(config))
    files = json.loads((run / "train.json").read_text())["quarantined_files"]
    assert sorted(name for names in files.values() for name in names) == [f"tone-00{n}" for n in (1, 2, 3, 4)]
    assert files["too long"] == ["tone-003"]
    assert files["with a special token in its text"] == ["tone-002"]
    assert len({name for rows in samples(run).values() for *_, name in rows}) == CLIPS - 4


def test_a_row_that_does_not_fit_its_template_is_named_with_what_did_not(parts, tmp_path):
    shards = write_shards(parts[1], tmp_path / "tones", tone_002={"text": "bad"})
    prompt = "{{ 1 // ((text != 'bad') | int) }}"
    config = stream_config(parts, shards, tmp_path / "run", source={"prompts": [prompt]}).model_dump(mode="json")
    config["data"]["max_quarantine_share"] = 0.2
    run = run_training(RunConfig.model_validate(config))
    ((reason, (name,)),) = json.loads((run / "train.json").read_text())["quarantined_files"].items()
    assert reason == "with values that do not fit its template"
    assert name.startswith(f"tone-002 (the template {prompt!r} fails with text = 'bad': integer ")


def test_recordings_that_cannot_be_decoded_end_the_run_when_they_are_too_many(parts, shards, tmp_path):
    """In the first epoch, a few rows are judged as if those to come were good; at its end, all are."""
    config = stream_config(parts, shards, tmp_path / "run")
    data = prepare_stream(config, build_model(config.model), build_processor(config.model))
    data.set_aside([("empty", "a")], 30, epoch=0)
    with pytest.raises(DataError, match=r"1 of 30 clips cannot be used \(1 empty\)"):
        data.set_aside([], 30, epoch=1)
    data.num_rows = 0
    data.set_aside([], 900, epoch=0)
    with pytest.raises(DataError, match=r"12 of 1000 clips cannot be used"):
        data.set_aside([("empty", f"c{n}") for n in range(11)], 100, epoch=0)
