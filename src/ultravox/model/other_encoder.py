"""Any other encoder that transformers' `AutoModel` loads with a feature extractor of its own: SEW, Speech2Text …

Nothing is known of such a class but what trying it shows: how many steps its feature extractor makes, and how many
frames it makes of them. Clips run one by one, so no padding can leak into them, whatever its attention does with it.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from ultravox.audio.features import FeatureExtractor, NormalizedWaveform, OtherFeatures
from ultravox.audio.lengths import SAMPLE_RATE, Chain, chain_length, least_samples
from ultravox.audio.step_fit import SAMPLE_SIZES, fit_steps
from ultravox.errors import ModelError
from ultravox.model.audio_encoder import AudioEncoder

INPUTS = ("input_values", "input_features")


class OtherAudioEncoder(AudioEncoder):
    """An encoder of a kind that this package has no class for.

    Args:
        config: of the model; of an encoder-decoder, the encoder is taken.
        chain: from samples to features, and from these to frames, as `fit` finds them.
        feature_extractor: None = in a checkpoint, where the processor makes the features.
    """

    def __init__(self, config: PretrainedConfig, chain: Chain, feature_extractor: FeatureExtractor | None = None):
        super().__init__()
        self.encoder = encoder_of(AutoModel.from_config(config))
        self.config = config
        self.hidden_size = self.encoder.config.hidden_size
        self.chain = [tuple(step) for step in chain]
        self.min_samples = least_samples(self.chain)
        self.frames_per_second = max(1, round(self.output_length(10 * SAMPLE_RATE) / 10))
        self.feature_extractor = feature_extractor or NormalizedWaveform(normalize=False)

    def frame_lengths(self, feature_lengths: Int[Tensor, " clip"]) -> Int[Tensor, " clip"]:
        """What trying has shown."""
        lengths = [chain_length(length, self.chain[1:]) for length in feature_lengths.tolist()]
        return torch.tensor(lengths, device=feature_lengths.device)

    def encode(
        self, features: Float[Tensor, "clip channel time"], feature_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip frame hidden"], Int[Tensor, " clip"]]:
        """Features and their lengths → frames, clip by clip.

        Raises:
            ModelError: the encoder made another number of frames than it did when it was tried.
        """
        lengths = self.frame_lengths(feature_lengths)
        rows = zip(features.to(self.encoder.dtype), feature_lengths.tolist(), strict=True)
        frames = [
            self._of_layers(run(self.encoder, row[:, :size], all_layers=self.mixes_layers))[0] for row, size in rows
        ]
        if (made := [len(clip) for clip in frames]) != lengths.tolist():
            raise ModelError(f"the audio encoder made {made} frames, where {lengths.tolist()} were expected")
        return nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths


def encoder_of(model: Any) -> Any:
    """The encoder of an encoder-decoder; any other model as it is."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def run(encoder: Any, features: Float[Tensor, "channel time"], *, all_layers: bool = False) -> list[Tensor]:
    """The last layer's states of one clip, or all layers', each [1, frame, hidden]."""
    inputs = features if encoder.main_input_name == "input_values" else features.T[None]
    if not all_layers:
        return [encoder(inputs).last_hidden_state]
    return list(encoder(inputs, output_hidden_states=True).hidden_states)


@torch.no_grad()
def fit(encoder: Any, extractor: OtherFeatures | NormalizedWaveform, name: str) -> Chain:
    """From samples to features, and from these to frames: found by trying a model with weights.

    Raises:
        ModelError: its input or output is none that this package can use; says why.
    """
    if encoder.main_input_name not in INPUTS:
        raise ModelError(
            f"audio_encoder: {name!r} reads {encoder.main_input_name!r}; expected a model that reads "
            f"{' or '.join(INPUTS)}"
        )
    steps = (0, 1) if extractor.length(5000) == 5000 else fit_steps(extractor.length, SAMPLE_SIZES, name)
    channels = extractor(np.random.default_rng(0).standard_normal(SAMPLE_RATE, dtype=np.float32)).shape[0]
    sizes = sorted({chain_length(size, [steps]) for size in SAMPLE_SIZES[:-1]})

    def frames(length: int) -> int:
        generator = torch.Generator().manual_seed(length)
        values = torch.randn(channels, length, generator=generator).to(encoder.dtype)
        try:
            states = run(encoder, values)[0]
        except Exception as error:  # whatever a model that was not made for this answers with
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"audio_encoder: {name!r} cannot encode {length} steps of sound ({reason})") from error
        if states.ndim != 3:
            raise ModelError(
                f"audio_encoder: {name!r} gives states of shape {list(states.shape)}; expected [batch, frame, hidden]"
            )
        return states.shape[1]

    return [steps, fit_steps(frames, sizes, name)]
