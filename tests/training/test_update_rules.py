import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from tiny_run import tiny_config
from torch import nn

from ultravox.errors import CheckpointError, ConfigError
from ultravox.training import update_rules
from ultravox.training.checkpoint import load_checkpoint
from ultravox.training.optim import Optimizer, ParameterGroup
from ultravox.training.run import run_training

sys.path.append(str(Path(sys.prefix) / "side"))  # torchao lies there: see the Makefile

RULES = ("adamw_8bit", "adamw_schedule_free")


def optimizer_of(layer, rule, lr=1e-2):
    group = ParameterGroup("a", dict(layer.named_parameters()), lr)
    return Optimizer([group], weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, rule=rule)


def train(layer, optimizer, steps, start=0, lr_factor=1.0):
    """Towards zero, on inputs that are a function of the step."""
    for step in range(start, start + steps):
        x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layer(x.to(layer.weight.dtype)).float().square().sum().backward()
        optimizer.step(divisor=8.0, max_grad_norm=1e9, lr_factor=lr_factor)


def layers(count=2, width=64, dtype=torch.float32):
    torch.manual_seed(0)
    first = nn.Linear(width, 2 * width)
    found = [first, *(nn.Linear(width, 2 * width) for _ in range(count - 1))]
    for other in found[1:]:
        other.load_state_dict(first.state_dict())
    return [layer.to(dtype) for layer in found]


def test_schedule_free_is_the_packages_own():
    layer, twin = layers()
    ours = optimizer_of(layer, "adamw_schedule_free")
    theirs = AdamWScheduleFree(
        [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin.bias], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.99),
    )
    theirs.train()
    for step in range(12):
        train(layer, ours, 1, start=step)
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        theirs.zero_grad()
        (twin(x).square().sum() / 8).backward()
        theirs.step()
    torch.testing.assert_close(layer.weight, twin.weight)
    trained = layer.weight.detach().clone()
    theirs.eval()
    with ours.averaged():
        torch.testing.assert_close(layer.weight, twin.weight)
        assert not torch.equal(layer.weight, trained)
    assert torch.equal(layer.weight, trained), "what trains is put back bit for bit"


def test_eight_bits_follow_adamw_and_take_a_quarter():
    layer, twin = layers()
    small, plain = optimizer_of(layer, "adamw_8bit"), optimizer_of(twin, "adamw")
    start = layer.weight.detach().clone()
    train(layer, small, 10)
    train(twin, plain, 10)
    moved = (twin.weight - start).norm()
    assert (layer.weight - twin.weight).norm() < 0.05 * moved
    of_weight = {name: value for name, value in small.state_dict().items() if name.startswith("weight.exp_avg")}
    assert {value.dtype for name, value in of_weight.items() if name.endswith(".codes")} == {torch.uint8}
    size = sum(value.numel() * value.element_size() for value in of_weight.values())
    assert size < 0.27 * 2 * 4 * layer.weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_state_goes_on_bit_for_bit(rule, dtype):
    whole, first, second = layers(3, dtype=dtype)
    train(whole, optimizer_of(whole, rule), 8)
    before = optimizer_of(first, rule)
    train(first, before, 5)
    with before.averaged():  # as a checkpoint is saved
        second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
        state = {name: value.clone() for name, value in before.state_dict().items()}
    assert all(type(value) is torch.Tensor for value in state.values())
    after = optimizer_of(second, rule)
    after.load_state_dict(state)
    assert torch.equal(first.weight, second.weight)
    train(second, after, 3, start=5)
    assert torch.equal(whole.weight, second.weight)
    assert torch.equal(whole.bias, second.bias)


@pytest.mark.parametrize(("saved", "loaded"), [("adamw", "adamw_8bit"), ("adamw", "adamw_schedule_free")])
def test_another_rules_state_is_refused(saved, loaded):
    layer, twin = layers()
    before = optimizer_of(layer, saved)
    train(layer, before, 1)
    with pytest.raises((CheckpointError, KeyError)) as caught:
        optimizer_of(twin, loaded).load_state_dict(before.state_dict())
    assert isinstance(caught.value, CheckpointError)


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(update_rules.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"adamw_8bit is torchao's.*pip install 'ultravox\[torchao\]', or choose"):
        optimizer_of(layers()[0], "adamw_8bit")


def stages_with(parts, run_dir, optimizer):
    stages = tiny_config(*parts, run_dir).model_dump(mode="json")["stages"]
    for stage, steps in zip(stages, (12, 8), strict=True):
        stage |= {"max_steps": steps, "checkpoint_every": 5, "evaluate_every": 4}
        stage["optim"] |= {"optimizer": optimizer, "schedule": "constant", "warmup_steps": 3}
    return stages


def losses_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_schedule_free_run_goes_on_and_saves_the_average(parts, tmp_path):
    stages = stages_with(parts, tmp_path, "adamw_schedule_free")
    keep = {"checkpoints": {"keep_last": 9}}
    run_training(tiny_config(*parts, tmp_path / "whole", stages=stages, **keep))
    checkpoint = load_checkpoint(tmp_path / "whole" / "checkpoints" / "tune-000008")
    model = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(model[name], checkpoint.trainable[name])
    assert not torch.equal(model[name], checkpoint.optimizer[f"{name}.master"])

    quieter = [{**stage, "evaluate_every": 0} for stage in stages]  # a look at progress changes nothing
    run_training(tiny_config(*parts, tmp_path / "resumed", stages=quieter, **keep))
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "whole")
    for gone in ("tune-000008",):
        for path in (tmp_path / "resumed" / "checkpoints" / gone).iterdir():
            path.unlink()
        (tmp_path / "resumed" / "checkpoints" / gone).rmdir()
    run_training(tiny_config(*parts, tmp_path / "resumed", stages=quieter, **keep), resume=True)
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "whole")
    resumed = load_file(tmp_path / "resumed" / "model" / "model.safetensors")
    assert torch.equal(resumed[name], model[name])


def test_a_run_with_moments_in_8_bits(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: function
    )  # its step is compiled for each shape: half a minute
    losses = {}
    for optimizer in ("adamw", "adamw_8bit"):
        stages = stages_with(parts, tmp_path, optimizer)[:1]
        run_training(tiny_config(*parts, tmp_path / optimizer, stages=stages))
        losses[optimizer] = losses_of(tmp_path / optimizer)
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.05)
    assert losses["adamw_8bit"] != losses["adamw"]
