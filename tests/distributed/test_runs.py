"""Runs on two gloo ranks against the same run on one: losses, order, weights, resumption, and ranks that fail."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config
from two_ranks import finish, start, train

from ultravox.cli.main import main
from ultravox.config.load import dump_config
from ultravox.config.schema import RunConfig
from ultravox.training.checkpoint import load_checkpoint

SAME = 1e-5
"""Relative, in float32: only the order of sums differs."""
SAME_HALF = 2e-2
"""Relative, with weights in bfloat16, whose rounding is 2^-9 a product."""


def write_config(parts, folder, name, *, steps=(8, 8), kind="auto", timeout=60, dtype="float32", **stage):
    models, tones = parts
    content = tiny_config(models, tones, folder / name).model_dump(mode="json")
    content["engine"] = {"kind": kind, "timeout_seconds": timeout}
    content["logging"]["samples"] = True
    content["model"]["dtype"] = dtype
    for of_stage, count in zip(content["stages"], steps, strict=True):
        of_stage |= {"max_steps": count, "accumulation_steps": 2, "evaluate_every": 0, **stage}
        of_stage["optim"]["warmup_steps"] = min(3, count)
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(RunConfig.model_validate(content)))
    return path


def losses(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {(row["stage"], row["step"]): row["loss"] for row in rows if "loss" in row}


def samples(run):
    """(stage, step) → ids that were trained on, over all ranks and attempts, in the order of the step's batches."""
    found: dict[tuple[str, int], list] = {}
    for path in (run / "samples").rglob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            if "step" in row:
                place = (path.parent.name, row["step"])
                found.setdefault(place, []).append((row["micro_batch"], row["sources"], row["uids"]))
    return {place: sorted(batches) for place, batches in found.items()}


def train_well(config, world_size, *more):
    for code, output in train(config, world_size, *more):
        assert code == 0, output


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    """Runs of one process, by their dtype."""
    folder = tmp_path_factory.mktemp("alone")
    for dtype in ("float32", "bfloat16"):
        train_well(write_config(parts, folder, dtype, dtype=dtype), 1)
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, dtype) for kind in ("ddp", "fsdp2") for dtype in ("float32", "bfloat16")),
        *((kind, "bfloat16") for kind in ("zero2", "zero3")),  # float32: test_zero.py, test_quickstart.py
    ],
)
def test_two_ranks_train_as_one_process_does(parts, alone, tmp_path, kind, dtype):
    train_well(write_config(parts, tmp_path, "run", kind=kind, dtype=dtype), 2)
    one, two = alone / dtype, tmp_path / "run"
    tolerance = SAME if dtype == "float32" else SAME_HALF
    expected = losses(one)
    assert len(expected) == 16
    assert losses(two) == pytest.approx(expected, rel=tolerance)
    assert samples(two) == samples(one)
    assert not shared_ids(two)
    assert json.loads((two / "train.json").read_text())["engine"] == {
        "kind": kind,
        "world_size": 2,
        "device": "cpu",
    }
    weights, theirs = load_file(one / "model" / "model.safetensors"), load_file(two / "model" / "model.safetensors")
    assert weights.keys() == theirs.keys()
    for name, tensor in weights.items():
        difference = (tensor.double() - theirs[name].double()).norm() / tensor.double().norm().clamp_min(1e-3)
        assert difference < 100 * tolerance, name


def shared_ids(run):
    """Rows of the first step of `align` that both ranks were given."""
    of_ranks = []
    for rank in range(2):
        (path,) = (run / "samples" / "align").glob(f"*rank{rank}*")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        of_ranks.append({uid for row in rows if row.get("step") == 0 for uid in row["uids"]})
    assert all(of_ranks)
    return of_ranks[0] & of_ranks[1]


