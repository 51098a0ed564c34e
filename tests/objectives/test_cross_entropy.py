import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ultravox.objectives.cross_entropy import best_tokens, cross_entropy, cross_entropy_with_best, next_token_positions
from ultravox.tokens import IGNORE_INDEX


def example(requires_grad_head=False):
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, 8, requires_grad=True)
    head = nn.Parameter(torch.randn(50, 8), requires_grad=requires_grad_head)
    labels = torch.full((3, 6), IGNORE_INDEX)
    labels[0, 2:5] = torch.tensor([4, 5, 6])
    labels[1, 5] = 49
    labels[2, 0] = 3  # nothing comes before it, so nothing can predict it
    labels[2, 1] = 7
    return hidden, head, labels


def reference(hidden, head, labels):
    logits = hidden @ head.T
    shifted = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    return F.cross_entropy(*shifted, reduction="sum", ignore_index=IGNORE_INDEX)


@pytest.mark.parametrize("trainable_head", [False, True])
def test_sum_count_and_gradient_equal_the_plain_formula(trainable_head):
    hidden, head, labels = example(trainable_head)
    total, count = cross_entropy(hidden, labels, head)
    (total * 3).backward()
    mine = hidden.grad.clone()
    hidden.grad = None
    head_gradient = head.grad
    head.grad = None
    expected = reference(hidden, head, labels)
    (expected * 3).backward()
    assert count == 5
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(mine, hidden.grad)
    if trainable_head:
        torch.testing.assert_close(head_gradient, head.grad)


def test_the_position_before_predicts():
    _, _, labels = example()
    positions, targets = next_token_positions(labels)
    assert positions.tolist() == [1, 2, 3, 10, 12]
    assert targets.tolist() == [4, 5, 6, 49, 7]


def test_uniform_logits_cost_log_vocabulary():
    labels = torch.tensor([[IGNORE_INDEX, 1, 2]])
    total, count = cross_entropy(torch.zeros(1, 3, 4), labels, torch.zeros(10, 4))
    assert float(total) / count == pytest.approx(math.log(10))


def test_large_logits_stay_finite():
    labels = torch.tensor([[IGNORE_INDEX, 1]])
    hidden = torch.full((1, 2, 4), 1e4, requires_grad=True)
    total, _ = cross_entropy(hidden, labels, torch.tensor([[1.0] * 4, [-1.0] * 4]))
    total.backward()
    assert total.item() == pytest.approx(8e4)
    assert torch.isfinite(hidden.grad).all()


def test_batches_add_up():
    hidden, head, labels = example()
    total, count = cross_entropy(hidden, labels, head)
    parts = [cross_entropy(hidden[i : i + 1], labels[i : i + 1], head) for i in range(3)]
    assert sum(c for _, c in parts) == count
    torch.testing.assert_close(sum(t for t, _ in parts), total)


def test_bfloat16():
    hidden, head, labels = example()
    total, _ = cross_entropy(hidden.bfloat16(), labels, head.bfloat16())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, reference(hidden, head, labels), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("size", [5, 128, 129, 300, 1024])
def test_best_tokens_are_those_of_argmax(size: int) -> None:
    logits = torch.randn(7, size, generator=torch.Generator().manual_seed(size))
    logits[0, -1] = 9.0
    logits[1, 0] = 9.0
    top, best = best_tokens(logits)
    assert torch.equal(best, logits.argmax(-1))
    assert torch.equal(top, logits.amax(-1))


@pytest.mark.parametrize("frozen", [True, False])
def test_best_tokens_come_with_the_loss(frozen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 40, 16, generator=generator, requires_grad=True)
    head = torch.randn(300, 16, generator=generator, requires_grad=not frozen)
    labels = torch.randint(300, (2, 40), generator=generator)
    labels[0, :9] = -100
    total, best = cross_entropy_with_best(hidden, labels, head)
    logits = (hidden @ head.t())[:, :-1]
    chosen = labels[:, 1:] != -100
    assert torch.equal(best, logits[chosen].argmax(-1))
    assert total.item() == pytest.approx(F.cross_entropy(logits[chosen], labels[:, 1:][chosen], reduction="sum").item())
    total.backward()
    assert hidden.grad is not None
