"""Every projector but SwiGLU's (`projector.py`), and the one place that builds them.

Each takes encoder frames that are zero past their lengths, and gives `num_audio_tokens(frames, k)` positions.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from ultravox.audio.lengths import num_audio_tokens
from ultravox.model.configuration import UltravoxConfig
from ultravox.model.downsample import Downsample, stack_frames
from ultravox.model.projector import SwigluProjector

DEFAULT_LAYERS = 2  # of the transformer and the Q-Former
HEAD_SIZE = 64


def valid_frames(lengths: Int[Tensor, " clip"], width: int) -> Tensor:
    """True where a clip has a frame, bool [clip, frame]."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


class Projector(nn.Module):
    """What the projectors here have in common: the last layer reads a normed state, so its scale is known.

    Subclasses define `norm_out` (LayerNorm) and `linear_out`, and `positions`.
    """

    norm_out: nn.LayerNorm
    linear_out: nn.Linear
    stack_factor: int

    def reset_parameters(self) -> None:
        """Linear layers and convolutions normal, keeping the scale of what goes through; norms 1; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                init.normal_(module.in_proj_weight, std=module.embed_dim**-0.5)
                init.zeros_(module.in_proj_bias)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)

    @torch.no_grad()
    def init_scale(self, rms: float) -> None:
        """Rescale the last layer of a fresh projector so that its output has the root mean square `rms`."""
        nn.init.normal_(self.linear_out.weight, std=rms * self.linear_out.in_features**-0.5)

    def positions(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        """What the last norm reads, [clip, token, channel]."""
        raise NotImplementedError

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """Project. Frames past a clip's length must be zero."""
        frame_lengths = frame_lengths.to(frames.device)
        states = self.positions(frames.to(self.linear_out.weight.dtype), frame_lengths)
        return self.linear_out(self.norm_out(states)), num_audio_tokens(frame_lengths, self.stack_factor)


