"""100 steps of a tiny run against a committed list: a change of arithmetic anywhere on the way shows here."""

import json

import pytest
from golden_run import CURVE, golden_losses


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))


def test_exact_when_repeated_and_equal_to_the_committed_list(parts, tmp_path):
    losses = golden_losses(*parts, tmp_path / "a")
    assert len(losses) == 100
    assert golden_losses(*parts, tmp_path / "b") == losses
    # Two instruction sets (SSE 4.1 and AVX-512) were seen to differ by 1e-5 after 100 steps.
    assert losses == pytest.approx(json.loads(CURVE.read_text())["losses"], rel=1e-4)


def test_it_learns(parts, tmp_path):
    losses = json.loads(CURVE.read_text())["losses"]
    assert sum(losses[50:60]) < 0.5 * sum(losses[:10]), "alignment"
    assert sum(losses[90:]) < 0.985 * sum(losses[60:70]), "tuning a random language model"


def test_live_features_equal_cached_ones(parts, tmp_path):
    """An encoder that could train, at rate 0, computes in every step what a frozen one has in the cache."""
    data = {
        "sources": [{"name": str(parts[1])}],
        "feature_dtype": "float32",
    }
    cached = golden_losses(*parts, tmp_path / "cached", data=data)
    model = {
        "language_model": str(parts[0][0]),
        "audio_encoder": str(parts[0][1]),
        "stack_factor": 3,
        "projector_hidden_size": 64,
        "language_model_lora": {"rank": 4},
        "train_audio_encoder": True,
    }
    from tiny_run import tiny_config

    stages = tiny_config(*parts, tmp_path).model_dump(mode="json")["stages"]
    for stage in stages:
        stage["optim"]["lr"]["audio_encoder"] = 0.0
    live = golden_losses(*parts, tmp_path / "live", data=data, model=model, stages=stages)
    assert live == pytest.approx(cached, rel=1e-4)
