import itertools

import pytest
import torch
from torch import nn

from ultravox.errors import CheckpointError
from ultravox.training.optim import Optimizer, ParameterGroup, lr_factor


def factors(schedule, final_share=0.1):
    return [
        lr_factor(step, warmup_steps=4, max_steps=20, schedule=schedule, final_share=final_share) for step in range(21)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule):
    values = factors(schedule)
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]), "never 0: the first step counts"
    assert values[4] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[4:]))
    assert values[20] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert values[12] == pytest.approx(1.0 if schedule == "constant" else 0.55), "half way"


def test_one_step_equals_torch():
    torch.manual_seed(0)
    layer, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(layer.state_dict())
    ours = Optimizer(
        [ParameterGroup("a", dict(layer.named_parameters()), 1e-2)], weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    decays = [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin.bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(decays, lr=5e-3, betas=(0.9, 0.99), eps=1e-8)
    x = torch.randn(8, 4)
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        layer(x).square().sum().backward()
        (twin(x).square().sum() / 7).backward()
        norm = ours.step(divisor=7, max_grad_norm=0.5, lr_factor=0.5)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)), rel=1e-5)
        theirs.step()
        torch.testing.assert_close(layer.weight, twin.weight)
        torch.testing.assert_close(layer.bias, twin.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_parts_gradient_and_update_are_measured_and_change_nothing(dtype):
    torch.manual_seed(0)
    layers = {name: nn.Linear(5, 4).to(dtype) for name in ("a", "b")}
    twins = {name: nn.Linear(5, 4).to(dtype) for name in ("a", "b")}
    for name, layer in layers.items():
        twins[name].load_state_dict(layer.state_dict())

    def optimizer(many):
        groups = [
            ParameterGroup(name, {f"{name}.{k}": p for k, p in layer.named_parameters()}, 1e-2)
            for name, layer in many.items()
        ]
        return Optimizer(groups, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)

    measured, plain = optimizer(layers), optimizer(twins)
    for many, one, measure in ((layers, measured, True), (twins, plain, False)):
        x = torch.ones(3, 5, dtype=dtype)
        (many["a"](x).square().sum() + 10 * many["b"](x).sum()).backward()
        gradients = {
            name: torch.cat([p.grad.float().flatten() for p in layer.parameters()]) / 7 for name, layer in many.items()
        }
        before = torch.cat([m.detach().flatten() for m in one._masters.values()])
        norm = one.step(divisor=7, max_grad_norm=0.5, lr_factor=0.5, measure=measure)
        assert norm > 0.5, "clipping is not tested"
        if measure:
            for name in many:
                assert one.measured[f"grad_norm_{name}"] == pytest.approx(float(gradients[name].norm()), rel=1e-5)
            after = torch.cat([m.detach().flatten() for m in one._masters.values()])
            half = len(after) // 2
            for name, part in (("a", slice(half)), ("b", slice(half, None))):
                ratio = (after[part] - before[part]).norm() / before[part].norm()
                assert one.measured[f"update_ratio_{name}"] == pytest.approx(float(ratio), rel=1e-4)
            assert len(one.measured) == 4
        else:
            assert one.measured == {}
    for name, layer in layers.items():
        assert torch.equal(layer.weight, twins[name].weight)


def test_a_part_without_gradients_measures_as_still():
    layer, still = nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))
    groups = [ParameterGroup("a", {"w": layer.weight}, 1e-2), ParameterGroup("b", {"v": still}, 1e-2)]
    optimizer = Optimizer(groups, weight_decay=0, betas=(0.9, 0.99), eps=1e-8)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step(divisor=1, max_grad_norm=1, lr_factor=1, measure=True)
    assert optimizer.measured["grad_norm_b"] == optimizer.measured["update_ratio_b"] == 0
    assert optimizer.measured["update_ratio_a"] > 0


def test_state_of_other_parameters_is_refused():
    layer = nn.Linear(4, 3)
    optimizer = Optimizer([ParameterGroup("a", {"w": layer.weight}, 1e-2)], weight_decay=0, betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(CheckpointError, match="'v'"):
        optimizer.load_state_dict({"v.step": torch.tensor(1.0)})
    state = {"w.step": torch.tensor(1.0), "w.exp_avg": torch.zeros(2, 2), "w.exp_avg_sq": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="shape"):
        optimizer.load_state_dict(state)


def test_bfloat16_parameters_keep_small_updates_and_resume_exactly():
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))

    def optimizer(parameter):
        return Optimizer([ParameterGroup("a", {"w": parameter}, 1e-4)], weight_decay=0, betas=(0.9, 0.99), eps=1e-8)

    def steps(optimizer, parameter, count):
        for _ in range(count):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step(divisor=1, max_grad_norm=10, lr_factor=1)

    first = optimizer(weight)
    steps(first, weight, 100)
    assert weight.float().mean().item() == pytest.approx(0.99, abs=0.004), "0.9999 would round to 1 in bfloat16"
    twin = nn.Parameter(weight.detach().clone())
    second = optimizer(twin)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    steps(first, weight, 5)
    steps(second, twin, 5)
    assert torch.equal(first.state_dict()["w.master"], second.state_dict()["w.master"])


def test_gradients_of_16_bits_do_not_stay_for_the_next_step():
    """AdamW holds float32 copies of such parameters: their own gradients must go too, or all steps' would add up."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer([ParameterGroup("p", {"w": parameter}, 0.1)], weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        parameter.sum().backward()
        norms.append(optimizer.step(divisor=1.0, max_grad_norm=1e9, lr_factor=1.0))
    assert norms == pytest.approx([2.0, 2.0, 2.0])
