"""What the encoder needs of a recording, or gives of it: from the cache, or made anew in every epoch.

With a frozen encoder the cache keeps its frames. Where anything in the encoder trains, it keeps what the encoder eats,
and the encoder runs in every step. Without the cache (waveforms that are augmented, corpora larger than a disk) the
loader decodes, and the encoder runs in every step too.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultravox.audio.augment import augment_frames, generator_for
from ultravox.audio.features import windows
from ultravox.audio.lengths import MAX_WINDOW_SAMPLES, SAMPLE_RATE, window_lengths
from ultravox.config.data import AugmentConfig
from ultravox.data.cache import CacheKey, FeatureCache
from ultravox.data.collate import WindowSlots, pad_frames


class Features:
    """Encoder frames of examples, from the cache or from the encoder itself. `name` is the encoder's, for people."""

    def __init__(self, model: Any, dtype: str, name: str = "") -> None:
        self.model, self.encoder = model, model.audio_tower
        self.trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        extractor = self.encoder.feature_extractor
        if self.trains:
            channels = int(self.encoder.features(np.zeros(SAMPLE_RATE, dtype=np.float32)).shape[0])
            key = CacheKey("features only", extractor.name, channels, "float32")
        else:
            key = CacheKey(module_hash(self.encoder), self.encoder.way, self.encoder.hidden_size, dtype)
        self.cache = FeatureCache(key, "none, it trains" if self.trains else name)
        steps = extractor.length if self.trains else self.encoder.output_length
        self.steps_per_second = steps(SAMPLE_RATE)
        longest = MAX_WINDOW_SAMPLES + self.encoder.min_samples - 1
        self.slots = WindowSlots(full=steps(MAX_WINDOW_SAMPLES), slot=steps(longest))

    def min_seconds(self, speed: float) -> float:
        """The shortest recording that the encoder makes a frame of when it is played so fast; 0 = any that there is."""
        least = self.encoder.min_samples
        return 0.0 if least == 1 else (least * speed + 1) / SAMPLE_RATE  # + 1: resampling may take one away

    def encode(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """Waveforms to what the cache keeps of them, each [frame, channel]."""
        pieces = [self.heard(waveform) for waveform in waveforms]
        if self.trains:
            return [self.slots.join(piece) for piece in pieces]
        values, lengths = pad_frames([window for piece in pieces for window in piece])
        with torch.inference_mode():
            frames, frame_lengths = self.model.encode_audio(values.transpose(1, 2), lengths)
        rows = [row[:length].float().cpu().numpy() for row, length in zip(frames, frame_lengths.tolist(), strict=True)]
        found: Iterator[np.ndarray] = iter(rows)
        return [self.slots.join([next(found) for _ in piece]) for piece in pieces]

    def heard(self, waveform: np.ndarray) -> list[np.ndarray]:
        """What the encoder eats of a waveform: its windows, each [step, channel]."""
        return [self.encoder.features(window).T.numpy() for window in windows(waveform, self.encoder.min_samples)]

    def cached_frames(self, name: str) -> list[int]:
        """Encoder frames of each window of a cached recording."""
        steps = self.slots.lengths(self.cache.num_frames(name))
        return self.encoder.frame_lengths(torch.tensor(steps)).tolist() if self.trains else steps

    def expected_frames(self, num_samples: int) -> list[int]:
        """Encoder frames of each window of a recording of this length."""
        windows = window_lengths(max(1, num_samples), self.encoder.min_samples)
        return [self.encoder.output_length(count) for count in windows]

    def cached_windows(self, names: Sequence[str]) -> list[np.ndarray]:
        """What the cache keeps of recordings: all their windows, each [step, channel]."""
        return [window for name in names for window in self.slots.split(self.cache.frames(name))]

    def frames(self, values: Tensor, lengths: Tensor, *, encoded: bool) -> tuple[Tensor, Tensor]:
        """Windows [window, step, channel] → encoder frames [window, frame, hidden] and lengths [window].

        There is a gradient where the encoder trains. `encoded` = they are the frames of a frozen encoder already.
        """
        if encoded:
            return values, lengths
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            return self.model.encode_audio(values.transpose(1, 2), lengths)


def augment(
    frames: Tensor, lengths: Tensor, options: AugmentConfig, seed: tuple[int | str, ...], frames_per_second: int
) -> Tensor:
    """Augmented frames, as a pure function of `seed`."""
    if not (options.time_masks or options.channel_masks or options.noise_std):
        return frames
    return augment_frames(
        frames.clone() if frames.requires_grad else frames,
        lengths,
        generator_for(*seed),
        time_masks=options.time_masks,
        max_time_mask_frames=round(options.max_time_mask_seconds * frames_per_second),
        channel_masks=options.channel_masks,
        max_channel_mask_share=options.max_channel_mask_share,
        noise_std=options.noise_std,
    )


def module_hash(module: torch.nn.Module) -> str:
    """Hex SHA-256 of a module's weights and configuration."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = getattr(module, "config", None)
    if config is not None:
        content = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        content.pop("transformers_version", None)
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()