class LinearProjector(Projector):
    """LayerNorm and one linear layer."""

    def __init__(self, encoder_width: int, output_width: int, downsample: Downsample):
        super().__init__()
        self.stack_factor, self.downsample = downsample.stack_factor, downsample
        width = downsample.width(encoder_width)
        self.norm_out, self.linear_out = nn.LayerNorm(width), nn.Linear(width, output_width)
        self.reset_parameters()

    def positions(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        """See `Projector`."""
        return self.downsample(frames, frame_lengths)


class MlpProjector(Projector):
    """LayerNorm, linear, ReLU, LayerNorm, linear; "small" init (Nguyen and Salazar 2019, arXiv 1910.05895)."""

    def __init__(self, encoder_width: int, hidden_size: int, output_width: int, downsample: Downsample):
        super().__init__()
        self.stack_factor, self.downsample = downsample.stack_factor, downsample
        width = downsample.width(encoder_width)
        self.norm_in, self.linear_in = nn.LayerNorm(width), nn.Linear(width, hidden_size)
        self.norm_out, self.linear_out = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, output_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers normal with standard deviation sqrt(2 / (5 · inputs))."""
        super().reset_parameters()
        for linear in (self.linear_in, self.linear_out):
            init.normal_(linear.weight, std=math.sqrt(2 / (5 * linear.in_features)))

    def positions(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        """See `Projector`."""
        return F.relu(self.linear_in(self.norm_in(self.downsample(frames, frame_lengths))))


class ConvProjector(Projector):
    """A convolution over three frames, one over k frames with stride k, and a linear layer."""

    def __init__(self, encoder_width: int, hidden_size: int, output_width: int, stack_factor: int):
        super().__init__()
        self.stack_factor = stack_factor
        self.norm_in = nn.LayerNorm(encoder_width)
        self.conv_1 = nn.Conv1d(encoder_width, hidden_size, 3, padding=1)
        self.conv_2 = nn.Conv1d(hidden_size, hidden_size, stack_factor, stride=stack_factor)
        self.norm_out, self.linear_out = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, output_width)
        self.reset_parameters()

    def positions(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        """See `Projector`."""
        valid = valid_frames(frame_lengths, frames.shape[1])[:, :, None]
        states = self.norm_in(frames) * valid  # the norm's bias would be heard past the end
        states = F.gelu(self.conv_1(states.transpose(1, 2))).transpose(1, 2) * valid
        missing = -states.shape[1] % self.stack_factor
        return F.gelu(self.conv_2(F.pad(states, (0, 0, 0, missing)).transpose(1, 2))).transpose(1, 2)


class TransformerProjector(Projector):
    """A linear layer and transformer layers over all positions of a window, each of which sees the others."""

    def __init__(
        self, encoder_width: int, hidden_size: int, output_width: int, downsample: Downsample, num_layers: int
    ):
        super().__init__()
        self.stack_factor, self.downsample = downsample.stack_factor, downsample
        width = downsample.width(encoder_width)
        self.norm_in, self.linear_in = nn.LayerNorm(width), nn.Linear(width, hidden_size)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size,
                num_heads(hidden_size),
                4 * hidden_size,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.norm_out, self.linear_out = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, output_width)
        self.reset_parameters()

    def positions(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        """See `Projector`."""
        states = self.linear_in(self.norm_in(self.downsample(frames, frame_lengths)))
        states = states + sinusoids(states.shape[1], states.shape[2]).to(states)
        counts = num_audio_tokens(frame_lengths, self.stack_factor).clamp(min=1)  # a row of padding alone would be NaN
        padding = ~valid_frames(counts, states.shape[1])
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=padding)
        return states


class QFormerProjector(Projector):
    """A learned query for each window of k frames, which reads them by cross-attention.

    The window-level Q-Former of SALMONN (Tang et al. 2023, arXiv 2310.13289), with one query a window.
    """

    def __init__(self, encoder_width: int, hidden_size: int, output_width: int, stack_factor: int, num_layers: int):
        super().__init__()
        self.stack_factor = stack_factor
        self.norm_in, self.linear_in = nn.LayerNorm(encoder_width), nn.Linear(encoder_width, hidden_size)
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.places = nn.Parameter(torch.empty(stack_factor, hidden_size))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                hidden_size,
                num_heads(hidden_size),
                4 * hidden_size,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.norm_out, self.linear_out = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, output_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `Projector`; the query and the places in a window are normal, 0.02 (as in BERT)."""
        super().reset_parameters()
        init.normal_(self.query, std=0.02)
        init.normal_(self.places, std=0.02)

    def positions(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        """See `Projector`."""
        k = self.stack_factor
        valid = stack_frames(valid_frames(frame_lengths, frames.shape[1])[:, :, None].float(), k) > 0
        windows = stack_frames(self.linear_in(self.norm_in(frames)), k).unflatten(2, (k, -1)) + self.places
        num_clips, num_tokens, _, width = windows.shape
        padding = ~valid.flatten(0, 1)
        padding[padding.all(1)] = False  # windows past the end: read, and thrown away
        states = self.query.expand(num_clips * num_tokens, 1, width)
        for layer in self.layers:
            states = layer(states, windows.flatten(0, 1), memory_key_padding_mask=padding)
        return states.view(num_clips, num_tokens, width)


def sinusoids(length: int, width: int) -> Float[Tensor, "position channel"]:
    """Fixed positions, sines in the first half of the channels and cosines in the second, as in Whisper."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) / max(1, half - 1) * torch.arange(half))
    angles = torch.arange(length)[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width - 2 * half))


def num_heads(hidden_size: int) -> int:
    """Attention heads of a layer: 64 channels each where that divides the width, else as few as possible more."""
    heads = max(1, hidden_size // HEAD_SIZE)
    while hidden_size % heads:
        heads += 1
    return heads


def build_projector(config: UltravoxConfig, encoder_width: int) -> Any:
    """The fresh projector that a model configuration asks for."""
    kind, hidden, output, k = config.projector, config.hidden_size, config.text_config.hidden_size, config.stack_factor
    downsampling: Any = config.downsampling
    downsample = Downsample(downsampling, k)
    if kind == "linear":
        return LinearProjector(encoder_width, output, downsample)
    if kind == "mlp":
        return MlpProjector(encoder_width, hidden, output, downsample)
    if kind == "conv":
        return ConvProjector(encoder_width, hidden, output, k)
    if kind == "transformer":
        return TransformerProjector(encoder_width, hidden, output, downsample, config.num_projector_layers)
    if kind == "qformer":
        return QFormerProjector(encoder_width, hidden, output, k, config.num_projector_layers)
    return SwigluProjector(
        encoder_width,
        hidden,
        output,
        k,
        ln_mid=config.projector_ln_mid,
        norm_init=config.projector_init_value,
        downsample=None if config.downsampling == "stack" else downsample,
    )
