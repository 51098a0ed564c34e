"""A run that is killed (no clean-up runs) goes on from a verified checkpoint: at each write point, and at any time."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from killing import kill_in_call
from toy_task import Recorder, ToyTask, toy_optimizer

import ultravox.files
import ultravox.training.checkpoint as module
from ultravox.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, random_state
from ultravox.training.checkpoint import restore_random_state as restore
from ultravox.training.checkpoint_store import CheckpointStore
from ultravox.training.trainer import LoopSettings, LoopState, run_stage

STEPS = 12
KILLED_IN = 5  # the step whose checkpoint is in writing
WRITE_POINTS = {
    "before the temporary folder": ("mkdtemp", 1, False),
    "after the temporary folder": ("mkdtemp", 1, True),
    "before the weights": ("save_file", 1, False),
    "after the weights": ("save_file", 1, True),
    "before the optimizer": ("save_file", 2, False),
    "after the optimizer": ("save_file", 2, True),
    "before the state": ("write_text", 1, False),
    "after the state": ("write_text", 1, True),
    "before the first hash": ("sha256_file", 1, False),
    "before the last hash": ("sha256_file", 3, False),
    "before the manifest": ("write_text", 2, False),
    "after the manifest": ("write_text", 2, True),
    "before the first fsync": ("fsync", 1, False),
    "between fsyncs": ("fsync", 3, False),
    "after the folder's fsync": ("fsync", 5, True),
    "before the rename": ("replace", 1, False),
    "after the rename": ("replace", 1, True),
    "after the parent's fsync": ("fsync", 6, True),
    "before an old one is renamed": ("rename", 1, False),
    "after an old one is renamed": ("rename", 1, True),
    "before an old one's files go": ("rmtree", 1, False),
    "between an old one's files": ("unlink", 2, False),
    "after an old one's files are gone": ("rmtree", 1, True),
}


POINTS = list(WRITE_POINTS)
SAVED = POINTS[POINTS.index("after the rename") :]
"""Points from which on it is whole."""


def run(folder: Path, state: LoopState | None = None, at_step=lambda step, store: None) -> tuple[ToyTask, list[float]]:
    """Train to the end, from a checkpoint if there is one; a checkpoint after each step."""
    task = ToyTask(num_examples=64)
    optimizer = toy_optimizer(task)
    recorder = Recorder()
    torch.manual_seed(5)
    if found := list_checkpoints(folder, ["toy"]):
        checkpoint = load_checkpoint(found[-1])
        task.load_trainable_state(checkpoint.trainable)
        optimizer.load_state_dict(checkpoint.optimizer)
        restore(checkpoint.state["random"])
        state = LoopState(**checkpoint.state["loop"])
    settings = LoopSettings(stage="toy", max_steps=STEPS, checkpoint_every=1)
    with CheckpointStore(folder, ["toy"]) as store:

        def save(state: LoopState) -> None:
            at_step(state.step, store)
            content = {"loop": state.to_json(), "random": random_state()}
            store.save("toy", state.step, Checkpoint(task.trainable_state(), optimizer.state_dict(), content))

        run_stage(
            task, optimizer, settings, task.load, state=state, callbacks=[recorder], save=save, settle=store.settle
        )
    return task, recorder.losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def started(work) -> int:
    """A process that does it and ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def status_of(child: int) -> int:
    """How it ended; negative = killed by that signal."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def kill_at(name: str, call: int, after: bool):
    """From here on, this process is killed in a call of that name, the first of which is 1."""
    owners = {
        "mkdtemp": (ultravox.files.tempfile, "mkdtemp"),
        "save_file": (module, "save_file"),
        "write_text": (Path, "write_text"),
        "sha256_file": (module, "sha256_file"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "rename": (Path, "rename"),
        "unlink": (os, "unlink"),
        "rmtree": (shutil, "rmtree"),
    }

    def counts(target, *args, **kwargs):
        return "removed" in str(target) and Path(target).exists()

    more = {"counts": counts} if name == "rmtree" else {}
    kill_in_call(*owners[name], call, after=after, **more)


def verify_and_finish(folder, whole):
    """The newest checkpoint is sound, and from it the run ends as if nothing had been."""
    found = list_checkpoints(folder, ["toy"])
    assert found
    for checkpoint in found:
        load_checkpoint(checkpoint)  # all that are listed are whole
    step = int(found[-1].name.rpartition("-")[2])
    task, losses = run(folder)
    assert losses == whole[1][step:]
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), whole[0].model.parameters(), strict=True))
    assert not list((folder / "checkpoints").glob(".*")), "nothing is left of what was half done"
    return step


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_killed_at_a_write_point(tmp_path, whole, point):
    """The checkpoint before is the newest until the new one has its name."""

    def at_step(step, store):
        if step == KILLED_IN:
            store.join()  # or the call might be one of the checkpoint before
            kill_at(*WRITE_POINTS[point])

    assert status_of(started(lambda: run(tmp_path, at_step=at_step))) == -signal.SIGKILL, "the point was reached"
    assert verify_and_finish(tmp_path, whole) == KILLED_IN - (point not in SAVED)


@pytest.mark.parametrize("trial", range(20))
def test_killed_at_any_time(tmp_path, whole, trial):
    wait = random.Random(trial).uniform(0.0, 0.35)

    def work():
        def at_step(step, store):
            if step > 2:
                time.sleep(0.06)  # so that the kill comes before the end

        run(tmp_path, at_step=at_step)

    child = started(work)
    while len(list_checkpoints(tmp_path, ["toy"])) < 2:
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    assert status_of(child) == -signal.SIGKILL
    if list_checkpoints(tmp_path, ["toy"])[-1].name == f"toy-{STEPS:06d}":
        pytest.fail("the run was over before it was killed")
    assert verify_and_finish(tmp_path, whole) >= 2
