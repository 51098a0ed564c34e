"""Two encoders side by side: their frames of the same moment, joined into one.

An encoder that was taught to transcribe and one that was taught nothing but to hear know different things; SALMONN
(Tang et al. 2023, arXiv 2310.13289) joins Whisper and BEATs so.
"""

import hashlib
import json

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ultravox.audio.features import NormalizedWaveform
from ultravox.errors import ModelError
from ultravox.model.audio_encoder import AudioEncoder


class JointAudioEncoder(AudioEncoder):
    """Takes samples; each encoder makes its own features of them.

    A clip has as many frames as the encoder that makes more of them; the other one's channels are zero there.

    Args:
        first: its configuration stands for both where one is asked for.
        second: has as many frames a second.

    Raises:
        ModelError: their frames are of different lengths.
    """

    def __init__(self, first: AudioEncoder, second: AudioEncoder):
        super().__init__()
        if first.frames_per_second != second.frames_per_second:
            raise ModelError(
                f"the audio encoders give {first.frames_per_second} and {second.frames_per_second} frames a second: "
                "only encoders of the same rate can stand side by side"
            )
        self.encoders = nn.ModuleList([first, second])
        self.config = first.config
        self.hidden_size = first.hidden_size + second.hidden_size
        self.frames_per_second = first.frames_per_second
        self.min_samples = max(first.min_samples, second.min_samples)
        self.feature_extractor = NormalizedWaveform(normalize=False)

    @property
    def parts(self) -> list[AudioEncoder]:
        """Both."""
        return list(self.encoders)  # type: ignore[arg-type]

    @property
    def way(self) -> str:
        """See `AudioEncoder`; with the second one's configuration, which is not this module's."""
        config = json.dumps(self.parts[1].config.to_dict(), sort_keys=True, default=str)
        digest = hashlib.sha256(config.encode()).hexdigest()[:16]
        return f"{self.parts[0].way} beside {self.parts[1].way} {digest}"

    def output_length(self, num_samples: int) -> int:
        """The greater number of frames of the two."""
        return max(part.output_length(num_samples) for part in self.parts)

    def frame_lengths(self, feature_lengths: Int[Tensor, " clip"]) -> Int[Tensor, " clip"]:
        """Of so many samples."""
        lengths = [self.output_length(length) for length in feature_lengths.tolist()]
        return torch.tensor(lengths, device=feature_lengths.device)

    def encode(
        self, features: Float[Tensor, "clip channel time"], feature_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip frame hidden"], Int[Tensor, " clip"]]:
        """Samples [clip, 1, sample] and their lengths → frames with the channels of both."""
        lengths = self.frame_lengths(feature_lengths)
        longest = int(lengths.max())
        clips = [
            row[0, :size].float().cpu().numpy() for row, size in zip(features, feature_lengths.tolist(), strict=True)
        ]
        found = []
        for part in self.parts:
            values = [part.features(clip).to(features.device) for clip in clips]
            sizes = torch.tensor([value.shape[-1] for value in values], device=features.device)
            padded = nn.utils.rnn.pad_sequence([value.T for value in values], batch_first=True).transpose(1, 2)
            frames, _ = part(padded, sizes)
            found.append(F.pad(frames, (0, 0, 0, longest - frames.shape[1])))
        return torch.cat(found, dim=-1), lengths
