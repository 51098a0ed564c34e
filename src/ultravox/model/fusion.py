"""Where audio meets text: each audio embedding takes the place of one placeholder, and both are counted first."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ultravox.errors import DataError
from ultravox.model.audio_encoder import length_mask


def check_counts(num_placeholders: Int[Tensor, " row"], token_lengths: Int[Tensor, " clip"]) -> None:
    """Each row's placeholders must be filled by whole clips, in order, with none left over.

    Raises:
        DataError: naming the first row where the counts differ.
    """
    # one transfer from the device for both
    counts = torch.cat([num_placeholders, token_lengths]).tolist()
    rows, clips = counts[: len(num_placeholders)], counts[len(num_placeholders) :]
    clip = 0
    for row, expected in enumerate(rows):
        got = 0
        while got < expected and clip < len(clips):
            got += clips[clip]
            clip += 1
        if got != expected:
            raise DataError(
                f"row {row} has {expected} <|audio|> positions, but its audio clips fill {got}: "
                "the prompt and the clips must come from the same processor call"
            )
    if clip < len(clips):
        raise DataError(
            f"{len(clips)} audio clips were given, but the {len(rows)} rows have <|audio|> positions for {clip}: "
            "add a placeholder for each clip or leave clips out"
        )


def fuse(
    text_embeddings: Float[Tensor, "row token hidden"],
    is_audio: Tensor,
    audio_embeddings: Float[Tensor, "clip audio_token hidden"],
    token_lengths: Int[Tensor, " clip"],
) -> Float[Tensor, "row token hidden"]:
    """Put the clips' embeddings, one after the other, where `is_audio` [row, token] is True.

    Raises:
        DataError: placeholders and embeddings differ in number.
    """
    check_counts(is_audio.sum(1), token_lengths)
    flat = audio_embeddings[length_mask(token_lengths, audio_embeddings.shape[1])]
    return text_embeddings.masked_scatter(is_audio[..., None], flat.to(text_embeddings.dtype))


def leave_out(
    mask: Int[Tensor, "row past_and_token"],
    is_audio: Tensor,
    planned: Int[Tensor, " clip"],
    token_lengths: Int[Tensor, " clip"],
) -> Int[Tensor, "row past_and_token"]:
    """The mask without those of the clips' planned placeholders that come after their `token_lengths` first ones.

    Args:
        mask: 1 = keep; its last columns belong to `is_audio`.
        is_audio: where the placeholders stand, [row, token]; as many as planned in all.
    """
    width = int(planned.max())
    taken = length_mask(token_lengths, width)[length_mask(planned, width)]
    past, now = mask.split([mask.shape[1] - is_audio.shape[1], is_audio.shape[1]], dim=1)
    return torch.cat([past, now.masked_scatter(is_audio, taken.to(now.dtype))], dim=1)
