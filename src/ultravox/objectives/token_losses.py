"""What may be learnt at the supervised positions beside plain cross-entropy, each as a sum over positions.

Knowledge distillation: Hinton et al. 2015, arXiv 1503.02531 (temperature, T²); label smoothing: Szegedy et al. 2016,
arXiv 1512.00567; z-loss: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, section 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ultravox.objectives.cross_entropy import best_tokens

#: Positions whose logits are made at once where the output layer is frozen; all at once, they would take gigabytes.
BLOCK = 128

Logits = Callable[[Tensor], Tensor]
"""Decoder states [position, hidden] → logits [position, vocabulary]."""


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """What each part counts in the sum."""

    cross_entropy: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether this is cross-entropy and nothing else."""
        return (self.cross_entropy, self.label_smoothing, self.z_loss, self.distillation) == (1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Sums over positions; only `total` has a gradient."""

    total: Tensor
    cross_entropy: Tensor
    """Without smoothing."""
    distillation: Tensor
    best: Tensor
    """The best token for each position, [position]."""


def divergence(
    logits: Float[Tensor, "position vocabulary"], teacher: Float[Tensor, "position vocabulary"], temperature: float
) -> Float[Tensor, " position"]:
    """T² · KL(teacher at temperature T ‖ student at temperature T) of each position, in nats."""
    student = F.log_softmax(logits / temperature, dim=-1)
    other = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, other, reduction="none", log_target=True).sum(-1)


def token_losses(
    logits: Float[Tensor, "position vocabulary"],
    targets: Int[Tensor, " position"],
    weights: TokenWeights,
    teacher: Float[Tensor, "position vocabulary"] | None = None,
    emphasis: Float[Tensor, " position"] | None = None,
) -> TokenLosses:
    """All parts, from the logits of the positions whose next token is supervised.

    Args:
        logits: what the student says.
        targets: the tokens.
        weights: of the parts.
        teacher: what the teacher says of the same tokens, without a gradient; needed for distillation.
        emphasis: weight of each position's divergence; None = 1.
    """
    logits = logits.float()
    entropy = F.cross_entropy(logits, targets, reduction="sum")
    total = logits.new_zeros(())
    if weights.cross_entropy:
        smoothing = weights.label_smoothing
        smoothed = (
            F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) if smoothing else entropy
        )
        total = total + weights.cross_entropy * smoothed
    if weights.z_loss:
        total = total + weights.z_loss * logits.logsumexp(-1).square().sum()
    distance = logits.new_zeros(())
    if weights.distillation:
        assert teacher is not None, "distillation needs a teacher"
        of_positions = divergence(logits, teacher.float(), weights.temperature)
        distance = (of_positions if emphasis is None else of_positions * emphasis).sum()
        total = total + weights.distillation * distance
    return TokenLosses(total, entropy.detach(), distance.detach(), best_tokens(logits.detach())[1])


def token_losses_of_hidden(
    hidden: Float[Tensor, "position hidden"],
    targets: Int[Tensor, " position"],
    weights: TokenWeights,
    logits_of: Logits,
    *,
    teacher_hidden: Float[Tensor, "position hidden"] | None = None,
    teacher_logits_of: Logits | None = None,
    emphasis: Float[Tensor, " position"] | None = None,
    frozen_head: bool,
) -> TokenLosses:
    """`token_losses` from the decoder's states. With a frozen output layer, few logits exist at a time.

    Args:
        frozen_head: nothing in `logits_of` trains: each block's gradient towards the states is made at once, and its
            logits are forgotten.
    """

    def of(chosen: slice, states: Tensor) -> TokenLosses:
        teacher = None
        if teacher_hidden is not None:
            with torch.no_grad():
                teacher = (teacher_logits_of or logits_of)(teacher_hidden[chosen])
        of_chosen = None if emphasis is None else emphasis[chosen]
        return token_losses(logits_of(states), targets[chosen], weights, teacher, of_chosen)

    if not frozen_head or not len(hidden):
        return of(slice(None), hidden)
    blocks: list[TokenLosses] = []
    total = _ByBlocks.apply(hidden, of, blocks)
    entropy = torch.stack([block.cross_entropy for block in blocks]).sum()
    distance = torch.stack([block.distillation for block in blocks]).sum()
    return TokenLosses(total, entropy, distance, torch.cat([block.best for block in blocks]))


OfBlock = Callable[[slice, Tensor], TokenLosses]
"""Which positions, and their states → their losses."""


class _ByBlocks(torch.autograd.Function):
    """A sum over positions, whose gradient towards them is made in the forward pass, block by block."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, of: Callable[[slice, Tensor], TokenLosses], found: list[TokenLosses]
    ) -> Tensor:
        gradients, total = [], hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), BLOCK):
            chosen = slice(start, start + BLOCK)
            states = hidden[chosen].detach().requires_grad_()
            with torch.enable_grad():
                losses = of(chosen, states)
            gradients.append(torch.autograd.grad(losses.total, states)[0])
            found.append(losses)
            total = total + losses.total.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None
