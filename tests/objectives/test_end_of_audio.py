"""Labels of the end of audio by hand, and the stop head against torch's own loss."""

import pytest
import torch
import torch.nn.functional as F

from ultravox.objectives.end_of_audio import StopHead, counted_positions, end_labels


def test_the_last_positions_of_whole_clips_are_the_end():
    labels = end_labels(torch.tensor([3, 0, 2, 4]), torch.tensor([True, True, False, True]), 2)
    assert labels.int().tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1]
    assert end_labels(torch.tensor([2]), torch.tensor([True]), 5).tolist() == [True, True]


def test_random_positions_before_the_end():
    counts = torch.tensor([10, 3, 1])
    assert counted_positions(counts, 1, None, torch.Generator()).all()
    draws = [counted_positions(counts, 1, 4, torch.Generator().manual_seed(seed)) for seed in range(40)]
    for drawn in draws:
        first, second, third = drawn.split([10, 3, 1])
        assert first[-1]
        assert int(first.sum()) == 5
        assert second.tolist() == [True] * 3
        assert third.tolist() == [True]
    assert torch.stack(draws)[:, :9].float().mean(0).min() > 0.1, "each comes now and then"


def test_the_head_is_torchs_weighted_loss():
    torch.manual_seed(0)
    head = StopHead(6, positive_weight=7.0)
    torch.nn.init.normal_(head.linear.weight)
    states, labels = torch.randn(20, 6), torch.arange(20) % 5 == 0
    total, count = head.loss(head(states), labels)
    p = (states @ head.linear.weight[0] + head.linear.bias).sigmoid()
    expected = -(7 * labels * p.log() + ~labels * (1 - p).log()).sum()
    assert count == 20
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    whole = F.binary_cross_entropy(p, labels.float(), weight=torch.where(labels, 7.0, 1.0), reduction="sum")
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_new_head_knows_nothing():
    assert torch.equal(StopHead(6, 3.0)(torch.randn(4, 6)), torch.zeros(4))
