"""Rotary position embedding and attention of Llama's kind in one step, for training short sequences on a CPU.

Composed operations turn, negate, join, scale, transpose and copy the queries and keys one after the other, forwards and
backwards. Here each is turned straight into the layout that the matrix products want, the scale folded into the turn.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ultravox.model.kernels import attend, attend_backward


def _turn(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """[batch, token, head · width] → rotated (Su et al. 2021, arXiv 2104.09864), [batch, head, token, width].

    `cos` and `sin` are [batch or 1, 1, token, width / 2]: both halves of a head turn by the same angles.
    """
    batch, tokens, _ = x.shape
    split = x.view(batch, tokens, heads, -1).transpose(1, 2)
    out = x.new_empty(split.shape)
    (first, second), (first_out, second_out) = split.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin)
    return out


def _turn_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `_turn`: [batch, head, token, width] → [batch, token, head · width]."""
    batch, heads, tokens, width = gradient.shape
    out = gradient.new_empty(batch, tokens, heads, width)
    (first, second), (first_out, second_out) = gradient.chunk(2, -1), out.transpose(1, 2).chunk(2, -1)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin, value=-1)
    return out.view(batch, tokens, heads * width)


class _RotaryAttention(torch.autograd.Function):
    """Projections [batch, token, head · width] → attended values of the same form. Grouped keys are never repeated."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor | None,
        width: int,
        scale: float,
    ) -> Tensor:
        batch, tokens, _ = query.shape
        heads, groups = query.shape[-1] // width, key.shape[-1] // width
        cos, sin = cos[:, None, :, : width // 2], sin[:, None, :, : width // 2]
        q = _turn(query, cos * scale, sin * scale, heads).view(batch * groups, -1, width)
        k = _turn(key, cos, sin, groups).view(batch * groups, tokens, width)
        v = value.view(batch, tokens, groups, width).transpose(1, 2).reshape(batch * groups, tokens, width)
        output, weights = attend(q, k, v, None if bias is None else bias.expand(batch, -1, -1, -1), heads)
        ctx.save_for_backward(q, k, v, weights, cos, sin)
        ctx.shape, ctx.scale = (batch, heads, groups, tokens, width), scale
        return output.view(batch, heads, tokens, width).transpose(1, 2).reshape(batch, tokens, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, cos, sin = ctx.saved_tensors
        batch, heads, groups, tokens, width = ctx.shape
        gradient = gradients[0].reshape(batch, tokens, heads, width).transpose(1, 2)
        gradient = gradient.reshape(batch * groups, -1, width)
        query_gradient, key_gradient, value_gradient = attend_backward(gradient, q, k, v, weights)
        query_gradient = query_gradient.view(batch, heads, tokens, width)
        key_gradient = key_gradient.view(batch, groups, tokens, width)
        value_gradient = value_gradient.view(batch, groups, tokens, width).transpose(1, 2).reshape(batch, tokens, -1)
        return (
            _turn_back(query_gradient, cos * ctx.scale, sin * ctx.scale),
            _turn_back(key_gradient, cos, sin),
            value_gradient,
            *[None] * 5,
        )


class FastAttention(nn.Module):
    """Llama's attention layer through `_RotaryAttention` while it trains; with a cache it computes as before."""

    head_dim: int
    scaling: float
    plain_forward: Any

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [batch, token, hidden] and their angles; `attention_mask` is added to the scores."""
        is_plain = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32
        has_bias = attention_mask is not None and attention_mask.is_floating_point()
        if not (self.training and is_plain and has_bias and past_key_values is None):
            return self.plain_forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
        projections = [getattr(self, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj")]
        output = _RotaryAttention.apply(*projections, *position_embeddings, attention_mask, self.head_dim, self.scaling)
        return self.o_proj(output), None


def use_fast_attention(module: nn.Module) -> None:
    """Let each Llama attention layer inside train through `_RotaryAttention`. Parameters and names stay."""
    for child in module.modules():
        kind = type(child)
        if kind.__name__ == "LlamaAttention" and not getattr(child, "attention_dropout", 0.0):
            child.__class__ = type(kind.__name__, (FastAttention, kind), {"plain_forward": staticmethod(kind.forward)})
