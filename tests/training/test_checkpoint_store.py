"""What a run's store of checkpoints keeps, how it writes beside training, and its copies elsewhere."""

import json
import pickle
import shutil
import threading
import time

import pytest
import torch
from toy_task import ToyTask, toy_optimizer

import ultravox.training.checkpoint_store as module
from ultravox.errors import CheckpointError, UltravoxError
from ultravox.files import sha256_file
from ultravox.training.checkpoint import FILES, Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from ultravox.training.checkpoint_store import CheckpointStore, download_newest, require_store
from ultravox.training.trainer import LoopSettings, run_stage


def some(step, **metrics):
    return Checkpoint({"w": torch.full((3, 4), float(step))}, {"w.step": torch.tensor(2.0)}, {"metrics": metrics})


def kept(folder):
    return [path.name for path in list_checkpoints(folder, ["a", "b"])]


def test_the_newest_are_kept(tmp_path):
    with CheckpointStore(tmp_path, ["a", "b"], keep_last=2) as store:
        for stage, step in (("a", 1), ("a", 2), ("b", 1), ("b", 2)):
            store.save(stage, step, some(step))
    assert kept(tmp_path) == ["b-000001", "b-000002"]


def test_those_of_every_so_many_steps_are_kept_too(tmp_path):
    with CheckpointStore(tmp_path, ["a"], keep_last=1, keep_every=4) as store:
        for step in range(1, 11):
            store.save("a", step, some(step))
    assert kept(tmp_path) == ["a-000004", "a-000008", "a-000010"]


@pytest.mark.parametrize(("metric", "best"), [("wer", "a-000002"), ("bleu", "a-000003")])
def test_the_best_is_kept_too(tmp_path, metric, best):
    """Less of wer is better, more of bleu; of equals the first; a checkpoint without an evaluation is not judged."""
    values = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.1, 5: 0.9, 7: 0.4}
    with CheckpointStore(tmp_path, ["a"], keep_last=1, keep_best=metric) as store:
        for step in range(1, 9):
            store.save("a", step, some(step, **({metric: values[step]} if step in values else {})))
    assert kept(tmp_path) == [best, "a-000008"]


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """What is saved is what was given, whatever becomes of it meanwhile; the next one waits."""
    release = threading.Event()

    def slow(folder, checkpoint):
        assert release.wait(10)
        save_checkpoint(folder, checkpoint)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    with CheckpointStore(tmp_path, ["a"]) as store:
        checkpoint = some(1)
        store.save("a", 1, checkpoint)
        assert kept(tmp_path) == []
        store.settle()
        checkpoint.trainable["w"].fill_(99)
        release.set()
        store.save("a", 2, some(2))
        assert "a-000001" in kept(tmp_path), "the first is whole before the second begins"
    assert kept(tmp_path) == ["a-000001", "a-000002"]
    assert load_checkpoint(list_checkpoints(tmp_path, ["a"])[0]).trainable["w"].eq(1).all()


@pytest.mark.parametrize("waits", [True, False])
def test_no_weight_changes_before_it_is_copied(tmp_path, monkeypatch, waits):
    """A slow copy holds the next update up, and is of its own step; without `settle` it would be of a later one."""
    real = CheckpointStore.copied

    def slow(self, tensors):
        time.sleep(0.1)
        return real(self, tensors)

    monkeypatch.setattr(CheckpointStore, "copied", slow)
    task = ToyTask(num_examples=64)
    optimizer = toy_optimizer(task)
    expected = {}
    with CheckpointStore(tmp_path, ["toy"], keep_every=1) as store:

        def save(state):
            checkpoint = Checkpoint(task.trainable_state(), optimizer.state_dict(), {})
            expected[state.step] = {
                name: tensor.clone()
                for part in (checkpoint.trainable, checkpoint.optimizer)
                for name, tensor in part.items()
            }
            store.save("toy", state.step, checkpoint)

        settle = store.settle if waits else (lambda: None)
        settings = LoopSettings(stage="toy", max_steps=4, checkpoint_every=1)
        run_stage(task, optimizer, settings, task.load, save=save, settle=settle)
    found = {int(folder.name[-6:]): load_checkpoint(folder) for folder in list_checkpoints(tmp_path, ["toy"])}
    assert found.keys() == expected.keys() == {1, 2, 3, 4}
    same = [
        torch.equal(tensor, expected[step][name])
        for step, checkpoint in found.items()
        for part in (checkpoint.trainable, checkpoint.optimizer)
        for name, tensor in part.items()
    ]
    assert all(same) == waits


