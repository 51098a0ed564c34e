"""What buys speed or memory leaves the golden loss curve as it is."""

import json

import pytest
import torch
from golden_run import CURVE, golden_losses
from tiny_run import tiny_config

from ultravox.config.schema import RunConfig
from ultravox.errors import ConfigError
from ultravox.model.performance import choose_attention, layers_of, run_efficiently, use_liger
from ultravox.training.run import run_training


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "performance-home"))


@pytest.fixture
def tf32_flags():
    """As they were, after the test."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def golden() -> list[float]:
    return json.loads(CURVE.read_text())["losses"]


@pytest.mark.parametrize(
    "performance",
    [
        {"checkpoint_language_model": True},
        {"empty_cache_every": 1},
    ],
    ids=str,
)
def test_the_curve_is_the_golden_one(parts, tmp_path, performance):
    assert golden_losses(*parts, tmp_path / "run", performance=performance) == pytest.approx(golden(), rel=1e-4)


def stages_with(parts, folder, optim=None, **changes):
    """Those of the golden run, each with these changes."""
    stages = tiny_config(*parts, folder).model_dump(mode="json")["stages"]
    return [{**stage, **changes, "optim": {**stage["optim"], **(optim or {})}} for stage in stages]


def test_adamw_in_several_passes(parts, tmp_path):
    stages = stages_with(parts, tmp_path, optim={"fused": False})
    assert golden_losses(*parts, tmp_path / "run", stages=stages) == pytest.approx(golden(), rel=1e-4)


@pytest.fixture(scope="module")
def unpacked(parts, tmp_path_factory):
    """Losses by our own attention on batches that transformers' attention gets too: not packed, so other ones."""
    folder = tmp_path_factory.mktemp("unpacked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULTRAVOX_HOME", str(folder / "home"))
        return golden_losses(*parts, folder / "run", stages=stages_with(parts, folder, packing="off")[1:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_each_attention(parts, unpacked, tmp_path, attention, checkpoint):
    performance = {"attention": attention, "checkpoint_language_model": checkpoint}
    stages = stages_with(parts, tmp_path, packing="off")[1:]
    found = golden_losses(*parts, tmp_path / "run", stages=stages, performance=performance)
    assert len(found) == 40
    assert found == pytest.approx(unpacked, rel=1e-4)


def test_tf32_is_for_gpus_and_changes_nothing_here(parts, tmp_path, tf32_flags):
    assert golden_losses(*parts, tmp_path / "run", performance={"tf32": True}) == pytest.approx(golden(), rel=1e-4)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def few_steps(parts, run_dir, **changes):
    """Losses of a run that also trains the encoder, six steps of alignment and four of tuning."""
    model = {
        "language_model": str(parts[0][0]),
        "audio_encoder": str(parts[0][1]),
        "stack_factor": 3,
        "projector_hidden_size": 64,
        "language_model_lora": {"rank": 4},
        "audio_encoder_lora": {"rank": 2},
    }
    config = tiny_config(*parts, run_dir, model=model, **changes)
    for stage, steps in zip(config.stages, (6, 4), strict=True):
        stage.max_steps = steps
    run_training(RunConfig.model_validate(config.model_dump()))
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_checkpointing_of_an_encoder_that_trains(parts, tmp_path, monkeypatch):
    passes = []
    plain = torch.utils.checkpoint.checkpoint
    counted = lambda *arguments, **more: passes.append(1) or plain(*arguments, **more)  # noqa: E731
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    before = few_steps(parts, tmp_path / "plain")
    assert not passes
    both = {"checkpoint_audio_encoder": True, "checkpoint_language_model": True}
    after = few_steps(parts, tmp_path / "checkpointed", performance=both)
    assert after == pytest.approx(before, rel=1e-5)
    # two layers of the encoder in each of 6 + 4 x 2 batches, and two of the language model in the latter
    assert len(passes) == 2 * (6 + 8) + 2 * 8


def test_compiled_layers(parts, unpacked, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stages = stages_with(parts, tmp_path, packing="off", max_steps=40)[1:]
    found = golden_losses(*parts, tmp_path / "run", stages=stages, performance={"compile": True})
    counts = torch._dynamo.utils.counters
    assert counts["frames"]["ok"] > 0
    assert counts["stats"]["unique_graphs"] <= 6, "few graphs, for any length and for both layers"
    assert found == pytest.approx(unpacked, rel=1e-3)


def test_what_cannot_run_here_is_refused_with_a_way_out(tiny_model):
    language_model = tiny_model.language_model
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ConfigError, match=f"performance.attention {name} trains on CUDA GPUs alone.*take sdpa"):
            choose_attention(language_model, name)
    with pytest.raises(ConfigError, match="Triton kernels, for GPUs, and this is cpu: drop it"):
        use_liger(language_model)


def test_no_compiler(tiny_model, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no no-such-compiler: install g\\+\\+, or drop it"):
        run_efficiently(tiny_model, compile_layers=True)


def test_the_layers_of_both_parts(tiny_model):
    assert layers_of(tiny_model.language_model) == list(tiny_model.get_decoder().layers)
    assert layers_of(tiny_model.audio_tower) == list(tiny_model.audio_tower.layers)


def test_checkpointing_a_frozen_encoder_is_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="no effect on a frozen encoder"):
        tiny_config(*parts, tmp_path, performance={"checkpoint_audio_encoder": True})
