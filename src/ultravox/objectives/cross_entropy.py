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
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        blocks = zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True)
        losses, parts, best = zip(*(_block_loss(*block, head) for block in blocks), strict=True)
        ctx.save_for_backward(torch.cat(parts))
        best_tokens = torch.cat(best)
        ctx.mark_non_differentiable(best_tokens)
        return torch.stack(losses).sum(), best_tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def _block_loss(hidden: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies of a few rows [row, hidden], its gradient, and the best token of each row."""
    filled = matmul_transposed(fill_rows(hidden), head)
    logits = filled[: len(hidden)]
    rows = torch.arange(len(targets))
    top, best = best_tokens(logits)
    picked = logits[rows, targets]
    logits.sub_(top[:, None]).exp_()
    total = logits.sum(-1, keepdim=True)
    logits.div_(total)
    logits[rows, targets] -= 1
    gradient = matmul_transposed(filled, head.t())[: len(hidden)]
    return (total.squeeze(1).log() + top).sum() - picked.sum(), gradient, best


#: Logits that are looked at together: `amax` reads them with vector instructions, `max` and `argmax` do not.
_CHUNK = 128


def best_tokens(logits: Float[Tensor, "row vocabulary"]) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and its token, both [row], at the price of `amax` alone (a quarter of `max`'s)."""
    whole = logits.shape[1] // _CHUNK * _CHUNK
    tops = [logits[:, :whole].unflatten(1, (-1, _CHUNK)).amax(-1)] if whole else []
    if whole < logits.shape[1]:
        tops.append(logits[:, whole:].amax(-1, keepdim=True))
    top, chunk = torch.cat(tops, dim=1).max(-1)
    places = (chunk[:, None] * _CHUNK + torch.arange(_CHUNK, device=logits.device)).clamp(max=logits.shape[1] - 1)
    return top, places.gather(1, logits.gather(1, places).argmax(-1, keepdim=True)).squeeze(1)


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
    total, best = cross_entropy_with_best(hidden, labels, head, bias)
    return total, len(best)


def cross_entropy_with_best(
    hidden: Float[Tensor, "row token hidden"],
    labels: Int[Tensor, "row token"],
    head: Float[Tensor, "vocabulary hidden"],
    bias: Float[Tensor, " vocabulary"] | None = None,
) -> tuple[Tensor, Int[Tensor, " position"]]:
    """`cross_entropy`, and the best token for each supervised position in the order of `next_token_positions`."""
    positions, targets = next_token_positions(labels)
    chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
    if bias is None and not head.requires_grad and uses_onednn(chosen) and head.dtype == torch.float32:
        return _FrozenHead.apply(chosen, head, targets)
    logits = F.linear(chosen, head, bias)
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total, best_tokens(logits.detach())[1]
