"""Learning where the speaker has finished, at the audio's own positions: by the language model, or by a head."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def end_labels(
    counts: Int[Tensor, " row"], whole: Bool[Tensor, " row"], last_positions: int
) -> Bool[Tensor, " position"]:
    """True on the last `last_positions` audio positions of each whole clip, rows one after the other.

    What is said AT a position is about the audio up to it: the labels are those of the next token, shifted by one.
    """
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    left = torch.repeat_interleave(counts.cumsum(0), counts) - torch.arange(int(counts.sum()))  # 1 = the last one
    return (left <= last_positions) & whole[rows]


def counted_positions(
    counts: Int[Tensor, " row"],
    last_positions: int,
    middle_positions: int | None,
    generator: torch.Generator,
) -> Bool[Tensor, " position"]:
    """Which audio positions are learnt from: the last ones of each clip, and all or some random ones before them."""
    ends = end_labels(counts, torch.ones(len(counts), dtype=torch.bool), last_positions)
    if middle_positions is None:
        return torch.ones_like(ends)
    draws = torch.rand(len(ends), generator=generator)
    chosen = ends.clone()
    start = 0
    for count in counts.tolist():
        middle = draws[start : start + max(0, count - last_positions)]
        chosen[start + middle.argsort()[:middle_positions]] = True
        start += count
    return chosen


class StopHead(nn.Module):
    """A linear classifier of the decoder's states, whose rare positives weigh as much as the negatives."""

    positive_weight: Tensor

    def __init__(self, hidden_size: int, positive_weight: float) -> None:
        """Args:
        hidden_size: of the states.
        positive_weight: negatives for each positive, in the data.
        """
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("positive_weight", torch.tensor(float(positive_weight)))

    def forward(self, states: Float[Tensor, "position hidden"]) -> Float[Tensor, " position"]:
        """Logit that the speaker has finished."""
        return self.linear(states.float()).squeeze(-1)

    def loss(self, logits: Float[Tensor, " position"], labels: Bool[Tensor, " position"]) -> tuple[Tensor, int]:
        """Sum of the binary cross-entropies of `forward`'s logits, positives weighted, and the number of positions."""
        total = F.binary_cross_entropy_with_logits(
            logits, labels.float(), pos_weight=self.positive_weight, reduction="sum"
        )
        return total, len(labels)
