"""Projectors that see one position at a time; that of the public v0.5 checkpoints is the default.

Swiglu (v0.5): frames of a position → RMSNorm → linear → SwiGLU → RMSNorm → linear. Those that look at the positions
beside it are in `sequence_projectors.py`.
"""

import abc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from ultravox.audio.lengths import num_audio_tokens
from ultravox.model.downsample import Downsampling, downsample, downsampled_width
from ultravox.model.kernels import fill_rows

#: First weight of a norm, as in the public checkpoints: what comes after it is moved less by a step of the optimizer.
NORM_INIT = 0.4


class Projector(nn.Module, abc.ABC):
    """From encoder frames to language model embeddings, `num_audio_tokens(frames, stack_factor)` of them.

    A clip's embeddings depend neither on the others in its batch nor on padding.
    """

    stack_factor: int
    compresses = False
    """Whether clips have fewer positions than `token_lengths` says, depending on what is heard."""

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Fresh weights, through `transformers.initialization`, which leaves those that were loaded alone."""

    @abc.abstractmethod
    def init_scale(self, rms: float) -> None:
        """Rescale the last layer of a fresh projector so that its output has the root mean square `rms`.

        With the language model's own embedding scale, the first audio embeddings are as loud as words are.
        """

    @abc.abstractmethod
    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """Project. Frames past a clip's length must be zero: they are what the last group is padded with."""

    def token_lengths(self, frame_lengths: Int[Tensor, " clip"]) -> Int[Tensor, " clip"]:
        """Positions of clips of so many frames; the most that there can be where it `compresses`."""
        return num_audio_tokens(frame_lengths, self.stack_factor)


def by_rows(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "clip token channel"]
) -> Float[Tensor, "clip token hidden"]:
    """A function of each position by itself, in numbers of rows that the matrix kernels like."""
    rows = function(fill_rows(x.flatten(0, 1)))[: x.shape[0] * x.shape[1]]
    return rows.view(*x.shape[:2], rows.shape[-1])


@torch.no_grad()
def scale_linear(linear: nn.Linear, rms: float, input_rms: float = 1.0) -> None:
    """Draw a fresh last layer anew, so that it gives the root mean square `rms` for inputs of `input_rms`."""
    nn.init.normal_(linear.weight, std=rms / (input_rms * linear.in_features**0.5))


class RmsNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch channel"]:
        """Divide by the root mean square over the last axis, times the weight."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def swiglu(x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch half_channel"]:
    """The FIRST half times silu of the SECOND, as the public checkpoints have it."""
    first, second = x.chunk(2, dim=-1)
    return first * F.silu(second)


class SwigluProjector(Projector):
    """The one of the public checkpoints, which other programs read too.

    Args:
        encoder_width: channels of an encoder frame.
        hidden_size: width of the first linear layer, even.
        output_width: the language model's hidden size.
        stack_factor: frames per position.
        ln_mid: norm between the layers (v0.5 and later) or after both.
        norm_init: first weight of the norms.
        downsampling: how the frames of a position become one.
    """

    def __init__(
        self,
        encoder_width: int,
        hidden_size: int,
        output_width: int,
        stack_factor: int,
        *,
        ln_mid: bool = True,
        norm_init: float = NORM_INIT,
        downsampling: Downsampling = "stack",
    ):
        super().__init__()
        self.stack_factor, self.norm_init, self.downsampling = stack_factor, norm_init, downsampling
        width = downsampled_width(encoder_width, stack_factor, downsampling)
        self.ln_pre = RmsNorm(width)
        self.linear_1 = nn.Linear(width, hidden_size, bias=False)
        self.linear_2 = nn.Linear(hidden_size // 2, output_width, bias=False)
        self.ln_mid = RmsNorm(hidden_size // 2) if ln_mid else nn.Identity()
        self.ln_post = nn.Identity() if ln_mid else RmsNorm(output_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Norms at `norm_init`; linear layers normal, keeping the scale of what goes through them."""
        for linear in (self.linear_1, self.linear_2):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
        for norm in (self.ln_pre, self.ln_mid, self.ln_post):
            if isinstance(norm, RmsNorm):
                init.constant_(norm.weight, self.norm_init)

    @torch.no_grad()
    def init_scale(self, rms: float) -> None:
        """See `Projector`."""
        if isinstance(self.ln_post, RmsNorm):
            self.ln_post.weight.fill_(rms)
        else:
            nn.init.normal_(self.linear_2.weight, std=rms / (self.norm_init * self.linear_2.in_features**0.5))

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """See `Projector`."""
        frames = frames.to(self.linear_1.weight.dtype)
        joined = downsample(frames, frame_lengths, self.stack_factor, self.downsampling, training=self.training)
        return by_rows(self._project, joined), self.token_lengths(frame_lengths)

    def _project(self, rows: Tensor) -> Tensor:
        hidden = self.ln_mid(swiglu(self.linear_1(self.ln_pre(rows))))
        return self.ln_post(self.linear_2(hidden))