def test_what_cannot_be_copied_is_told_and_holds_nobody_up(tmp_path, monkeypatch):
    def failing(self, tensors):
        raise UltravoxError("the GPU is gone")

    monkeypatch.setattr(CheckpointStore, "copied", failing)
    store = CheckpointStore(tmp_path, ["a"])
    store.save("a", 1, some(1))
    waiter = threading.Thread(target=store.settle)
    waiter.start()
    waiter.join(10)
    assert not waiter.is_alive()
    with pytest.raises(UltravoxError, match="the GPU is gone"):
        store.join()
    assert kept(tmp_path) == []


def test_in_the_foreground_it_is_there_at_once(tmp_path):
    store = CheckpointStore(tmp_path, ["a"], background=False)
    store.save("a", 1, some(1))
    assert kept(tmp_path) == ["a-000001"]


@pytest.mark.parametrize("background", [True, False])
def test_what_cannot_be_written_is_told(tmp_path, monkeypatch, background):
    save_checkpoint(tmp_path / "checkpoints" / "a-000001", some(1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ultravox.training.checkpoint.save_file", full)
    with (
        pytest.raises(UltravoxError, match="disk full"),
        CheckpointStore(tmp_path, ["a"], background=background) as store,
    ):
        store.save("a", 2, some(2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["a-000001"]


def test_another_error_is_not_hidden_by_that_of_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "save_checkpoint", lambda *_: (_ for _ in ()).throw(UltravoxError("disk full")))

    def train():
        with CheckpointStore(tmp_path, ["a"]) as store:
            store.save("a", 1, some(1))
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        train()


def test_copies_in_a_store(tmp_path):
    target = f"file://{tmp_path}/store"
    require_store(target)
    with CheckpointStore(tmp_path / "run", ["a", "b"], keep_last=1, upload=target) as store:
        for stage, step in (("a", 1), ("a", 20), ("b", 3)):
            store.save(stage, step, some(step))
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["a-000001", "a-000020", "b-000003"]
    (tmp_path / "store" / "b-000004").mkdir()  # half of a copy: its manifest, the last file, is not there
    (tmp_path / "store" / "b-000004" / "state.json").write_text("{}")
    found = download_newest(target, tmp_path / "other", ["a", "b"])
    assert found is not None
    assert found.name == "b-000003"
    assert load_checkpoint(found).trainable["w"].eq(3).all()
    assert download_newest(f"{target}/nothing", tmp_path / "other", ["a"]) is None


def test_a_copy_cut_short_is_not_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "checkpoints" / "a-000001", some(1))
    import fsspec.implementations.local as local

    real = local.LocalFileSystem.put_file
    puts = []

    def put(self, *args, **kwargs):
        puts.append(args)
        if len(puts) == 4:
            raise OSError("the line is down")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(local.LocalFileSystem, "put_file", put)
    target = f"file://{tmp_path}/store"
    with pytest.raises(UltravoxError, match=r"could not be copied to .* the line is down"):
        module.upload_checkpoint(tmp_path / "checkpoints" / "a-000001", target)
    assert download_newest(target, tmp_path / "other", ["a"]) is None


def test_a_place_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"no place that fsspec knows .* expected a URL such as"):
        require_store("nonsense://bucket/run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UltravoxError, match="cannot be used"):
        require_store(f"file://{tmp_path}/file/inside")


class Canary:
    """Unpickling it leaves a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_no_pickle_is_ever_loaded(tmp_path, name):
    """In each slot, with a hash that is right."""
    folder = tmp_path / "a-000001"
    save_checkpoint(folder, some(1))
    mark = tmp_path / "mark"
    (folder / name).write_bytes(pickle.dumps(Canary(mark)))
    pickle.loads((folder / name).read_bytes())
    assert mark.exists(), "the canary sings"
    mark.unlink()
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"][name] = sha256_file(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
    assert not mark.exists()


def test_copying_takes_little_of_the_time_of_writing(tmp_path):
    """The figure is in docs; here only that training is not kept waiting for the disk."""
    big = Checkpoint({"w": torch.randn(20_000_000)}, {"w.step": torch.tensor(1.0)}, {})
    times = {}
    for background in (False, True):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        with CheckpointStore(tmp_path, ["a"], background=background) as store:
            begin = time.monotonic()
            store.save("a", 1, big)
            store.settle()  # as if the next update came at once
            times[background] = time.monotonic() - begin
    assert times[True] < 0.5 * times[False]
