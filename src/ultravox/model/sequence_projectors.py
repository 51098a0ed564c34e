"""Projectors whose positions see more than their own frames: convolutions, a Transformer, a Q-Former.

Each masks what it looks at, so that padding is inert.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from ultravox.audio.lengths import num_audio_tokens
from ultravox.errors import DataError
from ultravox.model.audio_encoder import length_mask
from ultravox.model.downsample import Downsampling, downsample, downsampled_width, group_lengths, stack_frames
from ultravox.model.projector import NORM_INIT, Projector, RmsNorm, by_rows, scale_linear

INIT_STD = 0.02  # of the layers of a Transformer, as BERT and Whisper have it
HEAD_WIDTH = 64


def prime_factors(number: int) -> list[int]:
    """In rising order; [1] of 1."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors or [1]


class ConvProjector(Projector):
    """Strided convolutions over the frames, one for each prime factor of `stack_factor`, each with GELU; then linear.

    Each looks at its own group of frames and at one more on either side.
    """

    def __init__(self, encoder_width: int, hidden_size: int, output_width: int, stack_factor: int):
        super().__init__()
        self.stack_factor = stack_factor
        self.ln_pre = RmsNorm(encoder_width)
        self.strides = prime_factors(stack_factor)
        widths = [encoder_width] + [hidden_size] * (len(self.strides) - 1)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, hidden_size, stride + 2, stride)
            for width, stride in zip(widths, self.strides, strict=True)
        )
        self.ln_post = RmsNorm(hidden_size)
        self.linear_out = nn.Linear(hidden_size, output_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Convolutions keep the scale before GELU (He et al. 2015), the linear layer its own."""
        init.ones_(self.ln_pre.weight)
        init.constant_(self.ln_post.weight, NORM_INIT)
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            init.normal_(convolution.weight, std=(2 / (convolution.in_channels * (stride + 2))) ** 0.5)
            init.zeros_(convolution.bias)
        init.normal_(self.linear_out.weight, std=self.linear_out.in_features**-0.5)
        init.zeros_(self.linear_out.bias)

    def init_scale(self, rms: float) -> None:
        """See `Projector`."""
        scale_linear(self.linear_out, rms, NORM_INIT)

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """See `Projector`."""
        hidden = self.ln_pre(frames.to(self.linear_out.weight.dtype))
        if not hidden.numel():
            num_tokens = num_audio_tokens(frames.shape[1], self.stack_factor)
            hidden = hidden.new_zeros(len(frames), num_tokens, self.linear_out.in_features)
            return self.linear_out(hidden), self.token_lengths(frame_lengths)
        lengths = frame_lengths
        hidden = hidden * length_mask(lengths, hidden.shape[1])[..., None]
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            missing = -hidden.shape[1] % stride
            padded = F.pad(hidden.transpose(1, 2), (1, missing + 1))
            hidden = F.gelu(convolution(padded)).transpose(1, 2)
            lengths = num_audio_tokens(lengths, stride)
            hidden = hidden * length_mask(lengths, hidden.shape[1])[..., None]
        return by_rows(lambda rows: self.linear_out(self.ln_post(rows)), hidden.contiguous()), lengths


class Attention(nn.Module):
    """Softmax attention with several heads, no dropout. Names are those of Whisper's in transformers."""

    def __init__(self, width: int, num_heads: int, source_width: int | None = None, *, key_bias: bool = True):
        super().__init__()
        source = width if source_width is None else source_width
        self.num_heads = num_heads
        self.k_proj = nn.Linear(source, width, bias=key_bias)
        self.v_proj = nn.Linear(source, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch target width"],
        source: Float[Tensor, "batch source source_width"],
        mask: Bool[Tensor, "batch source"] | None = None,
    ) -> Float[Tensor, "batch target width"]:
        """Attend from `x` to `source` where `mask` is True (None = everywhere)."""
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        )
        bias = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Norm before attention and before the feed-forward part, GELU: Whisper's layer, with its names."""

    def __init__(self, width: int, num_heads: int, feed_forward_width: int):
        super().__init__()
        self.self_attn = Attention(width, num_heads, key_bias=False)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, feed_forward_width)
        self.fc2 = nn.Linear(feed_forward_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self, x: Float[Tensor, "clip token width"], mask: Bool[Tensor, "clip token"] | None
    ) -> Float[Tensor, "clip token width"]:
        """One layer; `mask` is True on a clip's own positions (None = all are)."""
        normed = self.self_attn_layer_norm(x)
        x = x + self.self_attn(normed, normed, mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


@torch.no_grad()
def _reset_layers(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            init.normal_(child.weight, std=INIT_STD)
        elif isinstance(child, nn.LayerNorm | RmsNorm):
            init.ones_(child.weight)
        if getattr(child, "bias", None) is not None:
            init.zeros_(child.bias)


class TransformerProjector(Projector):
    """RMSNorm → linear → positions → Transformer layers → RMSNorm → linear, on the downsampled frames.

    The layers have the encoder's width. With a Whisper encoder and stacked frames the parameters are named and formed
    as vLLM expects them of checkpoints with `num_projector_layers` (v0.7).
    """

    def __init__(
        self,
        encoder_width: int,
        output_width: int,
        stack_factor: int,
        *,
        num_layers: int,
        num_heads: int,
        feed_forward_width: int,
        max_positions: int,
        downsampling: Downsampling = "stack",
    ):
        super().__init__()
        self.stack_factor, self.downsampling = stack_factor, downsampling
        width = downsampled_width(encoder_width, stack_factor, downsampling)
        self.ln_pre = RmsNorm(width)
        self.linear_in = nn.Linear(width, encoder_width)
        self.embed_positions = nn.Embedding(max_positions, encoder_width)
        self.layers = nn.ModuleList(
            TransformerLayer(encoder_width, num_heads, feed_forward_width) for _ in range(num_layers)
        )
        self.ln_post = RmsNorm(encoder_width)
        self.linear_out = nn.Linear(encoder_width, output_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The first and the last linear layer keep the scale of what goes through them."""
        _reset_layers(self)
        init.constant_(self.ln_post.weight, NORM_INIT)
        for linear in (self.linear_in, self.linear_out):
            init.normal_(linear.weight, std=linear.in_features**-0.5)

    def init_scale(self, rms: float) -> None:
        """See `Projector`."""
        scale_linear(self.linear_out, rms, NORM_INIT)

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """See `Projector`. DataError when a clip has more positions than the table."""
        frames = frames.to(self.linear_in.weight.dtype)
        joined = downsample(frames, frame_lengths, self.stack_factor, self.downsampling, training=self.training)
        num_tokens = joined.shape[1]
        if num_tokens > self.embed_positions.num_embeddings:
            raise DataError(
                f"a window of {num_tokens} positions, but the projector's table has "
                f"{self.embed_positions.num_embeddings}: cut long audio with ultravox.audio.features.windows"
            )
        lengths = self.token_lengths(frame_lengths)
        mask = _visible(lengths, num_tokens)
        hidden = by_rows(lambda rows: self.linear_in(self.ln_pre(rows)), joined)
        hidden = hidden + self.embed_positions.weight[:num_tokens]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return by_rows(lambda rows: self.linear_out(self.ln_post(rows)), hidden), lengths


def _visible(lengths: Int[Tensor, " row"], size: int) -> Bool[Tensor, "row {size}"] | None:
    """The first `lengths` of `size` places; None = all, which kernels like better.

    Rows without any see everything, since a softmax over nothing is not a number.
    """
    mask = length_mask(lengths, size)
    return None if bool(mask.all()) else mask | (lengths == 0)[:, None]


class QFormerLayer(nn.Module):
    """BERT's layer with cross-attention between attention and feed-forward part, a norm after each."""

    def __init__(self, width: int, num_heads: int, source_width: int):
        super().__init__()
        self.self_attn = Attention(width, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.cross_attn = Attention(width, num_heads, source_width)
        self.cross_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Float[Tensor, "window query width"],
        source: Float[Tensor, "window frame channel"],
        mask: Bool[Tensor, "window frame"] | None,
    ) -> Float[Tensor, "window query width"]:
        """One layer; `mask` is True on the frames that are there (None = all are)."""
        x = self.self_attn_layer_norm(x + self.self_attn(x, x))
        x = self.cross_attn_layer_norm(x + self.cross_attn(x, source, mask))
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


def num_heads(width: int) -> int:
    """Of about `HEAD_WIDTH` channels each."""
    return next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)


class QFormerProjector(Projector):
    """A Q-Former on each window of frames (SALMONN: Tang et al. 2023, arXiv 2310.13289; Q-Former: arXiv 2301.12597).

    `num_queries` learned queries look at each window of `num_queries` × `stack_factor` frames and become that many
    positions. The last window, if it is shorter, gives as many of them as its frames would have: each sees all of it.
    """

    def __init__(
        self,
        encoder_width: int,
        hidden_size: int,
        output_width: int,
        stack_factor: int,
        *,
        num_layers: int,
        num_queries: int = 1,
    ):
        super().__init__()
        self.stack_factor = stack_factor
        self.ln_pre = nn.LayerNorm(encoder_width)
        self.queries = nn.Parameter(torch.zeros(num_queries, hidden_size))
        self.ln_queries = nn.LayerNorm(hidden_size)
        self.layers = nn.ModuleList(
            QFormerLayer(hidden_size, num_heads(hidden_size), encoder_width) for _ in range(num_layers)
        )
        self.linear_out = nn.Linear(hidden_size, output_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As BERT's layers; the last linear layer keeps the scale of what goes through it."""
        _reset_layers(self)
        init.normal_(self.queries, std=INIT_STD)
        init.normal_(self.linear_out.weight, std=self.linear_out.in_features**-0.5)

    def init_scale(self, rms: float) -> None:
        """See `Projector`."""
        scale_linear(self.linear_out, rms)

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """See `Projector`."""
        frames = self.ln_pre(frames.to(self.linear_out.weight.dtype))
        num_clips, num_frames, num_channels = frames.shape
        num_queries = len(self.queries)
        size = num_queries * self.stack_factor
        stacked = stack_frames(frames, size)
        num_windows = stacked.shape[1]
        windows = stacked.reshape(num_clips * num_windows, size, num_channels)
        mask = _visible(group_lengths(frame_lengths, num_windows, size).flatten(), size)
        hidden = self.ln_queries(self.queries).expand(len(windows), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, windows, mask)
        hidden = hidden.reshape(num_clips, num_windows * num_queries, hidden.shape[-1])
        hidden = hidden[:, : num_audio_tokens(num_frames, self.stack_factor)]
        return by_rows(self.linear_out, hidden), self.token_lengths(frame_lengths)


def feed_forward_width(config: object, width: int) -> int:
    """Of the layers of an encoder with this configuration; four times its width where it does not say."""
    for name in ("encoder_ffn_dim", "intermediate_size"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return 4 * width
