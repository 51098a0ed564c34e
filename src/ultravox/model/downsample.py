"""From the encoder's 50 frames a second down to the language model's rate: k frames become one position.

100 ms a position is k = 5, 200 ms is k = 10. However it is done, n frames give `num_audio_tokens(n, k)` positions: the
tail is never dropped.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ultravox.audio.lengths import num_audio_tokens

Downsampling = Literal["stack", "stride", "mean", "random"]


def stack_frames(
    frames: Float[Tensor, "clip frame channel"], stack_factor: int
) -> Float[Tensor, "clip token stacked_channel"]:
    """Join each `stack_factor` consecutive frames into one; the tail is zero-padded, never dropped."""
    num_clips, num_frames, num_channels = frames.shape
    num_tokens = num_audio_tokens(num_frames, stack_factor)
    frames = F.pad(frames, (0, 0, 0, num_tokens * stack_factor - num_frames))
    return frames.reshape(num_clips, num_tokens, num_channels * stack_factor)


class Downsample(nn.Module):
    """k frames to one position.

    Args:
        kind: stack = join them; stride = the first of them; mean = their mean; random = any of them while training, the
            middle one otherwise.
        stack_factor: k.
    """

    def __init__(self, kind: Downsampling, stack_factor: int):
        super().__init__()
        self.kind, self.stack_factor = kind, stack_factor

    def width(self, num_channels: int) -> int:
        """Channels of a position."""
        return num_channels * self.stack_factor if self.kind == "stack" else num_channels

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> Float[Tensor, "clip token position_channel"]:
        """Positions of frames that are zero past a clip's length; what is past a clip's last position is arbitrary."""
        k = self.stack_factor
        if self.kind == "stack":
            return stack_frames(frames, k)
        if self.kind == "stride":
            return frames[:, ::k]
        groups = stack_frames(frames, k).unflatten(2, (k, frames.shape[2]))
        starts = torch.arange(groups.shape[1], device=frames.device) * k
        sizes = (frame_lengths.to(frames.device)[:, None] - starts).clamp(1, k)  # true frames of each group
        if self.kind == "mean":
            return groups.sum(2) / sizes[:, :, None].to(frames.dtype)
        chosen = (sizes - 1) // 2
        if self.training:
            draws = torch.rand(sizes.shape).to(frames.device)  # of the run's own generator, which a checkpoint keeps
            chosen = (draws * sizes).long().clamp(max=k - 1)
        return groups.gather(2, chosen[:, :, None, None].expand(-1, -1, 1, frames.shape[2])).squeeze(2)
