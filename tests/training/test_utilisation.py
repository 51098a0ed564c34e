"""What the log says of how well the device is used, against PyTorch's own count of operations."""

import json

import pytest
import torch
from tiny_run import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from ultravox.model import kernels
from ultravox.model.factory import build_model
from ultravox.training import memory
from ultravox.training.flops import ModelFlops
from ultravox.training.peak_rate import gpu_rate, peak_rate
from ultravox.training.run import run_training


def rows_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_the_language_models_operations_are_those_that_pytorch_counts(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_HAS_ONEDNN", False)  # PyTorch does not count our own products
    model = build_model(tiny_config(*parts, tmp_path).model).train()
    inputs = torch.randn(2, 7, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
        model.logits_of(hidden.reshape(-1, 32)[:5]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    with_weights = sum(count for name, count in counts.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert with_weights == ModelFlops(model).language_model(num_tokens=14, num_logits=5)


def test_each_line_of_the_log_has_its_shares(parts, tmp_path):
    performance = {"peak_tflops": 0.5, "empty_cache_every": 7}
    config = tiny_config(*parts, tmp_path / "run", performance=performance)
    for stage, steps in zip(config.stages, (6, 4), strict=True):
        stage.max_steps, stage.optim.warmup_steps = steps, 1
    run_training(config)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 10
    for row in rows:
        assert 0 <= row["padding_share"] < 1
        assert row["model_tflops"] > 0
        # eight decimals are logged
        assert row["model_flop_utilisation"] == pytest.approx(row["model_tflops"] / 0.5, abs=2e-8)
    assert any(row["padding_share"] > 0 for row in rows)


def test_memory_is_returned_as_often_as_is_asked_for(parts, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "release_freed_memory", lambda: calls.append(1))
    config = tiny_config(*parts, tmp_path / "run", performance={"empty_cache_every": 4})
    config.stages = config.stages[:1]
    config.stages[0].max_steps = 9
    run_training(config)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_gpus_are_told_apart_by_their_names(name, tflops):
    assert gpu_rate(name) == (None if tflops is None else tflops * 1e12)


def test_what_the_user_knows_comes_first():
    assert peak_rate(torch.device("cpu"), torch.float32, 3.0) == 3e12
    assert peak_rate(torch.device("cpu"), torch.float32, None) is None
