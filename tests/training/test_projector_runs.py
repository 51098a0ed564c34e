"""Whole runs with projectors and downsamplings that are not the default: align, tune, decode, load again."""

import json
import os
import signal

import pytest
import torch
from tiny_run import tiny_config

from ultravox.config.schema import RunConfig
from ultravox.inference.api import load
from ultravox.training.align import AlignTask
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.run import run_training

STEPS = (24, 6)
KINDS = {
    "swiglu_v0.4": {"projector_hidden_size": 64},
    "linear": {},
    "mlp": {"projector_hidden_size": 64, "downsampling": "mean"},
    "conv": {"projector_hidden_size": 32},
    "transformer": {"num_projector_layers": 1, "downsampling": "stride"},
    "qformer": {"projector_hidden_size": 32, "num_projector_layers": 1, "num_projector_queries": 2},
    "swiglu": {"projector_hidden_size": 64, "downsampling": "random"},
}


def short(parts, run_dir, projector: str) -> RunConfig:
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    content["model"] |= {"projector": projector, "projector_hidden_size": 2048, **KINDS[projector]}
    for stage, steps in zip(content["stages"], STEPS, strict=True):
        stage["max_steps"] = steps
        stage["optim"]["lr"]["projector"] = 5e-4  # the embeddings of random models are quiet: more is too much for them
    return RunConfig.model_validate(content)


def losses(run_dir) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("projector", KINDS)
def test_a_run(projector, parts, tmp_path):
    run_training(short(parts, tmp_path / "run", projector))
    stages = json.loads((tmp_path / "run" / "train.json").read_text())["stages"]
    assert [(stage["steps"], stage["skipped_steps"]) for stage in stages] == [(steps, 0) for steps in STEPS]
    found = losses(tmp_path / "run")
    assert sum(found[19:24]) < sum(found[:5]), "alignment learns nothing"
    model = load(tmp_path / "run")
    (text,) = model.transcribe([parts[1] / "audio" / "000.wav"], max_new_tokens=4)
    assert isinstance(text, str)


def test_random_frames_are_those_of_the_seed_also_when_resumed(parts, tmp_path, monkeypatch):
    """One run is whole; the other stops in its 14th step, and is resumed after other numbers were drawn."""
    run_training(short(parts, tmp_path / "whole", "swiglu"))
    config = short(parts, tmp_path / "resumed", "swiglu")
    calls, inner = [], AlignTask.loss

    def loss(self, batch):
        calls.append(batch)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(AlignTask, "loss", loss)
        with pytest.raises(TrainingInterrupted):
            run_training(config)
    torch.manual_seed(99)
    run_training(config, resume=True)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
