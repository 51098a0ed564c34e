"""Alignment warm-up: CTC with the language model's own embedding rows as its output layer.

Each projected position is scored against the embedding rows of the tokens that occur in the transcripts and against
one learned blank (CTC: Graves et al. 2006). Minimising it makes the projector's output resemble the embeddings of the
words that are spoken, before the language model has seen a single step. A second term pulls each position to the mean
of the rows under its own posterior, so that also its length and its other directions look like an embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultravox.errors import DataError
from ultravox.model.ctc_projector import BLANK, INITIAL_SPREAD, ctc_scores, initial_log_scale


class CtcAlignment(nn.Module):
    """CTC of audio embeddings against frozen embedding rows; the blank row and the score's scale are learned."""

    rows: Tensor
    token_ids: Tensor
    row_of_token: Tensor

    def __init__(
        self,
        embedding: Tensor,
        token_ids: Tensor,
        match_weight: float = 0.5,
        initial_scale: float = INITIAL_SPREAD,
        embedding_scale: float = 1.0,
        head: tuple[nn.Parameter, nn.Parameter] | None = None,
    ):
        """Choose the rows.

        Args:
            embedding: the language model's table, [vocabulary, hidden].
            token_ids: sorted ids of the tokens that occur in the transcripts, [row].
            match_weight: weight of the matching term beside CTC, 0 for none.
            initial_scale: spread of the scores of an embedding row against the others, in nats.
            embedding_scale: what the language model multiplies a row by before it reads it (Gemma).
            head: blank row and log of the scale of a projector that makes its embeddings by these scores; None = fresh.
        """
        super().__init__()
        self.embedding_scale = embedding_scale
        token_ids = token_ids.to(embedding.device)
        rows = embedding.detach()[token_ids].float() * embedding_scale
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("token_ids", token_ids.clone(), persistent=False)
        row_of_token = torch.full((embedding.shape[0],), -1, dtype=torch.long, device=token_ids.device)
        row_of_token[token_ids] = torch.arange(len(token_ids), device=token_ids.device) + 1  # row 0 is the blank
        self.register_buffer("row_of_token", row_of_token, persistent=False)
        self.register_buffer("variance", rows.var(), persistent=False)
        self.match_weight = match_weight
        if head is None:
            scale = initial_log_scale(rows.shape[1], float(rows.var()), initial_scale)
            head = (nn.Parameter(rows.mean(0)), nn.Parameter(scale))
        self.blank, self.log_scale = head

    def extend(self, embedding: Tensor, token_ids: Tensor) -> None:
        """Add the rows of tokens that are not among these yet, behind the others, in the order in which they are given.

        A stream's transcripts are not known beforehand. The scale of the scores and of the matching term stays.

        Args:
            embedding: the table that the constructor was given.
            token_ids: each once, [token].
        """
        token_ids = token_ids.to(self.row_of_token.device)
        new = token_ids[self.row_of_token[token_ids] < 0]
        if len(new):
            self.row_of_token[new] = torch.arange(len(new), device=new.device) + 1 + len(self.token_ids)
            self.token_ids = torch.cat([self.token_ids, new])
            self.rows = torch.cat([self.rows, embedding.detach()[new].float() * self.embedding_scale])

    def targets(self, token_ids: Tensor) -> Tensor:
        """Rows (1 …) for transcript tokens.

        Raises:
            DataError: a token that was not among those given to the constructor.
        """
        rows = self.row_of_token[token_ids.to(self.row_of_token.device)]
        if bool((rows < 0).any()):
            unknown = token_ids[(rows < 0).cpu()][:5].tolist()
            raise DataError(f"transcript tokens {unknown} are not among the alignment's {len(self.token_ids)} tokens")
        return rows

    def scores(self, audio_embeddings: Tensor) -> Tensor:
        """Unnormalised scores [..., row + 1] of embeddings [..., hidden]; index 0 is the blank."""
        table = torch.cat([self.blank[None], self.rows])
        return ctc_scores(audio_embeddings, table, self.log_scale)

    def loss(
        self, audio_embeddings: Tensor, token_lengths: Tensor, targets: Tensor, target_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CTC and matching loss of a padded batch.

        Args:
            audio_embeddings: [clip, token, hidden].
            token_lengths: valid positions of each clip, [clip].
            targets: rows as `targets` gives them, one after the other, [sum of target_lengths].
            target_lengths: [clip].
        Returns:
            the sum over clips of CTC + weighted matching, the CTC part alone, and the count to divide by (target
            tokens).
        """
        valid = torch.arange(audio_embeddings.shape[1], device=token_lengths.device) < token_lengths[:, None]
        flat = audio_embeddings[valid]
        log_probs_flat = F.log_softmax(self.scores(flat), dim=-1)
        log_probs = log_probs_flat.new_zeros(*valid.shape, log_probs_flat.shape[-1])
        log_probs[valid] = log_probs_flat
        ctc = F.ctc_loss(
            log_probs.transpose(0, 1), targets, token_lengths, target_lengths, BLANK, "sum", zero_infinity=True
        )
        total = ctc
        count = target_lengths.sum()
        if self.match_weight:
            with torch.no_grad():
                table = torch.cat([self.blank[None], self.rows])
                expected = log_probs_flat.exp() @ table
            distance = (flat - expected).square().mean(dim=-1) / self.variance
            # A mean over each clip's own positions, so that the sums of any batches add up to those of one.
            weight = (target_lengths / token_lengths).repeat_interleave(token_lengths)
            total = total + self.match_weight * (distance * weight).sum()
        return total, ctc.detach(), count

    @torch.no_grad()
    def decode(self, audio_embeddings: Tensor, token_lengths: Tensor) -> list[list[int]]:
        """Greedy decoding: best row per position, repeats merged, blanks dropped → token ids per clip."""
        best = self.scores(audio_embeddings).argmax(-1)
        decoded = []
        for row, length in zip(best, token_lengths.tolist(), strict=True):
            merged = torch.unique_consecutive(row[:length])
            decoded.append(self.token_ids[merged[merged != BLANK] - 1].tolist())
        return decoded
