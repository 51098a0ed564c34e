"""A run that has more memory than `engine.max_memory_gb` saves and ends by itself, before the system ends it."""

import os
from types import SimpleNamespace

import pytest
import torch
from faulty_runs import config_for, losses_of, write_rows, written

from ultravox.cli.main import main
from ultravox.training import memory_guard
from ultravox.training.checkpoint import load_checkpoint
from ultravox.training.engines.base import Engine
from ultravox.training.memory_guard import MemoryGuard, own_memory_bytes
from ultravox.training.tune import TuneTask

CHUNK = 64 << 20


def test_what_is_mapped_from_a_file_is_not_counted(tmp_path):
    """Features of a cache larger than memory are mapped; the system can take their pages back."""
    import mmap

    path = tmp_path / "features"
    with path.open("wb") as file:
        for _ in range(4):
            file.write(os.urandom(CHUNK // 4))
    before = own_memory_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[at] for at in range(0, CHUNK, 4096)) > 0
        assert own_memory_bytes() < before + CHUNK // 4
    held = b"x" * CHUNK
    assert own_memory_bytes() > before + CHUNK // 2
    assert held


def test_a_run_that_grows_saves_and_ends(parts, rows, tmp_path, monkeypatch, capsys):
    """Really grows, by 64 MB a batch. Exit code 75 and one line; with room it goes on."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    config = written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run"))
    inner, leaked, capacity = TuneTask.loss, [], own_memory_bytes() + 5 * CHUNK

    def leaking(self, batch):
        leaked.append(b"x" * CHUNK)
        return inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TuneTask, "loss", leaking)
        assert main(["train", str(config), "--engine.max_memory_gb", str(capacity / 1e9)]) == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("ultravox: stopped because the process has ")
    assert said.endswith("; a checkpoint was saved, go on with --resume")
    assert f"more than engine.max_memory_gb = {capacity / 1e9:g}" in said
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert folder.name in ("tune-000002", "tune-000003", "tune-000004")
    load_checkpoint(folder)
    assert not (tmp_path / "run" / "train.json").exists()
    assert main(["train", str(config), "--resume"]) == 0
    assert len(losses_of(tmp_path / "run")) == 6


def test_a_bound_below_what_the_models_take_is_refused(parts, rows, tmp_path, capsys):
    config = config_for(parts, write_rows(tmp_path / "set.jsonl", rows), tmp_path / "run")
    assert main(["train", str(written(tmp_path / "run.yaml", config)), "--engine.max_memory_gb", "0.01"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ultravox: error: the process has ")
    assert "more than engine.max_memory_gb = 0.01, before the first step: raise it" in line
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("resident", "reserved", "bound", "said"),
    [
        (3.0, 1.0, None, None),
        (3.0, 1.0, 4, None),
        (3.0, 1.0, 2, "the process has 3.00 GB, more than engine.max_memory_gb = 2"),
        (3.0, 5.5, 4.5, "the process has 5.50 GB of its GPU, more than engine.max_memory_gb = 4.5"),
    ],
)
def test_memory_here_and_on_a_gpu(monkeypatch, resident, reserved, bound, said):
    """No GPU is needed: what the allocator would tell is put in its place."""
    monkeypatch.setattr(memory_guard, "own_memory_bytes", lambda: int(resident * 1e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * 1e9))
    engine = Engine()
    engine.device = SimpleNamespace(type="cuda")
    assert MemoryGuard(bound, engine).excess() == said
