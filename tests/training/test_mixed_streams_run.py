"""Whole runs on several streams: what they train on, going on after a stop, `align` before `tune`, the audit."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config

from ultravox.cli.main import main
from ultravox.config.load import dump_config, load_config
from ultravox.config.schema import RunConfig
from ultravox.data.order import Position
from ultravox.data.sample_log import SampleLog
from ultravox.errors import CheckpointError, ConfigError, DataError
from ultravox.model.factory import build_model, build_processor
from ultravox.training.align import TOKEN_IDS, AlignTask
from ultravox.training.audit import audit_run
from ultravox.training.checkpoint import list_checkpoints, load_checkpoint
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.run import run_training
from ultravox.training.stream import prepare_stream
from ultravox.training.tune import TuneTask

CLIPS = 32
WEIGHTS = {"tones": 5, "other": 2, "texts": 1}


def write_rows(folder, rows, num_shards):
    folder.mkdir()
    each = -(-len(rows) // num_shards)
    for shard in range(num_shards):
        mine = rows[shard * each : (shard + 1) * each]
        pq.write_table(pa.Table.from_pylist(mine), folder / f"train-{shard:05d}-of-{num_shards:05d}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def streams(parts, tmp_path_factory):
    """The tones in four shards, ten of them in two more with other ids and new words, and six rows of text alone."""
    root = tmp_path_factory.mktemp("streams")
    rows = [json.loads(line) for line in (parts[1] / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = {"bytes": (parts[1] / row["audio"]).read_bytes(), "path": row["audio"]}
    # Their words come in no other stream, and behind the first rows: what `align` starts with does not hold them.
    other = [row | {"id": f"x{n}", "text": "zq"} for n, row in enumerate(rows[:10])]
    texts = [{"id": f"t{n}", "prompt": f"yes {n}", "text": f"one {n}", "response": f"one two {n}"} for n in range(6)]
    return {
        "tones": write_rows(root / "tones", rows, 4),
        "other": write_rows(root / "other", other, 2),
        "texts": write_rows(root / "texts", texts, 2),
    }


def config_of(parts, streams, run_dir, stages=(("tune", 12),), weights=WEIGHTS, **data):
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    kinds = {stage["objective"]: stage for stage in content["stages"]}
    short = {"accumulation_steps": 2, "checkpoint_every": 5, "optim": {"warmup_steps": 0}}
    tokens = {"align": 100, "tune": 250}  # so that a window has several steps
    content["stages"] = [
        kinds[name] | short | {"name": name, "max_steps": steps, "max_batch_tokens": tokens[name]}
        for name, steps in stages
    ]
    sources = [
        {"name": streams["tones"], "prompts": "all", "weight": weights["tones"]},
        {"name": streams["other"], "speeds": [1.1], "weight": weights["other"]},
        {"name": streams["texts"], "task": "text", "weight": weights["texts"]},
    ]
    content["data"] |= {
        "sources": [{**source, "streaming": True} for source in sources],
        "stream_window": 16,
        "speeds": [0.9, 1.0],
        **data,
    }
    content["logging"]["samples"] = True
    return RunConfig.model_validate(content)


def lines(run, stage="tune"):
    text = (run / "samples" / stage / "samples-rank0.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "uids" in line]


def log(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def assert_same_run(run, other):
    assert log(run) == log(other)
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


@pytest.fixture(scope="module")
def whole(parts, streams, tmp_path_factory):
    """One uninterrupted run of both stages."""
    os.environ.setdefault("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    stages = (("align", 9), ("tune", 12))
    return run_training(config_of(parts, streams, tmp_path_factory.mktemp("whole") / "run", stages))


def test_all_streams_come_in_their_shares_each_row_once_in_an_epoch_of_its_own(whole, streams):
    summary = json.loads((whole / "train.json").read_text())
    align, tune = summary["stages"]
    rows = [
        triple for line in lines(whole) for triple in zip(line["sources"], line["epochs"], line["uids"], strict=True)
    ]
    counts = Counter(source for source, *_ in rows)
    keys = [f"{streams['tones']}/train/transcription", f"{streams['other']}/train/transcription"]
    keys.append(f"{streams['texts']}/train/text")
    assert list(tune["mixture"]) == keys
    for key, weight in zip(keys, WEIGHTS.values(), strict=True):
        assert tune["mixture"][key]["requested"] == weight / 8
        assert tune["mixture"][key]["realised"] == pytest.approx(counts[key] / len(rows), abs=1e-12)
        assert abs(counts[key] - len(rows) * weight / 8) < 16
    assert list(align["mixture"]) == keys[:2], "text alone has nothing to align"
    assert set(Counter(rows).values()) == {1}
    assert max(epoch for source, epoch, _ in rows if source == keys[2]) >= 1
    first = lines(whole, "align")[0]["epochs"]
    assert set(first) == {0}, "each stage begins its own pass"
    assert {line["epochs"][0] for line in lines(whole)[:1]} == {0}
    assert summary["num_clips"] is None


def test_the_first_epochs_are_whole(whole, streams):
    for stage in ("align", "tune"):
        seen = Counter()
        for line in lines(whole, stage):
            seen.update(zip(line["sources"], line["epochs"], strict=True))
        key = f"{streams['other']}/train/transcription"
        assert seen[key, 0] == 10


@pytest.mark.parametrize(("stage", "task"), [("align", AlignTask), ("tune", TuneTask)])
def test_a_stopped_run_goes_on_bit_for_bit(parts, streams, whole, tmp_path, monkeypatch, stage, task):
    """The signal comes in mid-step and mid-window."""
    stages = (("align", 9), ("tune", 12))
    inner, calls = task.loss, []
    windows = [line["window"] for line in lines(whole, stage)]  # of two batches each
    step = next(k for k in range(2, 9) if k != 5 and windows[2 * k - 1] == windows[2 * k] > 0)

    def loss(self, batch):
        calls.append(batch)
        if len(calls) == 2 * step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", loss)
        with pytest.raises(TrainingInterrupted):
            run_training(config_of(parts, streams, tmp_path / "run", stages))
    state = load_checkpoint(list_checkpoints(tmp_path / "run", ["align", "tune"])[-1]).state
    assert (state["stage"], state["step"]) == (stage, step)
    assert state["loop"]["window"] > 0
    assert state["loop"]["batch"] > 0
    assert sum(state["stream"]["used"]) > 0
    torch.manual_seed(99)
    run_training(config_of(parts, streams, tmp_path / "run", stages, loader={"workers": 2}), resume=True)
    assert_same_run(tmp_path / "run", whole)
    assert all(
        report.ok for report in audit_run(tmp_path / "run", load_config(tmp_path / "run" / "config.yaml")).values()
    )


KILLED = """
import os, signal, sys
from ultravox.config.load import load_config
from ultravox.training.run import run_training
from ultravox.training.tune import TuneTask
inner, calls = TuneTask.loss, []
def loss(self, batch):
    calls.append(batch)
    if len(calls) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(self, batch)
