import json
import math

import pytest
import torch
from tiny_run import tiny_config

from ultravox.training.loss_scale import FIRST_SCALE, GROWTH_INTERVAL, LEAST_SCALE, next_scale
from ultravox.training.run import run_training


def test_the_rule_is_that_of_torch():
    """Against `torch.amp.GradScaler`, on a made-up history of overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scale, steps = FIRST_SCALE, 0
    for step in range(2 * GROWTH_INTERVAL + 40):
        overflowed = step in (3, 4, 10, 2011)
        weight.grad = torch.full((1,), math.inf if overflowed else 1.0)
        scaler.scale(torch.ones(1))
        scaler.step(optimizer)
        scaler.update()
        scale, steps = next_scale(scale, steps, overflowed=overflowed)
        assert scale == scaler.get_scale(), step
    assert scale != FIRST_SCALE


def test_it_does_not_fall_for_ever():
    scale, steps = FIRST_SCALE, 0
    for _ in range(100):
        scale, steps = next_scale(scale, steps, overflowed=True)
    assert scale == LEAST_SCALE


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def config_of(parts, run_dir, dtype):
    models = parts[0]
    model = {
        "language_model": str(models[0]),
        "audio_encoder": str(models[1]),
        "stack_factor": 3,
        "projector_hidden_size": 64,
        "language_model_lora": {"rank": 4},
        "dtype": dtype,
    }
    stages = tiny_config(*parts, run_dir).model_dump(mode="json")["stages"]
    for stage, steps in zip(stages, (20, 10), strict=True):
        stage |= {"max_steps": steps, "checkpoint_every": 5}
    return tiny_config(*parts, run_dir, model=model, stages=stages, checkpoints={"keep_last": 9})


def test_a_run_in_float16_is_that_in_float32(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("ultravox.training.trainer.FIRST_SCALE", 1.0)
    losses = {}
    for dtype in ("float32", "float16"):
        run_training(config_of(parts, tmp_path / dtype, dtype))
        losses[dtype] = [row["loss"] for row in rows_of(tmp_path / dtype) if "loss" in row]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["float16"] != losses["float32"]
    assert {row["loss_scale"] for row in rows_of(tmp_path / "float16") if "loss" in row} == {1.0}
    assert all("loss_scale" not in row for row in rows_of(tmp_path / "float32"))


def test_an_overflow_halves_the_scale_and_ends_no_run(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("ultravox.training.trainer.FIRST_SCALE", 2.0**13)
    run_training(config_of(parts, tmp_path / "run", "float16"))
    rows = [row for row in rows_of(tmp_path / "run") if row["stage"] == "align"]
    skipped = [row["step"] for row in rows if "skipped_ids" in row]
    assert skipped[:6] == [1, 2, 3, 4, 5, 6], "more in a row than end a run whose loss is not finite"
    before_last = sum(step < 20 for step in skipped)
    taken = [row for row in rows if row.get("loss") is not None]
    assert taken[-1]["step"] == 20
    assert taken[-1]["loss_scale"] == 2.0 ** (13 - before_last)

    state = json.loads((tmp_path / "run" / "checkpoints" / "align-000005" / "state.json").read_text())
    assert state["loop"]["loss_scale"] == 2.0**8, "a run goes on with the scale that it had found"
