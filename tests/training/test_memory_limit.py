"""`max_batch_memory_gb` in whole runs: batches within the limit, its model in the checkpoint, out of memory or not."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import tiny_config
from torch import nn

from ultravox.config.schema import RunConfig
from ultravox.errors import DataError
from ultravox.training import memory_probe
from ultravox.training.checkpoint import checkpoint_folder, list_checkpoints, load_checkpoint
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.memory_model import MemoryModel, OfLongest
from ultravox.training.run import run_training
from ultravox.training.tune import TuneTask

counts_peaks = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not count peaks")


def tune_config(parts, run_dir, max_steps=4, **stage_changes):
    """The stage `tune` alone."""
    config = tiny_config(*parts, run_dir).model_dump(mode="json")
    (stage,) = config["stages"] = config["stages"][1:]
    stage["max_steps"], stage["optim"]["warmup_steps"] = max_steps, 1
    stage.update(stage_changes)
    return RunConfig.model_validate(config)


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [(row["stage"], row["step"], row["loss"]) for row in rows_of(run_dir) if "loss" in row]


def state_of(run_dir, step):
    return load_checkpoint(checkpoint_folder(run_dir, "tune", step)).state


@contextmanager
def watched(monkeypatch, before=lambda number: None):
    """Notes rows, longest audio and longest text of each batch that is trained on."""
    seen, inner = [], TuneTask.loss

    def loss(self, batch):
        before(len(seen) + 1)
        text = [len(ids) - len(counts) for ids, counts in zip(batch.input_ids, batch.audio_tokens, strict=True)]
        seen.append((len(batch.ids), max(map(sum, batch.audio_tokens)), max(text)))
        return inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TuneTask, "loss", loss)
        yield seen


@pytest.fixture
def invented(monkeypatch):
    """Probes take what a formula says: the same on every machine. Counts the probes."""
    probes = []

    def measure_task(task):
        def measure(num_rows, audio_tokens, text_tokens):
            probes.append((num_rows, audio_tokens, text_tokens))
            return 1_000_000 + 20_000 * audio_tokens + 10_000 * text_tokens

        return measure

    monkeypatch.setattr(memory_probe, "measure_task", measure_task)
    return probes


LIMIT_GB = 0.003
MOST = 3  # rows that fit into memory, where a test makes it so


def test_batches_are_planned_within_the_limit(parts, tmp_path, monkeypatch, invented):
    with watched(monkeypatch) as unlimited:
        run_training(tune_config(parts, tmp_path / "free"))
    assert not invented
    with watched(monkeypatch) as limited:
        run_training(tune_config(parts, tmp_path / "run", max_batch_memory_gb=LIMIT_GB))
    assert invented
    assert state_of(tmp_path / "free", 4)["memory"] is None
    memory = OfLongest(MemoryModel.from_json(state_of(tmp_path / "run", 4)["memory"]))
    free, taken = (memory.predict(*np.array(shapes).T) for shapes in (unlimited, limited))
    assert free.max() > LIMIT_GB * 1e9, "or the limit would change nothing"
    assert LIMIT_GB * 1e9 * 0.5 < taken.max() <= LIMIT_GB * 1e9


@pytest.mark.parametrize("call", [1, 6])
def test_a_resumed_run_uses_the_saved_model(parts, tmp_path, monkeypatch, invented, call):
    """Stopped in its first step, or later; a machine that measures otherwise changes nothing."""
    changes = {"max_batch_memory_gb": LIMIT_GB, "max_steps": 5}
    run_training(tune_config(parts, tmp_path / "whole", **changes))
    config = tune_config(parts, tmp_path / "run", **changes)

    def stop(number):
        if number == call:
            os.kill(os.getpid(), signal.SIGTERM)

    with watched(monkeypatch, before=stop), pytest.raises(TrainingInterrupted):
        run_training(config)
    (found,) = list_checkpoints(tmp_path / "run", ["tune"])
    invented.clear()
    run_training(config, resume=True)
    assert not invented, "nothing is measured again"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    states = [load_checkpoint(found).state, state_of(tmp_path / "run", 5), state_of(tmp_path / "whole", 5)]
    assert states[0]["step"] < 5
    for key in ("order", "memory"):
        assert states[0][key] == states[1][key] == states[2][key] is not None


def test_the_order_depends_on_the_model(parts, tmp_path, monkeypatch, invented):
    """A saved model that was tampered with is another order, and is refused."""
    from ultravox.errors import CheckpointError
    from ultravox.training import checkpoint, sharded_store

    config = tune_config(parts, tmp_path / "run", max_batch_memory_gb=LIMIT_GB, max_steps=2)
    run_training(config)
    inner = checkpoint.load_checkpoint

    def other(folder):
        found = inner(folder)
        found.state["memory"]["margin"] += 0.01
        return found

    monkeypatch.setattr(sharded_store, "load_checkpoint", other)
    with pytest.raises(CheckpointError, match="the order of the data"):
        run_training(config, resume=True)


@counts_peaks
def test_a_limit_that_no_example_fits_is_one_clear_error(parts, tmp_path):
    with pytest.raises(DataError) as caught:
        run_training(tune_config(parts, tmp_path / "run", max_batch_memory_gb=1e-9))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("stage tune: the largest example (")
    assert "but a batch may take 0.00 GB" in message
    assert "max_batch_memory_gb" in message


@counts_peaks
def test_no_batch_is_measured_that_would_take_more_than_the_limit(parts, tmp_path, monkeypatch):
    """Really measured. The largest batches that the stage allows would take two or three times the limit.

    In a model so small, what is made once for a new number of rows (compiled products, the allocator's arenas) may be
    as much as the batch itself. So each batch runs three times: the planner is told of the first run, the smaller of
    the others is judged, since whatever else the process does meanwhile can only add to one.
    """
    inner, taken, limit = memory_probe.measure_task, [], 0.06

    def measure_task(task):
        measure = inner(task)

        def noted(*shape):
            told = measure(*shape)
            taken.append((shape[1] + shape[2], min(measure(*shape), measure(*shape))))
            return told

        return noted

    monkeypatch.setattr(memory_probe, "measure_task", measure_task)
    run_training(tune_config(parts, tmp_path / "run", max_batch_tokens=16000, max_batch_memory_gb=limit, max_steps=1))
    assert max(size for _, size in taken) <= limit * 1e9
    assert 1000 < max(tokens for tokens, _ in taken) < 12000, "neither the smallest alone nor all"
    assert len(state_of(tmp_path / "run", 1)["memory"]["probes"]) >= 6


@counts_peaks
def test_measuring_draws_no_random_number_of_the_run(parts, tmp_path, monkeypatch):
    """With dropout, which draws some in every step, and a limit so wide that it changes no batch."""
    inner = TuneTask.__init__

    def init(self, *args):
        inner(self, *args)
        self.model.multi_modal_projector.linear_2.register_forward_pre_hook(
            lambda module, inputs: (nn.functional.dropout(inputs[0], 0.3, training=module.training),)
        )

    monkeypatch.setattr(TuneTask, "__init__", init)
    states = []
    for name, limit in (("free", None), ("wide", 1000.0)):
        torch.manual_seed(len(states))
        run_training(tune_config(parts, tmp_path / name, max_batch_memory_gb=limit))
        states.append(state_of(tmp_path / name, 4))
    free, wide = states
    assert losses(tmp_path / "free") == losses(tmp_path / "wide")
    for library in ("torch", "numpy"):  # Python's own moves with the checks of shapes, which are on in tests alone
        assert free["random"][library] == wide["random"][library], library
    assert free["memory"] is None
    assert len(wide["memory"]["probes"]) >= 6
    assert min(size for *_, size in wide["memory"]["probes"]) > 0


def test_a_batch_that_runs_out_of_memory_is_split_and_its_clips_are_named(parts, tmp_path, monkeypatch, capsys):
    config = tune_config(parts, tmp_path / "whole", augment={})  # masks would be drawn anew for each half
    run_training(config)
    whole, inner, batches = losses(tmp_path / "whole"), TuneTask.loss, []

    def loss(self, batch):
        batches.append(batch.ids)
        output = inner(self, batch)
        if len(batch.ids) > MOST:
            output.sum.backward()  # it fails when gradients are there already
            raise MemoryError
        return output

    monkeypatch.setattr(TuneTask, "loss", loss)
    capsys.readouterr()
    run_training(config.model_copy(update={"run_dir": str(tmp_path / "split")}))
    for (_, step, one), (_, other_step, other) in zip(whole, losses(tmp_path / "split"), strict=True):
        assert step == other_step
        assert one == pytest.approx(other, rel=1e-6 if step == 1 else 1e-4)
    named = [ids for row in rows_of(tmp_path / "split") for ids in row.get("split_ids", [])]
    assert named == [ids for ids in batches if len(ids) > MOST]
    assert named
    shown = " ".join(capsys.readouterr().err.split())
    assert f"tune step 1: {len(named[0])} clips did not fit into memory together and were run in halves" in shown
    summaries = [json.loads((tmp_path / name / "train.json").read_text())["stages"][0] for name in ("whole", "split")]
    for name in ("num_tokens", "audio_seconds", "steps", "skipped_steps", "epochs"):
        assert summaries[0][name] == pytest.approx(summaries[1][name]), name


def test_a_clip_that_does_not_fit_alone_ends_the_run_and_is_named(parts, tmp_path, monkeypatch):
    def loss(self, batch):
        raise MemoryError

    monkeypatch.setattr(TuneTask, "loss", loss)
    with pytest.raises(DataError, match=r"^tone-\d+ alone does not fit into memory: lower data\.max_audio_seconds"):
        run_training(tune_config(parts, tmp_path / "run"))
