"""`ultravox estimate`: shapes, memory by what real tensors take, engines by hand, and what it says."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import save_tiny_models, tiny_config
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, Wav2Vec2BertConfig, Wav2Vec2Config

from ultravox.cli.main import main
from ultravox.config.load import dump_config, load_config
from ultravox.config.schema import RunConfig
from ultravox.estimate.batch import BatchWork
from ultravox.estimate.run import choose_trainable, estimate_run, run_as_configured
from ultravox.estimate.skeleton import build_skeleton, weightless
from ultravox.model.factory import build_model

GPU = Path(__file__).parents[2] / "configs" / "gpu"
#: Parameters as the models' own pages and checkpoints count them.
LLAMA, QWEN, TURBO_ENCODER = 8_030_261_248, 8_190_735_360, 636_968_960


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


def config_of(models, tmp_path, **changes):
    content = tiny_config(models, tmp_path, tmp_path / "run").model_dump(mode="json")
    content["model"] |= {"dtype": "bfloat16", **changes.pop("model", {})}
    return RunConfig.model_validate(content | changes)


def allocated(work, folder):
    """Most bytes that the allocator has handed out at once during the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("model", "performance"),
    [
        ({}, {}),
        ({"train_audio_encoder": True}, {}),
        ({"train_audio_encoder": True}, {"checkpoint_language_model": True, "checkpoint_audio_encoder": True}),
    ],
)
def test_activations_are_what_the_allocator_hands_out(models, tmp_path, model, performance):
    config = config_of(models, tmp_path, model=model, performance=performance)
    estimates = estimate_run(config, clip_seconds=2.0, text_tokens=40)
    real = build_model(config.model)
    run_as_configured(real, config)
    trainable = {name: p for name, p in real.named_parameters() if p.requires_grad}
    for stage, estimate in zip(config.stages, estimates, strict=True):
        choose_trainable(trainable, stage)
        work = BatchWork(real, stage, 2.0, 40)
        work.prepare()
        work()
        assert work.rows == estimate.batch.rows > 1
        assert allocated(work, tmp_path) == pytest.approx(estimate.memory.activations, rel=0.1), stage.name
        counts = {name: p.numel() for name, p in trainable.items() if p.requires_grad}
        assert sum(estimate.trainable.values()) == sum(counts.values()) > 0
        assert sum(estimate.parameters.values()) == sum(p.numel() for p in real.parameters())
        assert estimate.memory.weights == sum(t.nbytes for t in (*real.parameters(), *real.buffers()))
        assert estimate.memory.gradients == sum(p.nbytes for p in real.parameters() if p.requires_grad)


PROJECTORS = ["linear", "mlp", "conv", "transformer", "qformer", "ctc_weighted"]


@pytest.mark.parametrize("projector", PROJECTORS)
def test_each_projector_counts_as_it_is(models, tmp_path, projector):
    config = config_of(models, tmp_path, model={"projector": projector, "projector_hidden_size": 2048})
    estimates = estimate_run(config, clip_seconds=2.0, text_tokens=40)
    real = build_model(config.model)
    trainable = {name: p for name, p in real.named_parameters() if p.requires_grad}
    choose_trainable(trainable, config.stages[-1])
    work = BatchWork(real, config.stages[-1], 2.0, 40)
    work.prepare()
    work()
    estimate = estimates[-1]
    assert (work.rows, work.audio_tokens) == (estimate.batch.rows, estimate.batch.audio_tokens)
    assert estimate.trainable["projector"] == sum(p.numel() for p in real.multi_modal_projector.parameters()) > 0
    assert allocated(work, tmp_path) == pytest.approx(estimate.memory.activations, rel=0.1)


@pytest.mark.parametrize("kind", [Wav2Vec2Config, Wav2Vec2BertConfig])
def test_encoders_of_other_kinds(models, tmp_path, kind):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    kind(**small, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2).save_pretrained(tmp_path / "encoder")
    encoder = {"audio_encoder": str(tmp_path / "encoder"), "train_audio_encoder": True}
    estimate = estimate_run(config_of(models, tmp_path, model=encoder), clip_seconds=2.0)[-1]
    with torch.device("meta"):
        expected = sum(
            p.numel() for p in AutoModel.from_config(kind.from_pretrained(tmp_path / "encoder")).parameters()
        )
    assert estimate.parameters["audio_encoder"] == expected
    assert 0 < estimate.trainable["audio_encoder"] <= expected


def test_checkpointed_layers_take_less(models, tmp_path):
    plain = estimate_run(config_of(models, tmp_path), clip_seconds=2.0)[-1]
    config = config_of(models, tmp_path, performance={"checkpoint_language_model": True})
    checkpointed = estimate_run(config, clip_seconds=2.0)[-1]
    assert checkpointed.memory.activations < 0.8 * plain.memory.activations
    assert checkpointed.memory.weights == plain.memory.weights


