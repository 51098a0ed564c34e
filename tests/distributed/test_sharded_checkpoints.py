"""Checkpoints of which each rank has written its part: what is in the files, who can read them, and what is refused."""

import contextlib
import errno
import json
import pickle
import time

import pytest
import safetensors.torch
import torch
from forked_ranks import TOLD, ToyRun, on_ranks, train
from safetensors import safe_open

import ultravox.training.sharded_store as module
from ultravox.cli.main import main
from ultravox.config.checkpoints import CheckpointsConfig
from ultravox.errors import CheckpointError, UltravoxError
from ultravox.files import sha256_file
from ultravox.training.checkpoint import list_checkpoints, load_checkpoint
from ultravox.training.engines.shards import whole
from ultravox.training.sharded_store import load_for_engine, open_store
from ultravox.training.tensor_parts import StoredTensors

FILES = [f"{kind}-{rank:05d}-of-00002.safetensors" for kind in ("optimizer", "trainable") for rank in (1, 2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    assert on_ranks(folder / "meeting", 2, lambda engine: train(engine, folder, steps=2)) == [0, 0]
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the newest."""
    import shutil

    return shutil.copytree(list_checkpoints(saved, ["toy"])[-1], tmp_path / "toy-000002")


def rewrite_manifest(folder, **changes):
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, **changes}))


def hashes_of(folder):
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.name != "manifest.json"}


def test_each_rank_has_written_about_half_of_what_is_sharded(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "state.json", "manifest.json"])
    assert json.loads((folder / "manifest.json").read_text())["version"] == 2
    for kind, copies in (("trainable", 1), ("optimizer", 2)):
        counts = {}
        for rank in (1, 2):
            with safe_open(folder / f"{kind}-{rank:05d}-of-00002.safetensors", "pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    counts.setdefault("layers." in name, [0, 0])[rank - 1] += file.get_tensor(name).numel()
        sharded = copies * (6 * 6 + 6 + 5 * 6 + 5)
        assert sum(counts[True]) - (4 if copies == 2 else 0) == sharded  # four counts of steps
        assert all(0.4 * sharded < count < 0.6 * sharded for count in counts[True])
        assert counts[False][1] == 0, "what both hold whole is the first one's"


@pytest.mark.parametrize("world_size", [1, 3])
def test_any_number_of_ranks_reads_them(saved, tmp_path, world_size):
    """Bit for bit, and of shards each rank its part."""
    folder = list_checkpoints(saved, ["toy"])[-1]
    expected = load_checkpoint(folder)

    def work(engine):
        run = ToyRun(engine)
        assert run.restore(folder) == 2
        for kind, state in (("trainable", run.checkpoint(2).trainable), ("optimizer", run.optimizer.state_dict())):
            theirs = getattr(expected, kind)
            assert state.keys() == theirs.keys()
            for name, tensor in state.items():
                assert torch.equal(whole(tensor), theirs[name]), name
        if engine.is_sharded:
            stored = load_for_engine(folder, engine).trainable
            assert isinstance(stored, StoredTensors)
            read = stored.like({name: parameter.detach() for name, parameter in run.named.items()})
            assert read["layers.0.weight"].to_local().shape == (2, 6)

    assert on_ranks(tmp_path / "meeting", world_size, work) == [0] * world_size


def test_two_ranks_then_one_then_two(saved, tmp_path):
    """What a single process writes are whole tensors, as ever, and those are read in parts again."""
    for world_size, steps in ((2, 2), (1, 4), (2, 6)):
        ends = on_ranks(
            tmp_path / "meeting", world_size, lambda engine, steps=steps: train(engine, tmp_path, steps, keep=9)
        )
        assert ends == [0] * world_size
    found = list_checkpoints(tmp_path, ["toy"])
    assert [json.loads((path / "manifest.json").read_text())["version"] for path in found] == [2, 2, 1, 1, 2, 2]
    whole_run = tmp_path / "whole"
    on_ranks(tmp_path / "meeting", 1, lambda engine: train(engine, whole_run, 6))
    mine, theirs = (load_checkpoint(list_checkpoints(run, ["toy"])[-1]).trainable for run in (tmp_path, whole_run))
    for name in theirs:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=1e-2 if theirs[name].dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


def test_training_goes_on_while_parts_are_written(tmp_path):
    """What is saved is what was given, whatever becomes of it meanwhile."""

    def work(engine):
        run = ToyRun(engine)
        run.step(1)
        before = {name: whole(parameter.detach()).clone() for name, parameter in run.named.items()}
        real = module.write_parts

        def slow(*args):
            while not (tmp_path / "changed").exists():
                time.sleep(0.01)
            return real(*args)

        module.write_parts = slow
        with open_store(tmp_path, ["toy"], CheckpointsConfig(), engine) as store:
            store.save("toy", 1, run.checkpoint(1))
            store.settle()
            run.step(2)  # collective, on both, while the threads of both wait
            assert not list_checkpoints(tmp_path, ["toy"])
            engine.gather(None)  # both have looked
            (tmp_path / "changed").touch()
        stored = load_checkpoint(list_checkpoints(tmp_path, ["toy"])[0]).trainable
        assert all(torch.equal(stored[name], before[name]) for name in before)
        assert not torch.equal(whole(run.named["layers.0.weight"].detach()), before["layers.0.weight"])

    assert on_ranks(tmp_path / "meeting", 2, work) == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_disk_is_full_is_told_on_all(tmp_path, capfd, rank):
    def work(engine):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        if engine.rank == rank:
            safetensors.torch.save = full
        train(engine, tmp_path, steps=3)

    assert on_ranks(tmp_path / "meeting", 2, work) == [TOLD, TOLD]
    said = capfd.readouterr().err
    assert f"rank {rank}: disk full while writing" in said
    assert f"rank {1 - rank}: rank {rank} could not write its part of a checkpoint: disk full while writing" in said
    assert not list((tmp_path / "checkpoints").iterdir()), "nothing is left"


def test_machines_that_do_not_share_a_disk_are_told(tmp_path, capfd):
    def work(engine):
        if engine.rank == 1:
            real = module.Path.is_dir
            module.Path.is_dir = lambda path: ".toy" not in path.name and real(path)
        train(engine, tmp_path, steps=1)

    assert on_ranks(tmp_path / "meeting", 2, work) == [TOLD, TOLD]
    assert "put run_dir on storage that all machines share" in capfd.readouterr().err


class Canary:
    """Unpickling it leaves a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", [*FILES, "state.json", "manifest.json", ".metadata"])
def test_no_pickle_is_ever_loaded(folder, tmp_path, name):
    """In each slot, with a hash that is right, and in that of DCP's own metadata."""
    mark = tmp_path / "mark"
    (folder / name).write_bytes(pickle.dumps(Canary(mark)))
    pickle.loads((folder / name).read_bytes())
    assert mark.exists(), "the canary sings"
    mark.unlink()
    if name in hashes_of(folder) and name != ".metadata":
        rewrite_manifest(folder, sha256={k: v for k, v in hashes_of(folder).items() if k != ".metadata"})
    told = contextlib.nullcontext() if name == ".metadata" else pytest.raises(CheckpointError)
    with told:
        load_checkpoint(folder)

    def work(engine):
        load_for_engine(folder, engine).trainable.whole()

    ends = on_ranks(tmp_path / "meeting", 2, work)
    assert ends == ([0, 0] if name == ".metadata" else [TOLD, TOLD])
    assert not mark.exists()


@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_a_flipped_byte_is_found_by_all_ranks(folder, tmp_path, capfd, name):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_checkpoint(folder)
    assert main(["checkpoint", "verify", str(folder)]) == 2
    if name == FILES[0]:
        assert on_ranks(tmp_path / "meeting", 2, lambda engine: load_for_engine(folder, engine)) == [TOLD, TOLD]
        assert capfd.readouterr().err.count(f"{name} is damaged") == 2


def test_parts_that_do_not_belong_together_are_refused(folder):
    hashes = hashes_of(folder)
    (folder / FILES[3]).rename(folder / "away")
    with pytest.raises(CheckpointError, match=rf"{FILES[3]} is missing"):
        load_checkpoint(folder)
    rewrite_manifest(folder, sha256={name: digest for name, digest in hashes.items() if name != FILES[3]})
    with pytest.raises(CheckpointError, match=r"does not hold all of trainable layers"):
        load_checkpoint(folder)
    (folder / "away").rename(folder / FILES[3])
    with pytest.raises(CheckpointError, match=rf"{FILES[3]} is not in manifest\.json"):
        load_checkpoint(folder)
    rewrite_manifest(folder, sha256={**hashes, "../model.safetensors": "0"})
    with pytest.raises(CheckpointError, match=r"names \.\./model\.safetensors, which is no file of a checkpoint"):
        load_checkpoint(folder)
    rewrite_manifest(folder, sha256=hashes, version=3)
    with pytest.raises(UltravoxError, match="format version 3, expected 1 or 2"):
        load_checkpoint(folder)
