"""Case 3: the disk fills up while a checkpoint is written. Case 5: a run ends while one is written beside it."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from faulty_runs import config_for, losses_of, write_rows, written
from safetensors import SafetensorError

import ultravox.training.checkpoint as module
import ultravox.training.checkpoint_store as store_module
from ultravox import files
from ultravox.cli.main import main
from ultravox.errors import UltravoxError
from ultravox.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from ultravox.training.checkpoint_store import CheckpointStore

FILES = ["trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def fill_up_at(monkeypatch, name: str, folder: str) -> None:
    """A disk on which half of one file of one checkpoint still finds room; the errors are those of a full tmpfs."""
    save_file, write_text = module.save_file, Path.write_text

    def half(path: Path) -> bool:
        if path.name != name or folder not in path.parent.name:
            return False
        path.write_bytes(b"half of it")
        return True

    def save(tensors, path):
        if half(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    def write(self, *args, **options):
        if half(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write_text(self, *args, **options)

    monkeypatch.setattr(module, "save_file", save)
    monkeypatch.setattr(Path, "write_text", write)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_each_file_of_a_checkpoint_may_find_the_disk_full(tmp_path, monkeypatch, name, background):
    fill_up_at(monkeypatch, name, "a-000002")

    def save():
        with CheckpointStore(tmp_path, ["a"], background=background) as store:
            store.save("a", 1, some(1))
            store.save("a", 2, some(2))

    with pytest.raises(UltravoxError, match=r"disk full while writing .*a-000002: free some space"):
        save()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["a-000001"]
    assert load_checkpoint(tmp_path / "checkpoints" / "a-000001").state == {"step": 1}


def test_a_run_on_a_full_disk_keeps_the_checkpoint_before(parts, rows, tmp_path, monkeypatch, capsys):
    """One line that names the place, exit code 2, nothing half written; with room again the run goes on as if."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    config = config_for(parts, source, tmp_path / "run", steps=4, stage={"checkpoint_every": 1})
    path = written(tmp_path / "run.yaml", config)
    with monkeypatch.context() as patch:
        fill_up_at(patch, FILES[0], "tune-000002")
        assert main(["train", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ultravox: error: ")
    assert f"disk full while writing {tmp_path / 'run' / 'checkpoints' / 'tune-000002'}: free some space" in line
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["tune-000001"]
    load_checkpoint(tmp_path / "run" / "checkpoints" / "tune-000001")
    assert main(["train", str(path), "--resume"]) == 0
    assert len(losses_of(tmp_path / "run")) == 4


# Case 5


def some(step: int) -> Checkpoint:
    return Checkpoint({"w": torch.full((3,), float(step))}, {"w.step": torch.tensor(2.0)}, {"step": step})


class Slowly:
    """`save_checkpoint`, which waits before its last act until it may go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        save_checkpoint(folder, checkpoint)


@pytest.mark.parametrize("ending", [ValueError("a bug"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_a_run_that_fails_waits_for_what_is_in_flight(tmp_path, monkeypatch, ending):
    slowly = Slowly()
    monkeypatch.setattr(store_module, "save_checkpoint", slowly)

    def train():
        with CheckpointStore(tmp_path, ["a"]) as store:
            store.save("a", 1, some(1))
            assert slowly.begun.wait(10)
            threading.Timer(0.1, slowly.go_on.set).start()
            assert list_checkpoints(tmp_path, ["a"]) == []
            raise ending

    with pytest.raises(type(ending)):
        train()
    (folder,) = list_checkpoints(tmp_path, ["a"])
    assert load_checkpoint(folder).trainable["w"].eq(1).all()


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM", "os._exit"])
def test_what_is_in_flight_when_a_process_ends_at_once_is_never_listed(tmp_path, monkeypatch, ending):
    save_checkpoint(tmp_path / "checkpoints" / "a-000001", some(1))
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            reached = threading.Event()

            def never(*args):
                reached.set()
                time.sleep(20)

            files.replace_folder = never
            CheckpointStore(tmp_path, ["a"]).save("a", 2, some(2))
            assert reached.wait(10)
            if ending == "os._exit":
                os._exit(7)
            os.kill(os.getpid(), getattr(signal, ending))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (7 if ending == "os._exit" else -getattr(signal, ending))
    assert any(path.name.startswith(".a-000002.") for path in (tmp_path / "checkpoints").iterdir()), "it was all there"
    assert [folder.name for folder in list_checkpoints(tmp_path, ["a"])] == ["a-000001"]
    with CheckpointStore(tmp_path, ["a"]) as store:
        store.save("a", 3, some(3))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["a-000001", "a-000003"]


def test_an_interpreter_that_ends_waits_for_what_is_in_flight(tmp_path, monkeypatch):
    """A process of multiprocessing ends as an interpreter does: once its threads have."""

    def slowly(*args):
        time.sleep(0.5)
        save_checkpoint(*args)

    monkeypatch.setattr(store_module, "save_checkpoint", slowly)
    store = CheckpointStore(tmp_path, ["a"])
    child = multiprocessing.get_context("fork").Process(target=store.save, args=("a", 1, some(1)))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    (folder,) = list_checkpoints(tmp_path, ["a"])
    load_checkpoint(folder)