TuneTask.loss = loss
run_training(load_config(sys.argv[1]))
"""


def test_a_killed_run_goes_on_bit_for_bit(parts, streams, whole, tmp_path):
    config = config_of(parts, streams, tmp_path / "run", (("align", 9), ("tune", 12)))
    (tmp_path / "c.yaml").write_text(dump_config(config))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "c.yaml")], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    state = load_checkpoint(list_checkpoints(tmp_path / "run", ["align", "tune"])[-1]).state
    assert (state["stage"], state["step"]) == ("tune", 5), "three steps of two batches are lost"
    run_training(config, resume=True)
    assert_same_run(tmp_path / "run", whole)
    reports = audit_run(tmp_path / "run", config)
    assert reports["tune"].num_superseded > 0
    assert all(report.ok for report in reports.values())


def test_another_weight_or_source_is_refused_on_resume(parts, streams, whole, tmp_path):
    config = config_of(parts, streams, tmp_path / "run", (("tune", 5),))
    run_training(config)
    other = config_of(parts, streams, tmp_path / "run", (("tune", 5),), WEIGHTS | {"texts": 2})
    with pytest.raises(CheckpointError, match=r"the configuration differs: .*weight"):
        run_training(other, resume=True)
    fewer = config.model_dump(mode="json")
    fewer["data"]["sources"].pop()
    with pytest.raises(CheckpointError, match="the configuration differs"):
        run_training(RunConfig.model_validate(fewer), resume=True)


def test_align_begins_with_the_tokens_of_the_first_rows_and_learns_the_others(parts, streams, whole, tmp_path):
    config = config_of(parts, streams, tmp_path / "run", (("align", 9),))
    model, processor = build_model(config.model), build_processor(config.model)
    data = prepare_stream(config, model, processor)
    data.vocabularies[1] = data.vocabularies[1][:0]  # as if the second stream's words came later
    task = AlignTask(model, processor, data, config.stages[0], config.seed)
    begin = task.alignment.token_ids.clone()
    new = torch.tensor(processor.tokenizer.encode(" zq", add_special_tokens=False))
    assert not set(new.tolist()) <= set(begin.tolist())
    for window in range(3):
        for index in range(task.order.num_batches(0, window)):
            batch = task.make_batch(task.order.batch(0, window, index), Position(0, window, index))
            assert torch.isfinite(task.loss(batch).sum)
    after = task.alignment.token_ids
    assert torch.equal(after[: len(begin)], begin)
    assert set(new.tolist()) <= set(after.tolist())
    table = model.get_input_embeddings().weight
    assert torch.equal(task.alignment.rows, table[after].float())
    assert torch.equal(task.alignment.row_of_token[after], torch.arange(len(after)) + 1)

    other = AlignTask(model, processor, data, config.stages[0], config.seed)
    assert len(other.alignment.token_ids) == len(begin)
    other.load_trainable_state({name: tensor.clone() for name, tensor in task.trainable_state().items()})
    assert torch.equal(other.alignment.token_ids, after)
    assert torch.equal(other.alignment.rows, task.alignment.rows)
    checkpoint = load_checkpoint(list_checkpoints(whole, ["align", "tune"])[0])
    assert (TOKEN_IDS in checkpoint.trainable) == (checkpoint.state["stage"] == "align")


def test_rows_that_have_nothing_to_align_are_counted_and_are_no_fault(parts, streams, tmp_path):
    rows = pq.read_table(streams["other"]).to_pylist()
    long = [row | {"id": f"l{n}", "text": "one two three " * 40} for n, row in enumerate(rows)]
    mixed = write_rows(tmp_path / "mixed", [*rows, *long[:3]], 1)
    config = config_of(parts, streams | {"other": mixed}, tmp_path / "run", (("align", 9),))
    run = run_training(config)
    summary = json.loads((run / "train.json").read_text())
    assert sorted(summary["quarantined_files"]["not fit for the stage's objective"]) == ["l0", "l1", "l2"]
    (stage,) = summary["stages"]
    shares = [share["realised"] for share in stage["mixture"].values()]
    assert shares[1] == pytest.approx(2 / 7, abs=0.05)
    assert audit_run(run, config)["align"].ok


def test_an_align_stage_without_a_transcript_is_refused(parts, streams, tmp_path):
    config = config_of(parts, streams, tmp_path / "run", (("align", 3),), max_audio_seconds=0.2)
    with pytest.raises(DataError, match="stage align: the first rows of its streams have no transcript to align to"):
        run_training(config)


def test_the_audit_of_a_run_on_streams(whole, capsys):
    assert main(["data", "audit", str(whole), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert list(stages) == ["align", "tune"]
    checks = {check["name"]: check["passed"] for check in stages["tune"]["checks"]}
    assert sum(name.endswith(": coverage") for name in checks) == 3
    judged = [name for name, passed in checks.items() if passed]
    assert {"known examples", "steps", "windows", "mixture"} <= set(judged)
    assert all(passed is not False for passed in checks.values())


def tampered(whole, tmp_path, change):
    """The audit's failed checks, when the log of the stage `tune` is another."""
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "samples" / "tune" / "samples-rank0.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    change(found)
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    report = audit_run(tmp_path / "run", load_config(tmp_path / "run" / "config.yaml"))["tune"]
    return {check.name.rpartition(": ")[2] for check in report.checks if check.passed is False}


