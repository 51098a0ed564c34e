"""Projectors that speak in the language model's own embeddings: means of its rows, weighted by a CTC posterior."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from ultravox.model.kernels import fill_rows, linear
from ultravox.model.projector import Projector, SwigluProjector

BLANK = 0
#: Spread of the scores of an embedding row against the others at first, in nats.
INITIAL_SPREAD = 4.0


def initial_log_scale(hidden_size: int, variance: float, spread: float = INITIAL_SPREAD) -> Tensor:
    """Log of what a product with a row is multiplied by: a row's product with itself is about hidden × variance."""
    return torch.tensor(spread / (hidden_size**0.5 * variance)).log()


def ctc_scores(
    embeddings: Float[Tensor, "*place hidden"], table: Float[Tensor, "row hidden"], log_scale: Tensor
) -> Float[Tensor, "*place row"]:
    """Unnormalised scores of embeddings against the rows of a table, of which the first one is the blank's."""
    rows = embeddings.reshape(-1, embeddings.shape[-1])
    scores = linear(fill_rows(rows * log_scale.exp()), table)[: len(rows)]
    return scores.view(*embeddings.shape[:-1], scores.shape[-1])


class CtcProjector(Projector):
    """Another projector's output, scored against the language model's rows and a blank, and made of them.

    With the softmax p of the scores, a position becomes Σ p(row) · row: it cannot leave the span of what the language
    model has read before (LegoSLM, Ma et al. 2025, weights its whole table so). The stage `align` trains these scores
    by CTC. With `compresses`, neighbours of the same likeliest row become one position, their mean, and those whose
    likeliest row is the blank are dropped (CTC compression, Gaido et al. 2021).

    Args:
        base: makes what is scored.
        hidden_size: the language model's.
        num_rows: of the table that are scored; until `choose_rows`, the first ones.
        compresses: one position for each run of the same row, none for blanks.
    """

    token_ids: Tensor

    def __init__(self, base: SwigluProjector, hidden_size: int, num_rows: int, *, compresses: bool):
        super().__init__()
        self.base, self.stack_factor, self.compresses = base, base.stack_factor, compresses
        self.blank = nn.Parameter(torch.zeros(hidden_size))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("token_ids", torch.arange(num_rows))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See `Projector`; the blank scores 0 until `choose_rows` gives it its place."""
        self.base.reset_parameters()
        init.zeros_(self.blank)
        init.zeros_(self.log_scale)

    @torch.no_grad()
    def init_scale(self, rms: float) -> None:
        """See `Projector`: of what is scored. A mean of rows is quieter while it is of many."""
        self.base.init_scale(rms)
        self.log_scale.copy_(initial_log_scale(len(self.blank), rms**2))

    @torch.no_grad()
    def choose_rows(self, token_ids: Int[Tensor, " row"], rows: Float[Tensor, "row hidden"]) -> None:
        """Score these rows of the table, whose ids are given in rising order, and no others. For a fresh projector."""
        self.token_ids = token_ids.to(self.blank.device)
        self.blank.copy_(rows.mean(0))
        self.log_scale.copy_(initial_log_scale(len(self.blank), float(rows.float().var())))

    def forward(
        self,
        frames: Float[Tensor, "clip frame channel"],
        frame_lengths: Int[Tensor, " clip"],
        rows: Float[Tensor, "row hidden"] | None = None,
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """Project. `rows` are those of `token_ids`, as the language model reads them."""
        assert rows is not None, "a CTC projector is made of the language model's rows"
        embeddings, lengths = self.base(frames, frame_lengths)
        table = torch.cat([self.blank[None].float(), rows.float()])
        posterior = F.softmax(ctc_scores(embeddings.float(), table, self.log_scale.float()), dim=-1)
        weighted = linear(fill_rows(posterior.flatten(0, 1)), table.T)[: posterior.shape[0] * posterior.shape[1]]
        weighted = weighted.view(embeddings.shape)
        if self.compresses:
            weighted, lengths = compress(weighted, posterior.argmax(-1), lengths)
        return weighted.to(embeddings.dtype), lengths


def compress(
    embeddings: Float[Tensor, "clip position hidden"], best: Int[Tensor, "clip position"], lengths: Int[Tensor, " clip"]
) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
    """Means over runs of neighbours with the same `best` row; runs of the blank are dropped.

    A clip that is blank all over keeps one position, the mean of all of it: what is there must be heard.
    """
    if not embeddings.numel():
        return embeddings, lengths
    num_positions = best.shape[1]
    inside = torch.arange(num_positions, device=best.device) < lengths[:, None]
    spoken = inside & (best != BLANK)
    silent = (lengths > 0) & ~spoken.any(1)
    begins = torch.ones_like(spoken)
    begins[:, 1:] = best[:, 1:] != best[:, :-1]
    begins[silent] = torch.arange(num_positions, device=best.device) == 0
    spoken = spoken | (inside & silent[:, None])
    run = (begins & spoken).cumsum(1) - 1
    counts = run.amax(1).clamp(min=-1) + 1
    width = int(counts.max())
    # what is dropped is added up in one place more, behind the others
    place = torch.where(spoken, run, width) + (width + 1) * torch.arange(len(best), device=best.device)[:, None]
    sums = embeddings.new_zeros(len(best) * (width + 1), embeddings.shape[-1])
    sums = sums.index_add(0, place.flatten(), embeddings.flatten(0, 1))
    sizes = embeddings.new_zeros(len(sums)).index_add(0, place.flatten(), embeddings.new_ones(place.numel()))
    means = (sums / sizes.clamp(min=1)[:, None]).view(len(best), width + 1, -1)
    return means[:, :width], counts
