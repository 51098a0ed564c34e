"""A rank that is killed while each rank writes its part of a checkpoint: the one before it, or the whole new one."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forked_ranks import STEPS, on_ranks, train
from killing import kill_in_call

import ultravox.files
import ultravox.training.sharded_store as module
from ultravox.training.checkpoint import list_checkpoints, load_checkpoint

#: Rank, name, which call of it from step 4 on, and whether once it is made.
WRITE_POINTS = {
    "before the temporary folder": (0, "mkdtemp", 1, False),
    "before a part is made": (1, "save", 1, False),
    "before the first rank's part is made": (0, "save", 2, False),
    "between a part and its fsync": (1, "fsync", 1, False),
    "between the parts of two kinds": (1, "fsync", 1, True),
    "before a part has its name": (1, "rename", 1, False),
    "before a part's hash": (1, "sha256_file", 2, False),
    "before the state": (0, "write_text", 1, False),
    "before the manifest": (0, "write_text", 2, False),
    "before the folder has its name": (0, "replace", 1, False),
    "after the folder has its name": (0, "replace", 1, True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and moments of a run that nobody has killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert on_ranks(folder / "meeting", 2, lambda engine: train(engine, folder)) == [0, 0]
    return load_checkpoint(list_checkpoints(folder, ["toy"])[-1])


def kill_at(name: str, call: int, after: bool) -> None:
    """From here on, this process is killed in a call of that name, the first of which is 1."""
    owners = {
        "mkdtemp": (ultravox.files.tempfile, "mkdtemp"),
        "save": (safetensors.torch, "save"),
        "fsync": (os, "fsync"),
        "rename": (Path, "rename"),
        "sha256_file": (module, "sha256_file"),
        "write_text": (Path, "write_text"),
        "replace": (os, "replace"),
    }
    kill_in_call(*owners[name], call, after=after)


def verify_and_finish(folder, whole, least, most):
    """All that are listed are whole, and from the newest the run ends as if nothing had been."""
    found = list_checkpoints(folder, ["toy"])
    for checkpoint in found:
        load_checkpoint(checkpoint)
    assert least <= int(found[-1].name.rpartition("-")[2]) <= most
    assert on_ranks(folder / "meeting", 2, lambda engine: train(engine, folder)) == [0, 0]
    last = load_checkpoint(list_checkpoints(folder, ["toy"])[-1])
    for kind in ("trainable", "optimizer"):
        mine, theirs = getattr(last, kind), getattr(whole, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not list((folder / "checkpoints").glob(".*")), "nothing is left of what was half done"


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_a_rank_killed_at_a_write_point(tmp_path, whole, point):
    rank, *where = WRITE_POINTS[point]

    def work(engine):
        def at_step(step):
            if step == 4 and engine.rank == rank:
                kill_at(*where)

        train(engine, tmp_path, at_step=at_step)

    ends = on_ranks(tmp_path / "meeting", 2, work)
    assert ends[rank] == -signal.SIGKILL, "the point was reached"
    assert ends[1 - rank] > 0, "the other rank has ended too, with an error"
    verify_and_finish(tmp_path, whole, 2, 4)


@pytest.mark.parametrize("trial", range(3))
def test_a_rank_killed_at_any_time(tmp_path, whole, trial):
    chosen = random.Random(trial)
    rank, wait = chosen.randrange(2), chosen.uniform(0.0, 0.05)

    def work(engine):
        def at_step(step):
            if step == 4 and engine.rank == rank:  # the third one is being written, or is just done
                time.sleep(wait)
                os.kill(os.getpid(), signal.SIGKILL)

        train(engine, tmp_path, at_step=at_step)

    ends = on_ranks(tmp_path / "meeting", 2, work)
    assert ends[rank] == -signal.SIGKILL
    assert ends[1 - rank] > 0
    verify_and_finish(tmp_path, whole, 2, STEPS - 1)
