"""Learned tokens before and after each recording. Of the language model's table, their two rows alone train."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

AUDIO_START_TOKEN, AUDIO_END_TOKEN = "<|audio_start|>", "<|audio_end|>"


class AudioBoundaries(nn.Module):
    """The two rows while they train. In a saved model they are ordinary rows of the table, and this is not there.

    Args:
        table: the language model's embeddings, [vocabulary, hidden], which have the rows already.
        token_ids: of the start and the end token.
        scale: what the language model multiplies a row by before it reads it.
    """

    def __init__(self, table: Tensor, token_ids: Sequence[int], scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.token_ids = list(token_ids)
        self.weight = nn.Parameter(table.detach()[self.token_ids].clone())

    def forward(
        self, input_ids: Int[Tensor, "row token"], embeddings: Float[Tensor, "row token hidden"]
    ) -> Float[Tensor, "row token hidden"]:
        """The embeddings with the trained rows in their places."""
        for row, token_id in zip(self.weight, self.token_ids, strict=True):
            read = (self.scale * row).to(embeddings.dtype)
            embeddings = torch.where((input_ids == token_id)[..., None], read, embeddings)
        return embeddings

    @torch.no_grad()
    def write_into(self, table: Tensor) -> None:
        """Put the rows into the table as they are by now: an output layer that shares it sees them too."""
        table.data[self.token_ids] = self.weight.to(table.dtype)


@torch.no_grad()
def grow_table(language_model: nn.Module, num_rows: int, token_ids: Sequence[int]) -> None:
    """Give the language model's embeddings at least `num_rows` rows; the new tokens' are the mean of all others."""
    tables = language_model.get_input_embeddings, language_model.get_output_embeddings
    before = tables[0]().weight.shape[0]  # type: ignore[operator]
    means = [layer().weight[:before].float().mean(0) for layer in tables]  # type: ignore[operator]
    if num_rows > before:
        language_model.resize_token_embeddings(num_rows, mean_resizing=False)  # type: ignore[operator]
    new = sorted({*range(before, num_rows), *token_ids})
    for layer, mean in zip(tables, means, strict=True):
        layer().weight[new] = mean.to(layer().weight.dtype)  # type: ignore[operator]


def with_boundaries(
    input_ids: np.ndarray, marks: np.ndarray, audio_token_id: int, token_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation with the two tokens around each placeholder, and its marks, False on them; both [token]."""
    places = np.flatnonzero(input_ids == audio_token_id)
    where = np.stack([places, places + 1], axis=1).reshape(-1)  # of neighbours, the end of one before the next's start
    tokens = np.tile(np.asarray(token_ids, dtype=input_ids.dtype), len(places))
    return np.insert(input_ids, where, tokens), np.insert(marks, where, False)
