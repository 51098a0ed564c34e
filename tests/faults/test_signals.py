"""Case 6: SIGTERM at the worst moments. Cases 11 and 13: losses that are not finite, or far above the usual."""

import json
import math
import os
import signal

import pytest
import torch
from faulty_runs import config_for, write_rows, written
from toy_task import Recorder, ToyTask, spiking_task, toy_optimizer

import ultravox.training.checkpoint_store as store_module
from ultravox.cli.main import main
from ultravox.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, random_state
from ultravox.training.checkpoint import restore_random_state as restore
from ultravox.training.checkpoint_store import CheckpointStore
from ultravox.training.interrupt import TrainingInterrupted, stop_on_signals
from ultravox.training.optim import Optimizer
from ultravox.training.trackers.jsonl import JsonLinesLog
from ultravox.training.trainer import LoopSettings, LoopState, run_stage
from ultravox.training.tune import TuneTask

STEPS = 12


def run(folder, *, background=True, task=None):
    """A run of two batches a step, from a checkpoint where there is one; the task and its losses, whatever ends it."""
    task = task or ToyTask(num_examples=64)
    optimizer = toy_optimizer(task)
    recorder, state, ended = Recorder(), LoopState(), None
    torch.manual_seed(5)
    if found := list_checkpoints(folder, ["toy"]):
        checkpoint = load_checkpoint(found[-1])
        task.load_trainable_state(checkpoint.trainable)
        optimizer.load_state_dict(checkpoint.optimizer)
        restore(checkpoint.state["random"])
        state = LoopState(**checkpoint.state["loop"])
    settings = LoopSettings(stage="toy", max_steps=STEPS, checkpoint_every=4, evaluate_every=3)
    try:
        with CheckpointStore(folder, ["toy"], background=background) as store, stop_on_signals() as stop:

            def save(state):
                content = {"loop": state.to_json(), "random": random_state()}
                store.save("toy", state.step, Checkpoint(task.trainable_state(), optimizer.state_dict(), content))

            def load(state):
                return task.load(state, batches_per_step=2)

            run_stage(
                task,
                optimizer,
                settings,
                load,
                state=state,
                callbacks=[recorder],
                save=save,
                settle=store.settle,
                stop=stop,
            )
    except TrainingInterrupted as error:
        ended = error
    return task, recorder.losses, ended


def at_call(monkeypatch, owner, name, call, *, times=1):
    """SIGTERM in one call of a function, the first of which is 1."""
    inner, calls = getattr(owner, name), []

    def sent(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, sent)


MOMENTS = {
    "in a step": ([(Optimizer, "step", 6, 1)], 6),
    "between two batches of a step": ([(ToyTask, "loss", 12, 1)], 6),
    "while batches are made": ([(ToyTask, "make_batch", 9, 1)], None),
    "in an evaluation": ([(ToyTask, "evaluate", 2, 1)], 6),
    "in a save": ([(store_module, "save_checkpoint", 1, 1)], None),
    "twice at once": ([(Optimizer, "step", 6, 2)], 6),
    "twice, the second time in the save that follows": (
        [(Optimizer, "step", 6, 1), (store_module, "save_checkpoint", 2, 1)],
        6,
    ),
    "in the last step": ([(Optimizer, "step", STEPS, 1)], STEPS),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_leaves_a_valid_checkpoint(tmp_path, whole, monkeypatch, moment, background):
    """Exit code 143, the newest checkpoint at the step in hand, nothing half written; and the run goes on as if."""
    sent, step = MOMENTS[moment]
    with monkeypatch.context() as patch:
        for owner, name, call, times in sent:
            at_call(patch, owner, name, call, times=times)
        _, losses, ended = run(tmp_path, background=background)
    if step != STEPS:
        assert ended is not None
        assert ended.exit_code == 143
    found = list_checkpoints(tmp_path, ["toy"])
    for folder in found:
        load_checkpoint(folder)
    saved = int(found[-1].name.rpartition("-")[2])
    assert saved == len(losses)
    assert saved == step if step is not None else 4 <= saved < STEPS
    assert not list((tmp_path / "checkpoints").glob(".*"))
    task, more, ended = run(tmp_path)
    assert ended is None
    assert losses + more == whole[1]
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), whole[0].model.parameters(), strict=True))


def test_sigterm_twice_from_the_command_line(parts, rows, tmp_path, monkeypatch, capsys):
    config = config_for(parts, write_rows(tmp_path / "set.jsonl", rows), tmp_path / "run", steps=50)
    with monkeypatch.context() as patch:
        at_call(patch, TuneTask, "loss", 5, times=2)
        assert main(["train", str(written(tmp_path / "run.yaml", config))]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "ultravox: stopped by SIGTERM; a checkpoint was saved, go on with --resume"
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert folder.name == "tune-000003"
    load_checkpoint(folder)


# Case 11, case 13


def logged(folder, task, *, steps=30, batches_per_step=1):
    """Rows of log.jsonl, with the weights before each step."""
    log, weights = JsonLinesLog(folder / "log.jsonl", 1), []

    class Weights(Recorder):
        def on_step(self, record):
            weights.append([parameter.detach().clone() for parameter in task.model.parameters()])

    def load(state):
        return task.load(state, batches_per_step=batches_per_step)

    settings = LoopSettings(stage="toy", max_steps=steps)
    run_stage(task, toy_optimizer(task), settings, load, callbacks=[log, Weights()])
    log.close()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()], weights


@pytest.mark.parametrize("batches_per_step", [1, 2])
def test_a_loss_that_is_not_finite_changes_nothing_and_its_ids_are_logged(tmp_path, batches_per_step):
    """Also where the step's other batch is sound: its gradient must not be taken either."""
    task = ToyTask(nan_at=frozenset({"clip-5"}), num_examples=32)
    found, weights = logged(tmp_path, task, batches_per_step=batches_per_step)
    skipped = {row["step"]: row["skipped_ids"] for row in found if "skipped_ids" in row}
    assert skipped
    for step in range(2, 31):
        same = all(torch.equal(a, b) for a, b in zip(weights[step - 2], weights[step - 1], strict=True))
        assert same == (step in skipped), step
    for step, ids in skipped.items():
        assert "clip-5" in ids
        of_step = task.seen[(step - 1) * batches_per_step : step * batches_per_step]
        assert ids == [name for batch in of_step for name in batch]


def test_a_run_of_such_losses_ends_and_says_with_which_clips(parts, rows, tmp_path, monkeypatch, capsys):
    inner = TuneTask.loss

    def loss(self, batch):
        output = inner(self, batch)
        output.sum = output.sum * math.nan
        return output

    monkeypatch.setattr(TuneTask, "loss", loss)
    config = config_for(parts, write_rows(tmp_path / "set.jsonl", rows), tmp_path / "run", steps=50)
    assert main(["train", str(written(tmp_path / "run.yaml", config))]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "stage tune: the loss was not finite in 5 steps in a row, up to step 5 with tone-" in line
    found = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    skipped = {row["step"]: row["skipped_ids"] for row in found if "skipped_ids" in row}
    assert sorted(skipped) == [1, 2, 3, 4, 5]
    assert skipped[5][0] in line


def test_a_spike_is_logged_with_its_ids(tmp_path):
    task = spiking_task()
    found, _ = logged(tmp_path, task)
    (spike,) = [row for row in found if "spike_ids" in row]
    assert (spike["step"], spike["spike_ids"]) == (25, task.seen[24])
    losses = [row["loss"] for row in found if "loss" in row]
    assert spike["spike_loss"] == losses[24] > 3 * max(losses[15:24])
