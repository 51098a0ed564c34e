"""Encoding in blocks, so that audio can be encoded while it arrives.

Each block of frames is encoded by itself, with some audio before it and a little behind it, whose frames are dropped.
What is said later than that changes nothing. A bidirectional encoder is not made for it; what it costs is measured
(docs/encoders.md). Block-wise encoding with look-ahead: Tsunoo et al. 2019, arXiv 1910.07204; Yeh et al. 2019, arXiv
1910.12977.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """One block of a clip, and what is encoded for it; all in frames of the clip."""

    clip: int
    first: int
    """First frame of the block."""
    count: int
    """Its frames."""
    start: int
    """First frame that is encoded."""
    end: int
    """Behind the last one that is encoded."""
    is_last: bool
    """Whether that is the end of the clip."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes in frames."""

    size: int
    """Of a block."""
    look_ahead: int
    """Encoded behind it and dropped."""
    context: int
    """Encoded before it and dropped."""

    def cuts(self, clip: int, num_frames: int) -> list[Cut]:
        """The blocks of a clip, the last one shorter."""
        found = []
        for first in range(0, num_frames, self.size):
            end = min(num_frames, first + self.size + self.look_ahead)
            start = max(0, first - self.context)
            count = min(self.size, num_frames - first)
            found.append(Cut(clip, first, count, start, end, end == num_frames))
        return found

    def __str__(self) -> str:
        return f"blocks of {self.size}, {self.look_ahead} ahead, {self.context} before"


def join(
    cuts: Sequence[Cut], frames: Float[Tensor, "cut piece_frame hidden"], lengths: Int[Tensor, " clip"]
) -> Float[Tensor, "clip frame hidden"]:
    """The blocks' own frames, put together to clips again, zero past each clip's length."""
    clips: list[list[Tensor]] = [[] for _ in range(len(lengths))]
    for cut, encoded in zip(cuts, frames, strict=True):
        clips[cut.clip].append(encoded[cut.first - cut.start :][: cut.count])
    return torch.nn.utils.rnn.pad_sequence([torch.cat(blocks) for blocks in clips], batch_first=True)
