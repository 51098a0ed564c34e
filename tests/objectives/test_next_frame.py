"""What is hidden, what is predicted from where, and the two losses against plain arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F

from ultravox.objectives.next_frame import NextFrame, mask_positions, predicted_pairs, standardise


def test_stretches_are_hidden_but_never_the_first_position():
    counts = torch.tensor([40, 7, 1, 2])
    masks = [mask_positions(counts, 0.3, 5, torch.Generator().manual_seed(seed)) for seed in range(50)]
    for mask in masks:
        first, second, third, fourth = mask.split(counts.tolist())
        assert not torch.stack([first[0], second[0], third[0], fourth[0]]).any()
        assert 5 <= int(first.sum()) <= 12
        assert int(second.sum()) == 5
        assert int(fourth.sum()) == 1
    assert torch.stack(masks)[:, 1:40].any(0).all(), "anything may be hidden"


def test_only_what_is_hidden_is_predicted_and_within_a_window():
    counts = torch.tensor([4, 3])
    hidden = torch.tensor([0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)
    said, meant = predicted_pairs(counts, hidden, 1)
    assert list(zip(said.tolist(), meant.tolist(), strict=True)) == [(1, 2), (2, 3), (4, 5)]
    said, meant = predicted_pairs(counts, hidden, 2)
    assert list(zip(said.tolist(), meant.tolist(), strict=True)) == [(0, 2), (1, 3)]
    said, meant = predicted_pairs(torch.tensor([2, 2]), torch.tensor([False, False, True, True]), 2)
    assert len(said) == len(meant) == 0


def test_targets_have_no_gradient():
    target = (torch.randn(5, 8) * 3 + 2).requires_grad_()
    found = standardise(target)
    assert not found.requires_grad
    assert found.mean(1).abs().max() < 1e-5
    assert found.var(1, unbiased=False).numpy() == pytest.approx(1, abs=1e-3)


@pytest.fixture
def given():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randn(30, 8), torch.arange(6), torch.arange(6) + 1


def test_regression_is_l1_plus_l2(given):
    states, targets, said, meant = given
    module = NextFrame(4, 8, num_negatives=None, temperature=1.0)
    total, copied, count = module.loss(states, targets, said, meant, torch.Generator())
    predicted = module.linear(states)
    expected = (
        F.l1_loss(predicted, targets[1:7], reduction="sum") / 8
        + F.mse_loss(predicted, targets[1:7], reduction="sum") / 8
    )
    assert count == 6
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert copied.item() == pytest.approx(
        ((targets[:6] - targets[1:7]).abs().mean(1) + (targets[:6] - targets[1:7]).square().mean(1)).sum().item()
    )
    assert module.chance is None


def test_contrast_is_cross_entropy_of_the_right_one(given):
    states, targets, said, meant = given
    module = NextFrame(4, 8, num_negatives=10, temperature=0.5)
    total, _, count = module.loss(states, targets, said, meant, torch.Generator().manual_seed(4))
    drawn = torch.randint(29, (6, 10), generator=torch.Generator().manual_seed(4))
    expected = 0.0
    for pair in range(6):
        others = [int(index) + (int(index) >= int(meant[pair])) for index in drawn[pair]]
        assert int(meant[pair]) not in others
        guess = module.linear(states[pair])
        scores = [F.cosine_similarity(guess, targets[i], dim=0) / 0.5 for i in (int(meant[pair]), *others)]
        expected -= torch.log_softmax(torch.stack(scores), 0)[0].item()
    assert count == 6
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert module.chance == pytest.approx(math.log(11))


def test_knowing_nothing_costs_chance():
    """Frames at random, told from as many others: ln(K + 1), the more exactly the higher the temperature."""
    torch.manual_seed(1)
    module = NextFrame(4, 8, num_negatives=20, temperature=1000.0)
    states, targets = torch.randn(200, 4), torch.randn(400, 8)
    total, _, count = module.loss(states, targets, torch.arange(200), torch.arange(200) + 1, torch.Generator())
    assert total.item() / count == pytest.approx(module.chance, abs=1e-3)
