"""The projector of the public v0.5 checkpoints: stacked frames → RMSNorm → linear → SwiGLU → RMSNorm → linear."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization as init

from ultravox.audio.lengths import num_audio_tokens
from ultravox.model.downsample import stack_frames
from ultravox.model.kernels import fill_rows


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


class SwigluProjector(nn.Module):
    """Encoder frames to language model embeddings.

    Args:
        encoder_width: channels of an encoder frame.
        hidden_size: width of the first linear layer, even.
        output_width: the language model's hidden size.
        stack_factor: frames per position.
        ln_mid: norm between the layers (v0.5 and later) or after both.
        norm_init: first weight of the norms.
    """

    def __init__(
        self,
        encoder_width: int,
        hidden_size: int,
        output_width: int,
        stack_factor: int,
        *,
        ln_mid: bool = True,
        norm_init: float = 0.4,
    ):
        super().__init__()
        self.stack_factor, self.norm_init = stack_factor, norm_init
        self.ln_pre = RmsNorm(encoder_width * stack_factor)
        self.linear_1 = nn.Linear(encoder_width * stack_factor, hidden_size, bias=False)
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
        """Rescale the last layer of a fresh projector so that its output has the root mean square `rms`.

        With the language model's own embedding scale, the first audio embeddings are as loud as words are.
        """
        if isinstance(self.ln_post, RmsNorm):
            self.ln_post.weight.fill_(rms)
        else:
            nn.init.normal_(self.linear_2.weight, std=rms / (self.norm_init * self.linear_2.in_features**0.5))

    def forward(
        self, frames: Float[Tensor, "clip frame channel"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token hidden"], Int[Tensor, " clip"]]:
        """Project. Frames past a clip's length must be zero: they are what the last stack is padded with."""
        stacked = stack_frames(frames.to(self.linear_1.weight.dtype), self.stack_factor)
        rows = fill_rows(stacked.flatten(0, 1))
        hidden = self.ln_mid(swiglu(self.linear_1(self.ln_pre(rows))))
        projected = self.ln_post(self.linear_2(hidden))[: stacked.shape[0] * stacked.shape[1]]
        return projected.view(*stacked.shape[:2], projected.shape[-1]), num_audio_tokens(
            frame_lengths, self.stack_factor
        )