class LinearProjector(Projector):
    """RMSNorm and one linear layer: the norm, so that any encoder's frames come out as loud as words are."""

    def __init__(
        self, encoder_width: int, output_width: int, stack_factor: int, *, downsampling: Downsampling = "stack"
    ):
        super().__init__()
        self.stack_factor, self.downsampling = stack_factor, downsampling
        width = downsampled_width(encoder_width, stack_factor, downsampling)
        self.ln_pre = RmsNorm(width)
        self.linear = nn.Linear(width, output_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The linear layer keeps the scale of what goes through it."""
        init.constant_(self.ln_pre.weight, NORM_INIT)
        init.normal_(self.linear.weight, std=self.linear.in_features**-0.5)
        init.zeros_(self.linear.bias)

    def init_scale(self, rms: float) -> None:
        """See `Projector`."""
        scale_linear(self.linear, rms, NORM_INIT)

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """See `Projector`."""
        frames = frames.to(self.linear.weight.dtype)
        joined = downsample(frames, frame_lengths, self.stack_factor, self.downsampling, training=self.training)
        return by_rows(lambda rows: self.linear(self.ln_pre(rows)), joined), self.token_lengths(frame_lengths)


class MlpProjector(Projector):
    """LayerNorm, linear, ReLU, LayerNorm, linear, with the small initialisation of Nguyen and Salazar 2019.

    arXiv 1910.05895: a normal distribution of standard deviation √(2 / 5d), d = channels that go into the layer.
    """

    def __init__(
        self,
        encoder_width: int,
        hidden_size: int,
        output_width: int,
        stack_factor: int,
        *,
        downsampling: Downsampling = "stack",
    ):
        super().__init__()
        self.stack_factor, self.downsampling = stack_factor, downsampling
        width = downsampled_width(encoder_width, stack_factor, downsampling)
        self.ln_1 = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, hidden_size)
        self.ln_2 = nn.LayerNorm(hidden_size)
        self.linear_2 = nn.Linear(hidden_size, output_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Small initialisation."""
        for norm in (self.ln_1, self.ln_2):
            init.ones_(norm.weight)
            init.zeros_(norm.bias)
        for linear in (self.linear_1, self.linear_2):
            init.normal_(linear.weight, std=(2 / (5 * linear.in_features)) ** 0.5)
            init.zeros_(linear.bias)

    def init_scale(self, rms: float) -> None:
        """See `Projector`."""
        scale_linear(self.linear_2, rms)

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """See `Projector`."""
        frames = frames.to(self.linear_1.weight.dtype)
        joined = downsample(frames, frame_lengths, self.stack_factor, self.downsampling, training=self.training)
        return by_rows(self._project, joined), self.token_lengths(frame_lengths)

    def _project(self, rows: Tensor) -> Tensor:
        return self.linear_2(self.ln_2(F.relu(self.linear_1(self.ln_1(rows)))))
