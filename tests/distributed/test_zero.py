"""What is DeepSpeed's own: its checkpoints are those of one process, measures, activation checkpointing, refusals."""

import json
import shutil
import sys

import pytest
import torch
from test_runs import SAME, losses, stop_at, train_well, write_config
from two_ranks import start, train

from ultravox.cli.main import main
from ultravox.training.checkpoint import list_checkpoints, load_checkpoint

STEPS = (2, 24)


def measures(run):
    """(stage, step) → the norms of the parts' gradients and updates."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kinds = ("grad_norm_", "update_ratio_")
    found = {(r["stage"], r["step"]): {k: v for k, v in r.items() if k.startswith(kinds)} for r in rows if "loss" in r}
    return {place: of_step for place, of_step in found.items() if of_step}


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train_well(write_config(parts, folder, "run", steps=STEPS), 1)
    return folder / "run"


@pytest.mark.parametrize(
    ("kind", "more"), [("zero2", ()), ("zero3", ("--performance.checkpoint_language_model", "true"))]
)
def test_a_run_goes_on_bit_for_bit_and_on_one_process(parts, alone, tmp_path, kind, more):
    train_well(write_config(parts, tmp_path, "whole", steps=STEPS, kind=kind), 2, *more)
    config, run, single = (
        write_config(parts, tmp_path, "run", steps=STEPS, kind=kind),
        tmp_path / "run",
        tmp_path / "one",
    )
    for code, output in stop_at(start(["-m", "ultravox", "train", str(config), *more], 2), run, 6, 1):
        assert code == 143, output
    saved = list_checkpoints(run, ["align", "tune"])[-1]
    assert saved.name not in ("align-000002", "tune-000024"), "stopped within a stage"
    shutil.copytree(run, single)
    train_well(config, 2, "--resume", *more)
    assert losses(run) == losses(tmp_path / "whole")

    train_well(config, 1, "--resume", "--run_dir", str(single), "--engine.kind", "single", *more)
    assert losses(single) == pytest.approx(losses(alone), rel=SAME)
    assert losses(run) == pytest.approx(losses(alone), rel=SAME)

    mine, expected = (load_checkpoint(list_checkpoints(of, ["align", "tune"])[-1]) for of in (run, alone))
    for kept, wanted in ((mine.trainable, expected.trainable), (mine.optimizer, expected.optimizer)):
        assert {name: tensor.shape for name, tensor in kept.items()} == {n: t.shape for n, t in wanted.items()}
        for name, tensor in wanted.items():
            torch.testing.assert_close(kept[name].double(), tensor.double(), rtol=1e-2, atol=1e-6, msg=name)

    found, wanted = measures(tmp_path / "whole"), measures(alone)
    assert found.keys() == wanted.keys()
    assert any(key.startswith("update_ratio_") for of_step in wanted.values() for key in of_step)
    for place, of_step in wanted.items():
        assert found[place] == pytest.approx(of_step, rel=1e-3), place


def test_deepspeed_that_is_not_there(parts, tmp_path):
    config = write_config(parts, tmp_path, "run", kind="zero2")
    for code, output in train(config, 2, PYTHONPATH=":".join(path for path in sys.path if "deepspeed" not in path)):
        assert code == 2, output
        assert "need DeepSpeed: pip install 'ultravox[deepspeed]', or choose fsdp2" in output
        assert "Traceback" not in output


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("zero2", ["--stages.tune.optim.optimizer", "adamw_8bit"], "for which adamw_8bit is not made: take adamw"),
        ("zero3", ["--model.dtype", "float16"], "engine.kind zero3 trains float32 and bfloat16"),
        ("zero3", ["--performance.compile", "true"], "come and go with engine.kind zero3"),
        ("zero3", ["--stages.tune.max_batch_memory_gb", "1"], "with engine.kind zero3 all must run the same passes"),
        ("zero3", ["--stages.tune.tune.distillation.weight", "1"], "with engine.kind zero3 each rank must run"),
    ],
)
def test_what_zero_cannot_do_is_refused_before_anything_loads(parts, tmp_path, capsys, kind, more, message):
    config = write_config(parts, tmp_path, "run", kind="ddp")
    assert main(["train", str(config), "--engine.kind", kind, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
