"""From the encoder's 50 frames a second down to the language model's rate: one position for each group of frames.

Every way gives `num_audio_tokens` positions. The tail is a group like the others, of fewer frames; it is never dropped.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ultravox.audio.lengths import num_audio_tokens

Downsampling = Literal["stack", "stride", "mean", "random"]
DOWNSAMPLINGS: tuple[Downsampling, ...] = ("stack", "stride", "mean", "random")


def downsampled_width(width: int, stack_factor: int, kind: Downsampling = "stack") -> int:
    """Channels of a position, from those of a frame."""
    return width * stack_factor if kind == "stack" else width


def stack_frames(
    frames: Float[Tensor, "clip frame channel"], stack_factor: int
) -> Float[Tensor, "clip token stacked_channel"]:
    """Join each `stack_factor` consecutive frames into one; the tail is zero-padded, never dropped."""
    num_clips, num_frames, num_channels = frames.shape
    num_tokens = num_audio_tokens(num_frames, stack_factor)
    frames = F.pad(frames, (0, 0, 0, num_tokens * stack_factor - num_frames))
    return frames.reshape(num_clips, num_tokens, num_channels * stack_factor)


def group_lengths(frame_lengths: Int[Tensor, " clip"], num_groups: int, size: int) -> Int[Tensor, "clip {num_groups}"]:
    """How many frames of each group of `size` are a clip's own."""
    starts = torch.arange(num_groups, device=frame_lengths.device) * size
    return (frame_lengths[:, None] - starts).clamp(0, size)


def downsample(
    frames: Float[Tensor, "clip frame channel"],
    frame_lengths: Int[Tensor, " clip"],
    stack_factor: int,
    kind: Downsampling = "stack",
    *,
    training: bool = False,
) -> Float[Tensor, "clip token position_channel"]:
    """One position for each group of `stack_factor` frames.

    Args:
        frames: zero past each clip's length.
        frame_lengths: of the clips.
        stack_factor: frames in a group.
        kind: "stack" joins them, "stride" keeps the first one, "mean" takes the mean of those that are the clip's own,
            "random" one of these: any while training, by torch's own generator, the middle one otherwise.
        training: whether "random" draws.
    """
    stacked = stack_frames(frames, stack_factor)
    if kind == "stack":
        return stacked
    groups = stacked.reshape(*stacked.shape[:2], stack_factor, frames.shape[-1])
    if kind == "stride":
        return groups[:, :, 0]
    own = group_lengths(frame_lengths, stacked.shape[1], stack_factor)
    if kind == "mean":
        mask = torch.arange(stack_factor, device=own.device) < own[..., None]
        return (groups * mask[..., None]).sum(2) / own.clamp(min=1)[..., None].to(frames.dtype)
    last = (own - 1).clamp(min=0)
    # a float32 below 1 times the number may round up to the number itself
    choice = (torch.rand(own.shape, device=own.device) * own).long().minimum(last) if training else last // 2
    return groups.gather(2, choice[..., None, None].expand(-1, -1, 1, frames.shape[-1])).squeeze(2)
