"""Cross-entropy on the supervised positions only, as a sum and a count."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ultravox.model.kernels import fill_rows, matmul_transposed, uses_onednn
from ultravox.tokens import IGNORE_INDEX

#: Rows whose logits are made at once. A block small enough to fit into memory that the step has freed costs no fresh
#: pages, which take as long as the product itself.
_HEAD_ROWS = 128


class _FrozenHead(torch.autograd.Function):
    """Sum of cross-entropies through a frozen output layer; the logits' gradient is made in place, in the forward pass.

    Logits are as wide as the vocabulary: keeping only the gradient towards the hidden states saves three passes over
    them and their memory.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        blocks = zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True)
        losses, parts = zip(*(_block_loss(*block, head) for block in blocks), strict=True)
        ctx.save_for_backward(torch.cat(parts))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def _block_loss(hidden: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of a few rows [row, hidden], and its gradient."""
    filled = matmul_transposed(fill_rows(hidden), head)
    logits = filled[: len(hidden)]
    rows = torch.arange(len(targets))
    top = logits.amax(-1, keepdim=True)
    picked = logits[rows, targets]
    logits.sub_(top).exp_()
    total = logits.sum(-1, keepdim=True)
    logits.div_(total)
    logits[rows, targets] -= 1
    gradient = matmul_transposed(filled, head.t())[: len(hidden)]
    return (total.log() + top).sum() - picked.sum(), gradient


def next_token_positions(labels: Int[Tensor, "row token"]) -> tuple[Tensor, Tensor]:
    """Flat indices of the positions whose NEXT token is supervised, and those tokens, both [position].

    Labels stand at the place of the token that they are; what the model says at t is its guess for t + 1.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    positions = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, following[positions]


def cross_entropy(
    hidden: Float[Tensor, "row token hidden"],
    labels: Int[Tensor, "row token"],
    head: Float[Tensor, "vocabulary hidden"],
    bias: Float[Tensor, " vocabulary"] | None = None,
) -> tuple[Tensor, int]:
    """Next-token cross-entropy through the output layer `head`, computed only where labels are set.

    Returns: the sum in nats (a scalar with a gradient) and the number of supervised positions.
    """
    positions, targets = next_token_positions(labels)
    chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
    if bias is None and not head.requires_grad and uses_onednn(chosen) and head.dtype == torch.float32:
        return _FrozenHead.apply(chosen, head, targets), len(positions)
    logits = F.linear(chosen, head, bias)
    return F.cross_entropy(logits.float(), targets, reduction="sum"), len(positions)
