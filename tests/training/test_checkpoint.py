import contextlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from toy_task import Recorder, ToyTask, toy_optimizer

from ultravox.errors import CheckpointError, UltravoxError
from ultravox.training.checkpoint import (
    FILES,
    Checkpoint,
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    random_state,
    remove_checkpoints,
    restore_random_state,
    save_checkpoint,
)
from ultravox.training.resume import require_same, require_same_config, require_same_data
from ultravox.training.trainer import LoopSettings, LoopState, run_stage


def some(state=None):
    return Checkpoint({"w": torch.randn(3, 4)}, {"w.step": torch.tensor(2.0)}, state or {"step": 2})


def train_and_save(folder, steps, *, task=None, optimizer=None, state=None):
    task = task or ToyTask()
    optimizer = optimizer or toy_optimizer(task)
    recorder = Recorder()
    # One schedule for both halves: stop early instead of asking for fewer steps.
    settings = LoopSettings(stage="toy", max_steps=10, warmup_steps=2, checkpoint_every=5, max_grad_norm=0.5)

    class Enough(Exception):
        pass

    def save(state):
        content = {"loop": state.to_json(), "random": random_state()}
        save_checkpoint(folder, Checkpoint(task.trainable_state(), optimizer.state_dict(), content))
        if state.step == steps:
            raise Enough

    with contextlib.suppress(Enough):
        run_stage(task, optimizer, settings, task.load, state=state, callbacks=[recorder], save=save)
    return task, recorder.losses


def test_resuming_is_bit_exact_in_mid_epoch(tmp_path):
    """With dropout and augmentation; 6 batches an epoch, so step 5 is in the middle of one."""
    whole_task, whole = train_and_save(tmp_path / "whole", 10)
    _, first = train_and_save(tmp_path / "half", 5)
    torch.manual_seed(12345)  # another process would stand elsewhere
    checkpoint = load_checkpoint(tmp_path / "half")
    task = ToyTask()
    optimizer = toy_optimizer(task)
    task.load_trainable_state(checkpoint.trainable)
    optimizer.load_state_dict(checkpoint.optimizer)
    restore_random_state(checkpoint.state["random"])
    state = LoopState(**checkpoint.state["loop"])
    assert state.batch == 5
    task, second = train_and_save(tmp_path / "half", 10, task=task, optimizer=optimizer, state=state)
    assert first + second == whole
    for name, weight in whole_task.trainable_state().items():
        assert torch.equal(weight, task.trainable_state()[name])
    for name in FILES[:2]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "half" / name).read_bytes()


