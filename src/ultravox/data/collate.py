"""From examples of different lengths to padded tensors, with the counts checked where audio and text meet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ultravox.errors import DataError
from ultravox.tokens import IGNORE_INDEX

LossMask = Literal["response", "after_audio", "all_text", "assistant_turns"]


def loss_mask(input_ids: np.ndarray, supervised: np.ndarray, audio_token_id: int, kind: LossMask) -> np.ndarray:
    """Where the loss counts, bool [token].

    Args:
        input_ids: one conversation, [token].
        supervised: True on what the assistant says in any turn, end tokens included, [token].
        audio_token_id: id of the audio placeholder.
        kind: `assistant_turns` = all of `supervised`; `response` = its last stretch, the final answer; `after_audio` =
            all that follows the last placeholder; `all_text` = all but placeholders.
    """
    is_audio = input_ids == audio_token_id
    if kind == "assistant_turns":
        return supervised & ~is_audio
    if kind == "all_text":
        return ~is_audio
    if kind == "after_audio":
        last = int(np.flatnonzero(is_audio).max(initial=-1))
        return np.arange(len(input_ids)) > last
    said = np.flatnonzero(supervised)
    if len(said) == 0:
        return supervised.copy()
    gaps = np.flatnonzero(np.diff(said) > 1)
    start = said[gaps[-1] + 1] if len(gaps) else said[0]
    return supervised & (np.arange(len(input_ids)) >= start)


@dataclass(frozen=True, slots=True)
class WindowSlots:
    """How the windows of a long clip stand one after the other in one array [step, channel].

    All but the last begin a slot of the same size, which the longest possible window fills (`window_lengths`: the last
    may be a little over 30 s). So the number of rows alone tells where each is.
    """

    full: int
    """Steps of a window of 30 s."""
    slot: int
    """Steps of the longest window."""

    def lengths(self, num_rows: int) -> list[int]:
        """Steps of each window of a clip that takes `num_rows` rows."""
        before = max(0, num_rows - 1) // self.slot
        return [self.full] * before + [num_rows - before * self.slot]

    def join(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """The windows of one clip, each [step, channel], as one array."""
        padding = np.zeros((self.slot - self.full, pieces[0].shape[1]), dtype=pieces[0].dtype)
        return np.concatenate([part for piece in pieces[:-1] for part in (piece, padding)] + [pieces[-1]])

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Undo `join`."""
        lengths = self.lengths(len(rows))
        return [rows[index * self.slot :][:length] for index, length in enumerate(lengths)]


def pad_frames(clips: Sequence[np.ndarray]) -> tuple[Float[Tensor, "clip frame channel"], Int[Tensor, " clip"]]:
    """Stack [frame, channel] arrays of any float type into one zero-padded float32 tensor, and their lengths."""
    lengths = [len(clip) for clip in clips]
    padded = np.zeros((len(clips), max(lengths), clips[0].shape[1]), dtype=np.float32)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    return torch.from_numpy(padded), torch.tensor(lengths)


@dataclass(slots=True)
class TokenBatch:
    """Conversations, right-padded; `labels` stand at the place of the token that they are."""

    input_ids: Int[Tensor, "row token"]
    labels: Int[Tensor, "row token"]
    mask: Bool[Tensor, "row token"]
    """True = not padding."""
    num_tokens: int
    """Without padding."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same on a device."""
        return TokenBatch(self.input_ids.to(device), self.labels.to(device), self.mask.to(device), self.num_tokens)


def expand_audio(
    row_id: str, input_ids: np.ndarray, mask: np.ndarray, audio_token_id: int, num_tokens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Repeat the i-th placeholder `num_tokens[i]` times, in ids and mask.

    Raises:
        DataError: placeholders and clips differ in number; names the row.
    """
    places = np.flatnonzero(input_ids == audio_token_id)
    if len(places) != len(num_tokens):
        raise DataError(
            f"{len(num_tokens)} audio clips, {len(places)} <|audio|> placeholders in {row_id}: "
            f"give each clip exactly one"
        )
    repeats = np.ones(len(input_ids), dtype=np.int64)
    repeats[places] = num_tokens
    return np.repeat(input_ids, repeats), np.repeat(mask, repeats)


def collate_tokens(
    ids: Sequence[str],
    input_ids: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    audio_tokens: Sequence[Sequence[int]],
    *,
    audio_token_id: int,
    pad_token_id: int,
    silent: Sequence[bool] = (),
) -> TokenBatch:
    """Expand placeholders, pad on the right, and make labels.

    The padding is known by position, not by its id: a tokenizer whose pad token is its end token still trains the end.

    Args:
        ids: names of the rows, for errors.
        input_ids: conversations with one placeholder per clip, each [token].
        masks: where the loss counts, each [token].
        audio_tokens: positions of each clip of each row.
        audio_token_id, pad_token_id: of the tokenizer.
        silent: rows of which nothing need be supervised, since something else is learnt from them; none if empty.

    Raises:
        DataError: a row of which nothing is supervised; names it.
    """
    rows = [
        expand_audio(row_id, row, mask, audio_token_id, counts)
        for row_id, row, mask, counts in zip(ids, input_ids, masks, audio_tokens, strict=True)
    ]
    width = max(len(row) for row, _ in rows)
    padded = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    real = np.zeros((len(rows), width), dtype=bool)
    for index, (row, mask) in enumerate(rows):
        padded[index, : len(row)] = row
        labels[index, : len(row)] = np.where(mask, row, IGNORE_INDEX)
        real[index, : len(row)] = True
    may_be = silent or [False] * len(rows)
    unsupervised = (labels[:, 1:] == IGNORE_INDEX).all(axis=1)
    if empty := [ids[row] for row in np.flatnonzero(unsupervised & ~np.asarray(may_be)).tolist()]:
        raise DataError(f"nothing is supervised in {empty[0]}: its answer is empty, or the loss mask leaves nothing")
    return TokenBatch(
        torch.from_numpy(padded), torch.from_numpy(labels), torch.from_numpy(real), sum(len(row) for row, _ in rows)
    )
