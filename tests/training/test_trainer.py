import math
import os
import signal
from functools import partial

import pytest
import torch
from toy_task import Recorder, ToyTask, spiking_task, toy_optimizer

from ultravox.errors import UltravoxError
from ultravox.training.interrupt import TrainingInterrupted, stop_on_signals
from ultravox.training.trainer import LoopSettings, LoopState, run_stage


def settings(**changes):
    return LoopSettings(**{"stage": "toy", "max_steps": 12, "warmup_steps": 2, **changes})


def train(task=None, *, optimizer=None, batches_per_step=1, **changes):
    task = task or ToyTask()
    recorder = Recorder()
    load = partial(task.load, batches_per_step=batches_per_step)
    state = run_stage(task, optimizer or toy_optimizer(task), settings(**changes), load, callbacks=[recorder])
    return task, recorder, state


def test_the_loss_falls_and_repeats_exactly():
    _, first, state = train(max_steps=200)
    _, again, _ = train(max_steps=200)
    assert first.losses == again.losses
    assert sum(first.losses[-20:]) < 0.8 * sum(first.losses[:20])
    assert (state.step, state.epoch, state.batch) == (200, 33, 2)
    assert state.audio_seconds == 200 * 4 * 0.5
    assert state.num_tokens == 200 * 4 * 3


def test_accumulated_small_batches_equal_one_large():
    runs = []
    for budget, accumulation in [(8, 1), (1, 8)]:
        task = ToyTask(budget=budget, noise=0.0, num_examples=8)
        _, recorder, _ = train(task, max_steps=10, batches_per_step=accumulation)
        assert all(len(ids) == budget for ids in task.seen)
        runs.append((recorder.losses, task.trainable_state()))
    (losses, weights), (other_losses, other_weights) = runs
    assert losses == pytest.approx(other_losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=1e-5, atol=1e-6)


def test_unequal_batches_are_weighted_by_their_counts():
    """5 examples in batches of 3 and 2: the gradient is that of all five, not the mean of two means."""
    task = ToyTask(budget=3, noise=0.0, num_examples=5)
    _, recorder, _ = train(task, max_steps=1, batches_per_step=2)
    assert sorted(len(ids) for ids in task.seen) == [2, 3]
    whole = ToyTask(budget=5, noise=0.0, num_examples=5)
    _, expected, _ = train(whole, max_steps=1)
    assert recorder.losses == pytest.approx(expected.losses, rel=1e-6)
    assert recorder.records[0].grad_norm == pytest.approx(expected.records[0].grad_norm, rel=1e-5)


def test_evaluation_does_not_disturb_training():
    _, plain, _ = train()
    task, looking, _ = train(evaluate_every=1)
    assert plain.losses == looking.losses
    assert task.num_evaluations == 12
    assert [step for step, _ in plain.evaluations] == [12], "0 = at the end"


def test_a_step_that_is_not_finite_is_left_out_and_its_clips_named():
    task, recorder, state = train(ToyTask(nan_at=frozenset({"clip-5"})), max_steps=12)
    skipped = [record for record in recorder.records if record.skipped_ids]
    assert len(skipped) == state.skipped == 2, "once per epoch"
    assert all("clip-5" in record.skipped_ids for record in skipped)
    assert state.skipped_in_row == 0
    assert all(torch.isfinite(weight).all() for weight in task.trainable_state().values())


def test_no_update_in_a_step_left_out():
    task = ToyTask(nan_at=frozenset(f"clip-{i}" for i in range(24)))
    before = {name: weight.clone() for name, weight in task.trainable_state().items()}
    train(task, max_steps=3)
    for name, weight in task.trainable_state().items():
        assert torch.equal(weight, before[name])


def test_many_such_steps_in_a_row_stop_the_run():
    with pytest.raises(UltravoxError, match=r"not finite in 5 steps in a row.*clip-"):
        train(ToyTask(nan_at=frozenset(f"clip-{i}" for i in range(24))), max_steps=50)


def test_infinite_gradient_of_a_finite_loss_is_left_out():
    task = ToyTask(noise=0.0)
    optimizer = toy_optimizer(task)
    (task.model[0](task.x).sum() * 0 + 1).backward()
    task.model[0].weight.grad.fill_(math.inf)
    before = task.model[0].weight.detach().clone()
    assert math.isinf(optimizer.step(divisor=1, max_grad_norm=1, lr_factor=1))
    assert torch.equal(task.model[0].weight, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(number, code):
    task = ToyTask()
    saved: list[LoopState] = []
    inner = task.loss

    def loss(batch):
        if len(task.seen) == 2:
            os.kill(os.getpid(), number)
        return inner(batch)

    task.loss = loss
    with stop_on_signals() as stop, pytest.raises(TrainingInterrupted) as caught:
        run_stage(task, toy_optimizer(task), settings(), task.load, save=lambda state: saved.append(state), stop=stop)
    assert caught.value.exit_code == code
    assert [state.step for state in saved] == [3]


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_third_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():  # noqa: PT012
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)


def test_checkpoints_are_asked_for_when_due():
    task = ToyTask()
    steps = []
    run_stage(
        task, toy_optimizer(task), settings(checkpoint_every=5), task.load, save=lambda state: steps.append(state.step)
    )
    assert steps == [5, 10, 12]


def test_a_spike_is_logged_with_its_clips():
    task = spiking_task()
    _, recorder, _ = train(task, max_steps=30)
    spikes = [record for record in recorder.records if record.spike_ids]
    assert [record.step for record in spikes] == [25]
    assert spikes[0].spike_ids == task.seen[24]


def test_no_look_at_progress_just_before_the_last_one():
    _, recorder, _ = train(max_steps=21, evaluate_every=10)
    assert [step for step, _ in recorder.evaluations] == [10, 21]
    _, recorder, _ = train(max_steps=25, evaluate_every=10)
    assert [step for step, _ in recorder.evaluations] == [10, 20, 25]


def test_transcripts_are_for_callbacks_that_want_them():
    class Shown(Recorder):
        def __init__(self):
            super().__init__()
            self.shown = []

        def on_transcripts(self, stage, step, transcripts):
            self.shown.append((stage, step, transcripts, len(self.evaluations)))

    task, watcher, other = ToyTask(), Shown(), Recorder()
    task.transcripts = lambda: [f"of look {task.num_evaluations}"]
    run_stage(task, toy_optimizer(task), settings(evaluate_every=6), task.load, callbacks=[other, watcher])
    assert watcher.shown == [("toy", 6, ["of look 1"], 1), ("toy", 12, ["of look 2"], 2)]
    assert len(other.evaluations) == 2
