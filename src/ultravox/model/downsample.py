"""From the encoder's 50 frames a second down to the language model's rate."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ultravox.audio.lengths import num_audio_tokens


def stack_frames(
    frames: Float[Tensor, "clip frame channel"], stack_factor: int
) -> Float[Tensor, "clip token stacked_channel"]:
    """Join each `stack_factor` consecutive frames into one; the tail is zero-padded, never dropped."""
    num_clips, num_frames, num_channels = frames.shape
    num_tokens = num_audio_tokens(num_frames, stack_factor)
    frames = F.pad(frames, (0, 0, 0, num_tokens * stack_factor - num_frames))
    return frames.reshape(num_clips, num_tokens, num_channels * stack_factor)
