"""Audio encoders behind one interface: Whisper, wav2vec 2.0 and its kin, W2v-BERT 2.0.

Whisper: Radford et al. 2022, arXiv 2212.04356; wav2vec 2.0: Baevski et al. 2020, arXiv 2006.11477; HuBERT: Hsu et al.
2021, arXiv 2106.07447; WavLM: Chen et al. 2021, arXiv 2110.13900; W2v-BERT 2.0: Barrault et al. 2023, arXiv 2312.05187.
"""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ultravox.audio.features import LogMel, NormalizedWaveform, StackedFilterbank
from ultravox.audio.lengths import (
    ENCODER_FRAMES_PER_SECOND,
    ENCODER_STRIDE,
    HOP_LENGTH,
    MEL_CHAIN,
    SAMPLE_RATE,
    Chain,
    chain_length,
    convolution_chain,
    filterbank_chain,
    num_convolution_frames,
    num_encoder_frames,
    receptive_field,
)
from ultravox.errors import AudioError, ModelError
from ultravox.model.configuration import ENCODERS
from ultravox.model.encoder_blocks import Blocks, join


def length_mask(lengths: Int[Tensor, " clip"], size: int) -> Tensor:
    """True at the first `lengths` of `size` places, [clip, size]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class AudioEncoder(nn.Module, abc.ABC):
    """From features to frames. A clip's frames do not depend on the others in its batch, nor on padding."""

    hidden_size: int
    """Channels of a frame."""
    num_mixed: int = 1
    """Layers that a frame holds side by side, for a learned mix; 1 = the last one alone."""
    frames_per_second: int
    feature_extractor: Any
    """A `FeatureExtractor`."""
    config: Any
    chain: Chain
    """From samples to frames."""
    min_samples: int
    """The shortest window that gives a frame."""
    blocks: Blocks | None = None
    """How long audio is cut, where it is encoded as it arrives."""
    mixes_layers: bool = False
    #: Time steps of the features per frame, and how many more a stretch of frames needs; 0 = cannot run in blocks.
    steps_per_frame: int = 0
    steps_around: int = 0

    def features(self, waveform: np.ndarray) -> Float[Tensor, "channel time"]:
        """What `forward` takes, of one window [sample] of `ultravox.audio.features.windows`."""
        return self.feature_extractor(waveform)

    def output_length(self, num_samples: int) -> int:
        """Frames of a window of `num_samples`."""
        return chain_length(num_samples, self.chain)

    @property
    def parts(self) -> "Sequence[AudioEncoder]":
        """Itself; both, where two stand side by side."""
        return [self]

    @property
    def way(self) -> str:
        """How it is run, as part of every cache key: what neither its weights nor its configuration tell."""
        blocks = "" if self.blocks is None else f" in {self.blocks}"
        return f"{self.feature_extractor.name}{blocks}{' all layers' if self.mixes_layers else ''}"

    @abc.abstractmethod
    def frame_lengths(self, feature_lengths: Int[Tensor, " clip"]) -> Int[Tensor, " clip"]:
        """Frames of features of these lengths."""

    def forward(
        self, features: Float[Tensor, "clip channel time"], feature_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip frame hidden"], Int[Tensor, " clip"]]:
        """Frames, zero past each clip's length, and those lengths.

        Raises:
            AudioError: a clip that is too short or too long for this encoder.
        """
        if self.blocks is None:
            return self.encode(features, feature_lengths)
        lengths = self.frame_lengths(feature_lengths)
        cuts = [cut for clip, count in enumerate(lengths.tolist()) for cut in self.blocks.cuts(clip, count)]
        pieces, sizes = [], feature_lengths.tolist()
        for cut in cuts:
            end = sizes[cut.clip] if cut.is_last else cut.end * self.steps_per_frame + self.steps_around
            piece = features[cut.clip, :, cut.start * self.steps_per_frame : end]
            pieces.append(self.feature_extractor.finish(piece))
        piece_lengths = torch.tensor([piece.shape[-1] for piece in pieces], device=features.device)
        padded = nn.utils.rnn.pad_sequence([piece.T for piece in pieces], batch_first=True).transpose(1, 2)
        frames, _ = self.encode(padded, piece_lengths)
        return join(cuts, frames, lengths), lengths

    @abc.abstractmethod
    def encode(
        self, features: Float[Tensor, "clip channel time"], feature_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip frame hidden"], Int[Tensor, " clip"]]:
        """`forward` of whole clips, or of blocks as if they were clips."""

    def mix_layers(self, width: int, num_layers: int) -> None:
        """Give all layers' states side by side, each normalised, instead of the last one's."""
        self.mixes_layers, self.num_mixed = True, num_layers + 1
        self.hidden_size = width * self.num_mixed

    def _of_layers(self, states: Sequence[Tensor]) -> Tensor:
        """What a frame is made of: the last layer's states, or those of all side by side.

        Each is normalised, so that a weight in the mix says how much a layer counts, whatever its scale.
        """
        if not self.mixes_layers:
            return states[-1]
        return torch.cat([F.layer_norm(state, state.shape[-1:]) for state in states], dim=-1)


class WhisperAudioEncoder(AudioEncoder, WhisperEncoder):
    """Whisper's encoder with the weights and names of Hugging Face.

    On the true length; or, where `pad_audio` says so, on 30 s with silence behind each clip, as Whisper was trained.
    """

    frames_per_second = ENCODER_FRAMES_PER_SECOND
    chain = MEL_CHAIN
    min_samples = 1
    steps_per_frame = ENCODER_STRIDE
    conv1: nn.Conv1d
    conv2: nn.Conv1d
    embed_positions: nn.Embedding
    dropout: float

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.hidden_size = config.d_model
        self.feature_extractor: LogMel = LogMel(config.num_mel_bins)

    def pad_audio(self) -> None:
        """From now on, silence up to 30 s follows each clip."""
        self.feature_extractor = LogMel(self.feature_extractor.num_mel_bins, padded=True)

    def frame_lengths(self, feature_lengths: Int[Tensor, " clip"]) -> Int[Tensor, " clip"]:
        """Half the clip's own mel frames, rounded up."""
        return num_encoder_frames(feature_lengths - self.feature_extractor.tail)

    def encode(
        self, features: Float[Tensor, "clip channel time"], feature_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip frame hidden"], Int[Tensor, " clip"]]:
        """Log-mel features [clip, mel, frame] and their lengths in mel frames → frames at 50 a second."""
        limit: int = 2 * self.config.max_source_positions
        if features.shape[-1] - self.feature_extractor.tail > limit:
            raise AudioError(
                f"the audio encoder takes windows of at most {limit} mel frames, got {features.shape[-1]}: "
                "cut long audio with ultravox.audio.features.windows"
            )
        frame_lengths = self.frame_lengths(feature_lengths)
        if self.feature_extractor.padded:
            features = self._with_silence(features, feature_lengths, limit)
            feature_lengths = torch.full_like(feature_lengths, limit)
        features = features.to(self.conv1.weight.dtype)
        is_padded = bool((feature_lengths != features.shape[-1]).any())
        hidden = F.gelu(self.conv1(_zero_padding(features, feature_lengths) if is_padded else features))
        if is_padded:  # the second convolution must meet the zeros that it would meet at a clip's true end
            hidden = _zero_padding(hidden, feature_lengths)
        hidden = F.gelu(self.conv2(hidden)).transpose(1, 2)
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        hidden = F.dropout(hidden, p=self.dropout, training=self.training)

        mask = length_mask(num_encoder_frames(feature_lengths), hidden.shape[1])
        # [clip, 1, 1, frame] is broadcast inside SDPA; without padding its kernels run without any mask
        attention_mask = mask[:, None, None, :] if is_padded else None
        if attention_mask is not None and self.config._attn_implementation != "sdpa":
            attention_mask = torch.zeros_like(attention_mask, dtype=hidden.dtype).masked_fill(
                ~attention_mask, torch.finfo(hidden.dtype).min
            )
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
            states = [*states, hidden] if self.mixes_layers else [hidden]
        hidden = self._of_layers([*states[:-1], self.layer_norm(states[-1])])
        if self.feature_extractor.padded:
            hidden = hidden[:, : int(frame_lengths.max())]
            return hidden * length_mask(frame_lengths, hidden.shape[1])[..., None], frame_lengths
        if is_padded:
            hidden = hidden * mask[..., None]
        return hidden, frame_lengths

    def _with_silence(self, features: Tensor, lengths: Tensor, size: int) -> Tensor:
        """Each clip on `size` mel frames, silence behind it as it is in its own spectrogram."""
        found = []
        for clip, length in zip(features, lengths.tolist(), strict=True):
            own = clip[:, :length]
            filled = own.new_empty(own.shape[0], size).copy_(self.feature_extractor.silence(own).expand(1, size))
            filled[:, : min(length, size)] = own[:, :size]
            found.append(filled)
        return torch.stack(found)


def _zero_padding(features: Tensor, lengths: Tensor) -> Tensor:
    return features * length_mask(lengths, features.shape[-1])[:, None, :]


#: Kinds whose convolutions between the layers look into the padding, whatever mask they are given (transformers 5).
_LEAKY = ("data2vec-audio", "wav2vec2-conformer")


class WaveformAudioEncoder(AudioEncoder):
    """wav2vec 2.0 and its kin (`WAVEFORM_ENCODERS`): convolutions over the samples, then a Transformer."""

    def __init__(self, config: PretrainedConfig, *, normalize: bool = True):
        super().__init__()
        # Masking is ours to do (audio/augment.py); left on, it would also need clips longer than its masks.
        config.apply_spec_augment = False
        self.encoder = AutoModel.from_config(config)
        self.config = config
        self.hidden_size = config.hidden_size
        self.layers = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.min_samples = receptive_field(self.layers)
        self.chain = convolution_chain(self.layers)
        self.steps_per_frame = int(np.prod(config.conv_stride))
        self.steps_around = self.min_samples - self.steps_per_frame
        self.frames_per_second = SAMPLE_RATE // self.steps_per_frame
        self.feature_extractor = NormalizedWaveform(normalize=normalize)
        # A group norm over time sees the padding of the whole clip, so such encoders run clip by clip.
        has_group_norm = getattr(config, "feat_extract_norm", "layer") == "group"
        self.runs_one_by_one = has_group_norm or config.model_type in _LEAKY

    def frame_lengths(self, feature_lengths: Int[Tensor, " clip"]) -> Int[Tensor, " clip"]:
        """Frames that the convolutions leave."""
        lengths = [num_convolution_frames(length, self.layers) for length in feature_lengths.tolist()]
        return torch.tensor(lengths, device=feature_lengths.device)

    def encode(
        self, features: Float[Tensor, "clip channel time"], feature_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip frame hidden"], Int[Tensor, " clip"]]:
        """Samples [clip, 1, sample] and their lengths → frames, usually 50 a second.

        Raises:
            AudioError: a clip too short for the convolutions.
        """
        frame_lengths = self.frame_lengths(feature_lengths)
        if int(frame_lengths.min()) < 1:
            raise AudioError(f"{int(feature_lengths.min())} samples are too few for this audio encoder")
        samples = features[:, 0].to(self.encoder.dtype)
        if bool((feature_lengths == samples.shape[1]).all()):
            return self._run(samples), frame_lengths
        if self.runs_one_by_one:
            clips = zip(samples, feature_lengths.tolist(), strict=True)
            outputs = [self._run(clip[None, :length])[0] for clip, length in clips]
            return nn.utils.rnn.pad_sequence(outputs, batch_first=True), frame_lengths
        mask = length_mask(feature_lengths, samples.shape[1])
        hidden = self._run(samples, mask.long())
        return hidden * length_mask(frame_lengths, hidden.shape[1])[..., None], frame_lengths

    def _run(self, samples: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._of_layers(_states(self.encoder, samples, mask, all_layers=self.mixes_layers))


def _states(encoder: Any, inputs: Tensor, mask: Tensor | None, *, all_layers: bool) -> Sequence[Tensor]:
    """The last layer's states, or all layers', with what goes into the first one."""
    if not all_layers:
        return [encoder(inputs, attention_mask=mask).last_hidden_state]
    return encoder(inputs, attention_mask=mask, output_hidden_states=True).hidden_states


class Wav2Vec2BertAudioEncoder(AudioEncoder):
    """W2v-BERT 2.0: a Conformer over stacked filterbanks, one frame for each stack."""

    def __init__(self, config: PretrainedConfig, feature_extractor: StackedFilterbank | None = None):
        super().__init__()
        config.apply_spec_augment = False  # masking is ours to do (audio/augment.py)
        if config.add_adapter:
            raise ModelError("the encoder's own adapter shortens its frames once more: load one with add_adapter false")
        self.encoder = AutoModel.from_config(config)
        self.config = config
        self.hidden_size = config.hidden_size
        extractor = feature_extractor or StackedFilterbank()
        if config.feature_projection_input_dim != extractor.num_mel_bins * extractor.stride:
            raise ModelError(
                f"the encoder reads {config.feature_projection_input_dim} channels, its feature extractor gives "
                f"{extractor.num_mel_bins} × {extractor.stride}: take both from one checkpoint"
            )
        self.feature_extractor = extractor
        self.min_samples = extractor.min_samples
        self.chain = filterbank_chain(extractor.stride)
        self.steps_per_frame = 1
        self.frames_per_second = SAMPLE_RATE // HOP_LENGTH // extractor.stride

    def frame_lengths(self, feature_lengths: Int[Tensor, " clip"]) -> Int[Tensor, " clip"]:
        """As many as stacks."""
        return feature_lengths

    def encode(
        self, features: Float[Tensor, "clip channel time"], feature_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip frame hidden"], Int[Tensor, " clip"]]:
        """Stacked filterbanks and their lengths → frames, 50 a second."""
        inputs = features.transpose(1, 2).to(self.encoder.dtype)
        if bool((feature_lengths == inputs.shape[1]).all()):
            return self._run(inputs), feature_lengths
        mask = length_mask(feature_lengths, inputs.shape[1])
        hidden = self._run(inputs * mask[..., None], mask.long())
        return hidden * mask[..., None], feature_lengths

    def _run(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._of_layers(_states(self.encoder, inputs, mask, all_layers=self.mixes_layers))


def keep_layers(encoder: AudioEncoder, count: int) -> None:
    """Drop all but the first `count` Transformer layers: earlier layers of some encoders carry more of what is said.

    A norm that stands behind the last layer stands behind the last one kept. The configuration says how many are left,
    so that the checkpoint is an ordinary one of its kind.

    Raises:
        ModelError: there are not so many.
    """
    owner: Any = encoder if isinstance(encoder, WhisperAudioEncoder) else getattr(encoder.encoder, "encoder", None)
    have = len(owner.layers)
    if not 1 <= count <= have:
        raise ModelError(f"the audio encoder has {have} layers, so {count} cannot be kept: lower audio_encoder_layers")
    owner.layers = owner.layers[:count]
    for module in (encoder, getattr(encoder, "encoder", encoder)):
        config: Any = module.config
        config.num_hidden_layers = count  # Whisper's name for its encoder's layers, too
        if isinstance(encoder, WhisperAudioEncoder):
            config.encoder_layers = count


def encoder_from_config(config: PretrainedConfig) -> AudioEncoder:
    """A randomly initialised encoder of the kind that the configuration names.

    Raises:
        ModelError: a kind that no encoder here runs.
    """
    if config.model_type == "whisper":
        return WhisperAudioEncoder(config)
    if config.model_type == "wav2vec2-bert":
        return Wav2Vec2BertAudioEncoder(config)
    if config.model_type in ENCODERS:
        return WaveformAudioEncoder(config)
    raise ModelError(f"{config.model_type!r} is no audio encoder that is known here: expected {', '.join(ENCODERS)}")
