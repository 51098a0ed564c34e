"""Augmentation of cached encoder frames: masks over time and channels, and noise.

Like SpecAugment (Park et al. 2019, arXiv 1904.08779), but after the encoder, so that it survives the feature cache.
"""

import hashlib

import torch
from torch import Tensor


def generator_for(*parts: int | str) -> torch.Generator:
    """A random generator that is a pure function of its arguments (seed, stage, epoch, batch): resuming repeats it."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def augment_frames(
    frames: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    *,
    time_masks: int = 0,
    max_time_mask_frames: int = 0,
    max_time_mask_share: float = 0.2,
    channel_masks: int = 0,
    max_channel_mask_share: float = 0.0,
    noise_std: float = 0.0,
) -> Tensor:
    """Mask and disturb frames, in place.

    Args:
        frames: [clip, frame, channel].
        lengths: true frames of each clip, [clip].
        generator: source of all randomness.
        time_masks: masks per clip; each covers 0 to `max_time_mask_frames` frames, and all together at most
            `max_time_mask_share` of the clip, so that a short word is never wiped out.
        channel_masks: masks per clip; each covers 0 to `max_channel_mask_share` of the channels.
        noise_std: of Gaussian noise, in standard deviations of the clip's own frames.

    Returns: `frames`; masked places are 0.
    """
    num_clips, num_frames, num_channels = frames.shape
    device = frames.device  # numbers are drawn on the CPU, so that they are the same everywhere
    if noise_std > 0:
        keep = (torch.arange(num_frames, device=device) < lengths[:, None])[:, :, None]
        noise = torch.randn(frames.shape, generator=generator, dtype=frames.dtype).to(device)
        power = (frames.detach().square() * keep).sum((1, 2), keepdim=True) / (lengths[:, None, None] * num_channels)
        frames.add_(noise * keep * (power.sqrt() * noise_std))
    if time_masks > 0 and max_time_mask_frames > 0:
        lengths = lengths.cpu()
        widest = torch.minimum(torch.tensor(float(max_time_mask_frames)), lengths * max_time_mask_share / time_masks)
        width = _widths(widest, time_masks, generator)
        start = torch.rand(width.shape, generator=generator) * (lengths[:, None] - width + 1)
        place = torch.arange(num_frames) - start.floor()[:, :, None]
        mask = ((place >= 0) & (place < width[:, :, None])).any(dim=1)
        frames.masked_fill_(mask[:, :, None].to(device), 0.0)
    if channel_masks > 0 and max_channel_mask_share > 0:
        widest = torch.full((num_clips,), max_channel_mask_share * num_channels)
        # Channels have no ends: spans wrap around, so that each channel is masked as often as any other.
        start = torch.randint(num_channels, (num_clips, channel_masks, 1), generator=generator)
        width = _widths(widest, channel_masks, generator)
        mask = ((torch.arange(num_channels) - start) % num_channels < width[:, :, None]).any(dim=1)
        frames.masked_fill_(mask[:, None, :].to(device), 0.0)
    return frames


def _widths(widest: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Whole random widths from 0 to `widest` [row], `count` per row: [row, count]."""
    widest = widest.floor()[:, None]
    return (torch.rand(len(widest), count, generator=generator) * (widest + 1)).floor().minimum(widest)