def drop_row(found):
    place = found[2]
    for name in ("uids", "sources", "epochs"):
        place[name].pop()


def repeat_row(found):
    for name in ("uids", "sources", "epochs"):
        found[3][name].append(found[2][name][0])


def swap_windows(found):
    found[1]["window"] = 3


def unknown(found):
    found[2]["uids"][0] = "0" * 16


@pytest.mark.parametrize(
    ("change", "failing"),
    [(drop_row, "coverage"), (repeat_row, "repeats"), (swap_windows, "windows"), (unknown, "known examples")],
)
def test_the_audit_sees_what_is_wrong(whole, tmp_path, change, failing):
    assert failing in tampered(whole, tmp_path, change)


def test_the_audit_sees_other_shares(whole, tmp_path, streams):
    def change(found):
        for line in found[1:]:
            line["sources"] = [f"{streams['tones']}/train/transcription"] * len(line["uids"])

    assert {"mixture", "coverage", "known examples"} <= tampered(whole, tmp_path, change)


def test_the_plan_of_a_stream_cannot_be_audited(parts, streams, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(dump_config(config_of(parts, streams, tmp_path / "run")))
    assert main(["data", "audit", str(tmp_path / "c.yaml")]) == 2
    assert "train with --logging.samples true and audit the run folder" in capsys.readouterr().err


def test_a_log_with_other_epochs_than_rows_is_refused(tmp_path):
    with (
        SampleLog(tmp_path, rank=0, world_size=1, attempt=0, first_step=0) as found,
        pytest.raises(ValueError, match="1 uids"),
    ):
        found.write(step=0, micro_batch=0, worker=0, epoch=0, uids=["0" * 16], sources=["a"], epochs=[0, 1], window=0)


def test_a_run_of_which_a_source_is_not_streamed_is_refused(parts, streams, tmp_path):
    config = config_of(parts, streams, tmp_path / "run")
    text = dump_config(config).replace("streaming: true", "streaming: false", 1)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="set streaming: true on all sources"):
        load_config(tmp_path / "c.yaml")
