"""Distillation, label smoothing and z-loss against torch's own functions and plain arithmetic."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ultravox.objectives.cross_entropy import cross_entropy
from ultravox.objectives.token_losses import TokenWeights, divergence, token_losses, token_losses_of_hidden

VOCABULARY, HIDDEN = 50, 8


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, HIDDEN, generator=generator)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator))
    targets = torch.randint(VOCABULARY, (300,), generator=generator)
    return hidden, head, targets, torch.randn(300, HIDDEN, generator=generator)


def test_divergence_is_what_its_definition_says():
    """By hand in double precision, at T = 2, of two positions."""
    student, teacher = np.array([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]]), np.array([[2.0, 0.0, 0.0], [0.1, 0.2, 0.3]])
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(1, keepdims=True) for x in (student, teacher))
    expected = 4 * (q * (np.log(q) - np.log(p))).sum(1)
    found = divergence(torch.tensor(student), torch.tensor(teacher), 2.0)
    assert found.numpy() == pytest.approx(expected, abs=1e-12)
    assert divergence(torch.tensor(student), torch.tensor(student), 3.0).abs().max() < 1e-12


def test_its_gradient_keeps_its_scale_over_temperatures():
    """Hinton et al.: at a high temperature the gradient is that of half the squared distance of centred logits."""
    student = torch.tensor([[0.3, -0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.1, 0.2, 0.0]], dtype=torch.float64)
    divergence(student, teacher, 1000.0).sum().backward()
    centred = (student - student.mean()) - (teacher - teacher.mean())
    assert student.grad.numpy() == pytest.approx((centred / 3).detach().numpy(), rel=1e-3)


@pytest.mark.parametrize(
    "weights",
    [
        TokenWeights(label_smoothing=0.1),
        TokenWeights(z_loss=1e-2),
        TokenWeights(0.0, distillation=1.0, temperature=2.0),
        TokenWeights(0.5, 0.2, 1e-3, 0.7, 3.0),
    ],
)
def test_parts_and_gradients_are_torchs(given, weights):
    """In blocks and at once, against one plain expression of torch's losses in double precision."""
    hidden, head, targets, other = given
    emphasis = torch.ones(300)
    emphasis[::7] = 4.0
    found = []
    for frozen in (True, False):
        mine = hidden.clone().requires_grad_()
        losses = token_losses_of_hidden(
            mine, targets, weights, head, teacher_hidden=other, emphasis=emphasis, frozen_head=frozen
        )
        losses.total.backward()
        found.append((losses, mine.grad))
    exact = hidden.double().requires_grad_()
    logits, teacher = exact @ head.weight.double().T, other.double() @ head.weight.double().T
    t = weights.temperature
    kl = F.kl_div((logits / t).log_softmax(-1), (teacher / t).softmax(-1), reduction="none").sum(-1) * t * t
    smoothed = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=weights.label_smoothing)
    z = logits.logsumexp(-1).square().sum()
    distance = (kl * emphasis.double()).sum()
    total = weights.cross_entropy * smoothed + weights.z_loss * z + weights.distillation * distance
    total.backward()
    for losses, gradient in found:
        assert losses.total.item() == pytest.approx(total.item(), rel=1e-5)
        assert float(losses.cross_entropy) == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item())
        if weights.distillation:
            assert float(losses.distillation) == pytest.approx(distance.item(), rel=1e-5)
        assert torch.allclose(gradient.double(), exact.grad, atol=2e-5 * float(exact.grad.abs().max()))
        assert losses.best.tolist() == logits.argmax(-1).tolist()


def test_plain_weights_are_the_cross_entropy(given):
    hidden, head, targets, _ = given
    losses = token_losses(head(hidden), targets, TokenWeights())
    labels = torch.cat([torch.tensor([-100]), targets])[None]
    total, count = cross_entropy(torch.cat([hidden, hidden[:1]])[None], labels, head.weight)
    assert TokenWeights().plain
    assert count == 300
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert float(losses.total) == float(losses.cross_entropy)


def test_distillation_without_a_teacher_is_an_error(given):
    hidden, head, targets, _ = given
    with pytest.raises(AssertionError, match="teacher"):
        token_losses(head(hidden), targets, TokenWeights(distillation=1.0))
