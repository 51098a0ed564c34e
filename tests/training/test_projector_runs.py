"""Each projector and each way down, in a whole tiny run: aligned, tuned, saved, loaded, and the same output."""

import json

import pytest
import torch
from tiny_run import tiny_config

from ultravox.audio.waveform import load_waveform
from ultravox.config.schema import RunConfig
from ultravox.data.prompts import render_prompt, user_message
from ultravox.model.factory import build_model, load_model
from ultravox.training.run import run_training

WAYS = [
    ("swiglu_v0.4", "mean"),
    ("linear", "stride"),
    ("mlp", "random"),
    ("conv", "stack"),
    ("transformer", "stack"),
    ("qformer", "stack"),
]


@pytest.mark.parametrize(("projector", "downsampling"), WAYS)
def test_runs(parts, tmp_path, projector, downsampling):
    content = tiny_config(*parts, tmp_path / "run").model_dump(mode="json")
    content["model"] |= {"projector": projector, "downsampling": downsampling}
    for stage, steps in zip(content["stages"], (25, 3), strict=True):
        stage["max_steps"], stage["optim"]["warmup_steps"] = steps, 1
    config = RunConfig.model_validate(content)
    run_training(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    aligned = [row["loss"] for row in rows if row["stage"] == "align" and "loss" in row]
    assert sum(aligned[-5:]) < sum(aligned[:5])
    tuned = [row for row in rows if row["stage"] == "tune" and "loss" in row]
    assert all(row["update_ratio_projector"] > 0 for row in tuned)

    model, processor = load_model(tmp_path / "run")
    fresh = build_model(config.model)
    trained, new = (dict(m.multi_modal_projector.state_dict()) for m in (model, fresh))
    assert trained.keys() == new.keys()
    assert any(not torch.equal(trained[name], new[name]) for name in trained)
    waveform = load_waveform(parts[1] / "audio" / "000.wav")
    prompt = render_prompt(processor.tokenizer, [user_message("Transcribe")])
    inputs = processor(text=prompt, audio=waveform)
    with torch.inference_mode():
        logits = model(**inputs).logits
        again = load_model(tmp_path / "run")[0](**inputs).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, again)
