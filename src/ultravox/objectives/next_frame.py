"""Predicting the audio to come from the language model's state at an audio position.

Two forms: regression of the frame (autoregressive predictive coding, Chung et al. 2019, arXiv 1904.03240: L1 here with
L2 beside it) and telling it from other frames (contrastive predictive coding, van den Oord et al. 2018, arXiv
1807.03748). The target has no gradient and is no output of anything that trains, or all could become one point.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def mask_positions(
    counts: Int[Tensor, " window"], share: float, width: int, generator: torch.Generator
) -> Bool[Tensor, " position"]:
    """Positions that are hidden: stretches of `width`, about `share` of each window, windows one after the other.

    The first position of a window is never hidden: something must be heard.
    """
    hidden = []
    for count in counts.tolist():
        mask = torch.zeros(count, dtype=torch.bool)
        stretch = min(width, max(0, count - 1))
        for _ in range(max(1, round(share * count / stretch)) if stretch else 0):
            start = 1 + int(torch.randint(count - stretch, (), generator=generator))
            mask[start : start + stretch] = True
        hidden.append(mask)
    return torch.cat(hidden)


def predicted_pairs(
    counts: Int[Tensor, " window"], hidden: Bool[Tensor, " position"], steps: int
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Where something is said, and what it is said of: `steps` positions later in the same window, and hidden."""
    windows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    said = torch.arange(max(0, len(windows) - steps))
    together = (windows[said] == windows[said + steps]) & hidden[said + steps]
    return said[together], said[together] + steps


def standardise(target: Float[Tensor, "position channel"]) -> Float[Tensor, "position channel"]:
    """Each frame with mean 0 and variance 1, without a gradient."""
    return F.layer_norm(target.detach().float(), target.shape[-1:])


class NextFrame(nn.Module):
    """A linear layer from the decoder's states to frames, and the loss of what it says."""

    def __init__(self, hidden_size: int, target_size: int, *, num_negatives: int | None, temperature: float) -> None:
        """Args:
        hidden_size: of the states.
        target_size: channels of a frame.
        num_negatives: contrastive, beside so many others; None = regression.
        temperature: divides cosine similarities.
        """
        super().__init__()
        self.linear = nn.Linear(hidden_size, target_size)
        self.num_negatives, self.temperature = num_negatives, temperature

    def loss(
        self,
        states: Float[Tensor, "pair hidden"],
        targets: Float[Tensor, "position channel"],
        said: Int[Tensor, " pair"],
        meant: Int[Tensor, " pair"],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, int]:
        """Sums over pairs: the loss, and that of saying again what is heard (`targets[said]`); and their number.

        Args:
            states: where something is said.
            targets: every position's frame.
            said, meant: indices in `targets`: where it is said, and of what.
            generator: draws the negatives.
        """
        predicted = self.linear(states.float())
        if self.num_negatives is None:
            of = targets[meant]
            return self._distance(predicted, of), self._distance(targets[said], of), len(said)
        drawn = torch.randint(len(targets) - 1, (len(said), self.num_negatives), generator=generator).to(meant.device)
        others = drawn + (drawn >= meant[:, None])  # any position but the right one
        found, copied = (self._contrast(guess, targets, meant, others) for guess in (predicted, targets[said]))
        return found, copied, len(said)

    @staticmethod
    def _distance(predicted: Tensor, meant: Tensor) -> Tensor:
        """L1 + L2, means over channels."""
        difference = predicted - meant
        return (difference.abs().mean(-1) + difference.square().mean(-1)).sum()

    def _contrast(self, predicted: Tensor, targets: Tensor, meant: Tensor, others: Tensor) -> Tensor:
        """Cross-entropy of the right frame among all that are offered; by chance ln(1 + negatives)."""
        candidates = torch.cat([meant[:, None], others], dim=1)
        normed = F.normalize(targets, dim=-1)
        similarity = torch.einsum("pc,pkc->pk", F.normalize(predicted, dim=-1), normed[candidates]) / self.temperature
        return F.cross_entropy(similarity, similarity.new_zeros(len(similarity), dtype=torch.long), reduction="sum")

    @property
    def chance(self) -> float | None:
        """The contrastive loss of one who knows nothing."""
        return None if self.num_negatives is None else math.log(1 + self.num_negatives)