def test_no_pickle_anywhere(tmp_path):
    save_checkpoint(tmp_path / "a-000001", some())
    assert sorted(path.name for path in (tmp_path / "a-000001").iterdir()) == sorted([*FILES, "manifest.json"])


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path, name):
    save_checkpoint(tmp_path / "a", some())
    content = bytearray((tmp_path / "a" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_checkpoint(tmp_path / "a")


def test_any_flipped_byte_of_the_manifest_is_found(tmp_path):
    save_checkpoint(tmp_path / "a", some())
    path = tmp_path / "a" / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=str(tmp_path / "a")):
            load_checkpoint(tmp_path / "a")


def test_missing_file_and_other_version(tmp_path):
    save_checkpoint(tmp_path / "a", some())
    (tmp_path / "a" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        load_checkpoint(tmp_path / "a")
    save_checkpoint(tmp_path / "b", some())
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(tmp_path / "b")


@pytest.mark.parametrize("point", ["save_file", "write_text", "replace"])
def test_killed_while_saving_leaves_the_checkpoint_before(tmp_path, point):
    """A child is killed (no clean-up runs) at each kind of write; the earlier checkpoint stays the newest and valid."""
    folder = checkpoint_folder(tmp_path, "a", 1)
    save_checkpoint(folder, some())
    child = os.fork()
    if child == 0:
        import ultravox.files
        import ultravox.training.checkpoint as module

        def die(*args, **kwargs):
            os._exit(9)

        if point == "save_file":
            module.save_file = die
        elif point == "write_text":
            type(tmp_path).write_text = die
        else:
            ultravox.files.os.replace = die
        save_checkpoint(checkpoint_folder(tmp_path, "a", 2), some())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert list_checkpoints(tmp_path, ["a"]) == [folder]
    load_checkpoint(folder)
    remove_checkpoints(tmp_path, [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["a-000001"], "leftovers are cleared"


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    folder = checkpoint_folder(tmp_path, "a", 1)
    save_checkpoint(folder, some())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ultravox.training.checkpoint.save_file", full)
    with pytest.raises(UltravoxError, match="disk full"):
        save_checkpoint(checkpoint_folder(tmp_path, "a", 2), some())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["a-000001"]
    load_checkpoint(folder)


def test_order_and_removal(tmp_path):
    for stage, step in [("tune", 5), ("align", 100), ("align", 20), ("tune", 40), ("other", 1)]:
        save_checkpoint(checkpoint_folder(tmp_path, stage, step), some())
    stages = ["align", "tune"]
    names = [path.name for path in list_checkpoints(tmp_path, stages)]
    assert names == ["align-000020", "align-000100", "tune-000005", "tune-000040"]
    remove_checkpoints(tmp_path, list_checkpoints(tmp_path, stages)[:-2])
    assert [path.name for path in list_checkpoints(tmp_path, stages)] == names[2:]


def test_killed_while_removing_leaves_a_valid_one(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_checkpoint(checkpoint_folder(tmp_path, "a", step), some())
    real = shutil.rmtree

    def die(path, ignore_errors=False):
        if "removed" in str(path) and os.path.exists(path):
            os.unlink(os.path.join(path, "state.json"))
            raise KeyboardInterrupt
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoints(tmp_path, list_checkpoints(tmp_path, ["a"])[:-2])
    for folder in list_checkpoints(tmp_path, ["a"]):
        load_checkpoint(folder)
    assert len(list_checkpoints(tmp_path, ["a"])) == 2


def test_random_states_survive_json():
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    np.random.standard_normal()
    random.gauss(0, 1)
    saved = json.loads(json.dumps(random_state()))

    def draw():
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), [random.gauss(0, 1), random.random()]

    first = draw()
    restore_random_state(saved)
    assert draw() == first


def test_other_config_is_refused_with_the_keys(tmp_path):
    saved = {"seed": 0, "stages": [{"name": "a", "max_steps": 10}], "gone": 1}
    require_same_config(saved, json.loads(json.dumps(saved)), tmp_path)
    changed = {"seed": 1, "stages": [{"name": "a", "max_steps": 20}], "new": 2}
    with pytest.raises(CheckpointError) as caught:
        require_same_config(saved, changed, tmp_path)
    assert str(caught.value).startswith(
        f"cannot resume from {tmp_path}: the configuration differs: seed was 0, is 1; stages.a.max_steps was 10, "
        "is 20; gone was 1, is no longer there; new is 2, was not there; a run cannot be made longer or shorter, "
    )


def test_stages_and_sources_that_differ_are_called_by_name(tmp_path):
    two = [{"name": "a", "lr": 1}, {"name": "b", "lr": 2}]
    for saved, changed, said in (
        (two, two[:1], "stages.b was there, is no longer there"),
        (two[1:], two, "stages.a is there, was not there"),
        (two, two[::-1], "stages were in the order a, b, are in the order b, a"),
        ([two[0], two[0]], [two[0], {"name": "a", "lr": 3}], "stages.1.lr was 1, is 3"),
        (two, [{"name": "a", "lr": [1]}, two[1]], "stages.a.lr was 1, is [1]"),
    ):
        with pytest.raises(CheckpointError) as caught:
            require_same_config({"stages": saved}, {"stages": changed}, tmp_path)
        assert f"the configuration differs: {said}; restore it, or start anew" in str(caught.value)


def test_a_model_that_differs_is_not_told_by_whole_hashes(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        require_same({"llm": {"sha256": "ab" * 32}}, {"llm": {"sha256": "cd" * 32}}, "a base model", tmp_path)
    assert "a base model differs: llm.sha256 was 'abababababab…', is 'cdcdcdcdcdcd…'; restore it" in str(caught.value)


def test_data_that_differs_is_told_by_its_clips(tmp_path):
    state = {"data": {"a": "1", "b": "2", "s": "3", "t": "4"}, "sizes": {"a": 9, "b": 7, "s": 0, "t": 1}}
    require_same_data(state, state["data"], state["sizes"], tmp_path)
    now = {"a": "x", "b": "x", "s": "x", "u": "x"}
    with pytest.raises(CheckpointError) as caught:
        require_same_data(state, now, {"a": 12, "b": 7, "s": 0, "u": 1}, tmp_path)
    told = str(caught.value).partition("the training data differs: ")[2].split("; ")
    assert told[:5] == [
        "a had 9 clips, has 12",
        "b has 7 clips as before, but other texts, tokens or audio",
        "s has other texts, tokens or audio",
        "t is no longer there",
        "u was not there",
    ]