def test_engines_share_what_they_say(models, tmp_path):
    found = {
        kind: estimate_run(config_of(models, tmp_path, engine={"kind": kind}), ranks=ranks, clip_seconds=2.0)[-1]
        for kind, ranks in (("single", 1), ("ddp", 4), ("fsdp2", 4), ("zero2", 4), ("zero3", 4))
    }
    one, numbers = found["single"].memory, sum(found["single"].trainable.values())
    assert one.optimizer == 12 * numbers, "two moments and a copy in float32"
    assert one.gradients == 2 * numbers
    assert one.update == 4 * numbers
    assert found["ddp"].memory == one
    for kind in ("zero2", "zero3"):
        assert found[kind].memory.optimizer == 16 * numbers / 4, "copies, moments, sums: a quarter each"
        assert found[kind].memory.gradients == one.gradients
    assert found["zero3"].memory.weights < one.weights
    for kind in ("fsdp2", "zero3"):
        assert found[kind].memory.weights <= one.weights, "of two layers, both are gathered at once"
        assert found[kind].memory.evaluation > one.weights
    assert found["zero2"].memory.weights == one.weights
    assert found["fsdp2"].memory.optimizer < one.optimizer


def test_time_by_flops(models, tmp_path):
    config = config_of(models, tmp_path)
    slow = estimate_run(config, flops_per_second=1e9, clip_seconds=2.0)[-1]
    fast = estimate_run(config, ranks=2, flops_per_second=1e10, clip_seconds=2.0)[-1]
    assert slow.tokens_per_second == pytest.approx(slow.batch.tokens * 1e9 / slow.batch.flops)
    assert fast.tokens_per_second == pytest.approx(20 * slow.tokens_per_second)
    assert fast.hours == pytest.approx(slow.hours / 20)
    stage = config.stages[-1]
    assert slow.hours == pytest.approx(stage.max_steps * stage.accumulation_steps * slow.batch.flops / 1e9 / 3600)


@pytest.mark.parametrize(
    ("name", "ranks", "gigabytes"),
    [("lora-24gb", 1, 24), ("encoder-full-8x80gb", 8, 80)],
)
def test_shipped_configurations_fit(capsys, name, ranks, gigabytes):
    command = ["estimate", str(GPU / f"{name}.yaml"), "--ranks", str(ranks), "--memory-gb", str(gigabytes)]
    assert main([*command, "--peak-tflops", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == 1
    assert found["fits"] is True
    assert [stage["name"] for stage in found["stages"]] == ["align", "tune"]
    for stage in found["stages"]:
        assert stage["parameters"]["language_model"] == LLAMA
        assert stage["parameters"]["audio_encoder"] == TURBO_ENCODER
        assert stage["tokens_per_second"] > 0
    assert (found["stages"][0]["trainable"]["audio_encoder"] > 0) == ("encoder" in name)


def test_shapes_of_models_that_are_not_fetched():
    config = load_config(GPU / "whisper-large-v3-turbo-qwen3-8b.yaml", [])
    with weightless(torch.bfloat16):
        model = build_skeleton(config.model)
    adapters = sum(p.numel() for p in model.language_model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.language_model.parameters()) - adapters == QWEN
    assert sum(p.numel() for p in model.audio_tower.parameters()) == TURBO_ENCODER


def test_each_configuration_has_its_estimate():
    told = (GPU.parents[1] / "docs" / "estimate.md").read_text()
    found = sorted(GPU.glob("*.yaml"))
    assert len(found) >= 4
    for path in found:
        assert f"`{path.name}`" in told
        assert load_config(path, []).model.dtype == "bfloat16"


def test_what_it_says(models, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config_of(models, tmp_path)))
    assert main(["estimate", str(path), "--clip-seconds", "2"]) == 0
    said = capsys.readouterr().out
    assert "memory on each of 1" in said
    assert "give --gpu or --peak-tflops" in said
    assert main(["estimate", str(path), "--clip-seconds", "2", "--memory-gb", "0.001"]) == 1
    assert "Does not fit: 0." in capsys.readouterr().out
    assert main(["estimate", str(path), "--clip-seconds", "2", "--gpu", "T4", "--model.dtype", "bfloat16"]) == 0
    assert "Fits: 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu", "H1000"], "--gpu H1000: expected H200, H100"),
        (["--gpu", "H100", "--model.dtype", "float32"], "rates are of 16-bit numbers"),
        (["--ranks", "2", "--engine.kind", "single"], "engine.kind single does not fit 2 processes"),
        (["--engine.kind", "fsdp2"], "engine.kind fsdp2 does not fit 1 processes"),
        (["--ranks", "0"], "expected a number above 0, got '0'"),
        (["--mfu", "1.5"], "expected a share up to 1"),
        (["--clip-seconds", "30"], "more than max_batch_tokens"),
        (["--clip-seconds", "31"], "longer audio is cut into windows of 30 s"),
        (["--model.projector", "ctc_compressed"], "which shapes alone do not tell: estimate ctc_weighted"),
        (["--model.language_model", "nobody/nothing"], "an estimate needs its config.json alone"),
    ],
)
def test_bad_input_is_one_line(models, tmp_path, capsys, more, message):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config_of(models, tmp_path)))
    assert main(["estimate", str(path), "--clip-seconds", "2", *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_nothing_of_it_stays(models, tmp_path):
    estimate_run(config_of(models, tmp_path), clip_seconds=2.0)
    assert torch.get_default_dtype() == torch.float32
    assert type(torch.zeros(1)) is torch.Tensor