def stop_at(processes, run, step, rank):
    """Ask one rank to stop, once the run is past a step of its first stage."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        log = run / "log.jsonl"
        if log.is_file() and sum('"loss"' in line for line in log.read_text().splitlines()) >= step:
            processes[rank].send_signal(signal.SIGTERM)
            return finish(processes)
        time.sleep(0.01)
    raise AssertionError(finish(processes))


def test_a_run_goes_on_with_another_number_of_ranks(parts, tmp_path):
    """2 → 1 → 2 ranks; the signal comes to one rank only, and stops all."""
    steps = (60, 4)
    train_well(write_config(parts, tmp_path, "whole", steps=steps), 1)
    config = write_config(parts, tmp_path, "run", steps=steps)
    run = tmp_path / "run"
    arguments = ["-m", "ultravox", "train", str(config)]
    for world_size, more, at, rank in ((2, [], 3, 1), (1, ["--resume"], 15, 0)):
        for code, output in stop_at(start([*arguments, *more], world_size), run, at, rank):
            assert code == 143, output
            assert "a checkpoint was saved" in output
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert all(name.startswith("align-") and int(name[6:]) < 60 for name in saved), saved
    train_well(config, 2, "--resume")
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=SAME)
    assert len(losses(run)) == 64
    assert samples(run) == samples(tmp_path / "whole")


def test_the_same_ranks_go_on_bit_for_bit(parts, tmp_path, capsys):
    config = write_config(parts, tmp_path, "run", steps=(2, 30), kind="fsdp2")
    train_well(write_config(parts, tmp_path, "whole", steps=(2, 30), kind="fsdp2"), 2)
    run, alone = tmp_path / "run", tmp_path / "alone"
    for code, output in stop_at(start(["-m", "ultravox", "train", str(config)], 2), run, 6, 0):
        assert code == 143, output
    shutil.copytree(run, alone)
    train_well(config, 2, "--resume")
    assert losses(run) == losses(tmp_path / "whole")

    # What two ranks have written in parts, one process goes on from, and every command takes
    train_well(config, 1, "--resume", "--run_dir", str(alone), "--engine.kind", "single")
    assert losses(alone) == pytest.approx(losses(run), rel=SAME)
    assert main(["checkpoint", "verify", str(run)]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "inspect", str(run), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["ranks"], row["parts"]) for row in found] == [(2, 2)] * len(found)
    for command, *more in (["convert"], ["average", "--last", "2"]):
        assert main(["checkpoint", command, str(run), *more, "--output", str(tmp_path / command)]) == 0
    expected = load_file(run / "model" / "model.safetensors")
    converted, averaged = (load_file(tmp_path / name / "model.safetensors") for name in ("convert", "average"))
    assert converted.keys() == averaged.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    assert not all(torch.equal(averaged[name], expected[name]) for name in expected)


def test_a_killed_rank_ends_the_others(parts, tmp_path):
    config = write_config(parts, tmp_path, "run", steps=(2000, 1), kind="ddp", timeout=20)
    processes = start(["-m", "ultravox", "train", str(config)], 2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "log.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].kill()
    begin = time.monotonic()
    (code, output), _ = finish(processes, timeout=60)
    assert code == 2, output
    assert "rank 0 waited in vain for the other ranks" in output
    assert "Traceback" not in output
    assert time.monotonic() - begin < 30, "the timeout, and the time to end"


def test_a_stuck_rank_ends_all_with_its_stack(parts, tmp_path):
    config = write_config(parts, tmp_path, "run", steps=(2000, 1), kind="ddp", timeout=8)
    results = finish(start([os.path.join(os.path.dirname(__file__), "stuck.py"), str(config)], 2), timeout=120)
    assert all(code not in (0, None) for code, _ in results), results
    assert "Timeout" in results[1][1]
    assert "stuck_in_data" in results[1][1], "the stack of what it is stuck in"


def test_memory_of_one_rank_above_its_bound_stops_all_after_the_same_step(parts, tmp_path):
    config = write_config(parts, tmp_path, "run", steps=(40, 1), kind="ddp")
    for code, output in finish(start([os.path.join(os.path.dirname(__file__), "grows.py"), str(config)], 2)):
        assert code == 75, output
        assert "stopped because rank 1 has 9.00 GB, more than engine.max_memory_gb = 2; a checkpoint was" in output
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert folder.name == "align-000004"
    load_checkpoint(folder)


@pytest.mark.parametrize(
    ("world_size", "kind", "message"),
    [(2, "single", "engine.kind is single, but the launcher started 2"), (1, "fsdp2", "but there is one")],
)
def test_an_engine_that_does_not_fit_the_launch(parts, tmp_path, world_size, kind, message):
    config = write_config(parts, tmp_path, "run", kind=kind)
    for code, output in train(config, world_size):
        assert code == 2
        assert message in output
        assert "Traceback" not in output


def test_steps_that_ranks_cannot_share(parts, tmp_path):
    config = write_config(parts, tmp_path, "run", kind="ddp", timeout=10)
    (code, output), _ = train(config, 2, "--stages.align.accumulation_steps", "1")
    assert code == 2
    assert "cannot be dealt to 2 processes evenly" in output


def test_half_an_environment_is_refused(monkeypatch):
    from ultravox.errors import ConfigError
    from ultravox.training.engines.ranks import ranks_of_environment

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        ranks_of_environment()
    for name, value in (("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1"), ("RANK", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="do not fit together"):
        ranks_of_environment()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="must be integers"):
        ranks_of_environment()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--stages.tune.tune.distillation.weight", "1"],
            "the teacher runs only for texts that its cache",
        ),
        (["--stages.tune.max_batch_memory_gb", "1"], "leave out max_batch_memory_gb"),
    ],
)
def test_what_would_hang_is_refused_before_anything_loads(parts, tmp_path, capsys, more, message):
    config = write_config(parts, tmp_path, "run", kind="ddp")
    assert main(["train", str(config), "--engine.kind", "fsdp2", *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def stream_config(parts, shards, folder, name):
    from test_streaming_run import stream_config

    content = stream_config(parts, shards, folder / name, accumulation_steps=2).model_dump(mode="json")
    content["stages"][0] |= {"max_steps": 40, "evaluate_every": 0}
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(RunConfig.model_validate(content)))
    return path


def test_a_stream_goes_on_with_as_many_ranks_alone(parts, tmp_path):
    """Each rank reads shards of its own, and goes on where it was; another number of them is refused."""
    from test_streaming_run import write_shards

    shards = write_shards(parts[1], tmp_path / "shards")
    train_well(stream_config(parts, shards, tmp_path, "whole"), 2)
    config = stream_config(parts, shards, tmp_path, "run")
    for code, output in stop_at(start(["-m", "ultravox", "train", str(config)], 2), tmp_path / "run", 8, 1):
        assert code == 143, output
    ((code, output),) = train(config, 1, "--resume")
    assert code == 2
    assert "the number of processes that share the streams differs: ranks was 2, is 1" in output
    train_well(config, 2, "--resume")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")
    ids = samples(tmp_path / "whole")
    assert len(ids) == 40
