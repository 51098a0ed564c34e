"""Rotary position embedding and attention of Llama's kind in one step, for training short sequences on a CPU.

Composed operations turn, negate, join, scale, transpose and copy the queries and keys one after the other, forwards and
backwards. Here each is turned straight into the layout that the matrix products want, the scale folded into the turn.

And padding is only where attention needs it: everything else in the model works row by row, on the packed rows of a
batch. Filled up to one of few numbers of rows, they fit into the memory that a step before has freed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ultravox.model.adapters import project_together
from ultravox.model.kernels import ROWS_MULTIPLE, attend, attend_backward, attention_weights, register_attention

#: The weights of longer sequences are computed again in the backward pass: kept, they would be most of its memory.
MAX_KEPT_TOKENS = 128

#: Attention layers that pass nothing but scaled queries, keys, values and a mask on: no soft cap, no sinks.
_PLAIN_ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the rows of a batch of right-padded sequences are, padded and packed one after the other."""

    batch: int
    tokens: int
    """Of the longest sequence."""
    num_rows: int
    """Real ones; the packed tensors have a few more, up to a multiple of `ROWS_MULTIPLE`."""
    to_packed: Tensor
    """Padded position of each packed row, [packed row]; the rows that fill up repeat position 0."""
    to_padded: Tensor
    """Packed row of each padded position, [batch · token]; padding repeats row 0."""

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """From a mask [batch, token], True at the real positions, which start each row."""
        places = mask.reshape(-1).nonzero().squeeze(1)
        to_padded = (mask.reshape(-1).cumsum(0) - 1).masked_fill_(~mask.reshape(-1), 0)
        num_rows = len(places)
        filling = places.new_zeros(-num_rows % ROWS_MULTIPLE)
        return cls(len(mask), mask.shape[1], num_rows, torch.cat([places, filling]), to_padded)

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, token, channel] → [1, packed row, channel]."""
        return padded.reshape(-1, padded.shape[-1]).index_select(0, self.to_packed)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, packed row, channel] → [batch, token, channel]; what stands at padding is some other row."""
        return packed[0].index_select(0, self.to_padded).view(self.batch, self.tokens, -1)

    def pack_gradient(self, padded: Tensor) -> Tensor:
        """The gradient of `unpack` where that of the padding is zero."""
        packed = self.pack(padded)
        packed[0, self.num_rows :] = 0
        return packed

    def unpack_gradient(self, packed: Tensor) -> Tensor:
        """The gradient of `pack` where that of the rows that fill up is zero."""
        padded = packed.new_zeros(self.batch * self.tokens, packed.shape[-1])
        padded.index_copy_(0, self.to_packed[: self.num_rows], packed[0, : self.num_rows])
        return padded.view(self.batch, self.tokens, -1)

    def arguments(self, like: Tensor) -> dict[str, Any]:
        """What a language model with `use_fast_attention` is called with, beside the packed rows."""
        positions = torch.arange(self.tokens, device=like.device).repeat(self.batch)
        bias = like.new_full((1, 1, self.tokens, self.tokens), torch.finfo(like.dtype).min).triu_(1)
        return {"position_ids": positions[self.to_packed][None], "attention_mask": bias, "packing": self}


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
    """Projections [batch, token, head · width] → attended values of the same form. Grouped keys are never repeated.

    With a `packing`, all of them are packed, and so are the angles.
    """

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
        packing: Packing | None = None,
    ) -> Tensor:
        if packing is not None:
            query, key, value, cos, sin = (packing.unpack(tensor) for tensor in (query, key, value, cos, sin))
        batch, tokens, _ = query.shape
        heads, groups = query.shape[-1] // width, key.shape[-1] // width
        cos, sin = cos[:, None, :, : width // 2], sin[:, None, :, : width // 2]
        q = _turn(query, cos * scale, sin * scale, heads).view(batch * groups, -1, width)
        k = _turn(key, cos, sin, groups).view(batch * groups, tokens, width)
        v = value.view(batch, tokens, groups, width).transpose(1, 2).reshape(batch * groups, tokens, width)
        bias = None if bias is None else bias.expand(batch, -1, -1, -1)
        output, weights = attend(q, k, v, bias, heads)
        ctx.save_for_backward(q, k, v, cos, sin, *([weights] if tokens <= MAX_KEPT_TOKENS else []))
        ctx.bias = None if tokens <= MAX_KEPT_TOKENS else bias
        ctx.shape, ctx.scale, ctx.packing = (batch, heads, groups, tokens, width), scale, packing
        output = output.view(batch, heads, tokens, width).transpose(1, 2).reshape(batch, tokens, -1)
        return output if packing is None else packing.pack(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, *kept = ctx.saved_tensors
        batch, heads, groups, tokens, width = ctx.shape
        weights = kept[0] if kept else attention_weights(q, k, ctx.bias, heads)
        gradient = gradients[0] if ctx.packing is None else ctx.packing.unpack_gradient(gradients[0])
        gradient = gradient.reshape(batch, tokens, heads, width).transpose(1, 2)
        gradient = gradient.reshape(batch * groups, -1, width)
        query_gradient, key_gradient, value_gradient = attend_backward(gradient, q, k, v, weights)
        query_gradient = query_gradient.view(batch, heads, tokens, width)
        key_gradient = key_gradient.view(batch, groups, tokens, width)
        value_gradient = value_gradient.view(batch, groups, tokens, width).transpose(1, 2).reshape(batch, tokens, -1)
        found = (
            _turn_back(query_gradient, cos * ctx.scale, sin * ctx.scale),
            _turn_back(key_gradient, cos, sin),
            value_gradient,
        )
        if ctx.packing is not None:
            found = tuple(ctx.packing.pack_gradient(gradient) for gradient in found)
        return *found, *[None] * 6


class FastAttention(nn.Module):
    """Llama's attention layer through `_RotaryAttention` while it trains; with a cache it computes as before."""

    head_dim: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    plain_forward: Any

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [batch, token, hidden] and their angles; `attention_mask` is added to the scores.

        With a `packing`, [1, packed row, hidden] and the packed rows' angles; the mask is the padded sequences'.
        """
        is_plain = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32
        has_bias = attention_mask is not None and attention_mask.is_floating_point()
        if not (self.training and is_plain and has_bias and past_key_values is None):
            if packing is not None:
                raise ValueError("packed rows are for training in float32 on a CPU, with an additive mask")
            return self.plain_forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
        projections = project_together([self.q_proj, self.k_proj, self.v_proj], hidden_states)
        output = _RotaryAttention.apply(
            *projections, *position_embeddings, attention_mask, self.head_dim, self.scaling, packing
        )
        return self.o_proj(output), None


def use_short_attention(language_model: Any) -> None:
    """Let a language model compute its attention by `short_attention`; one whose kind is not known keeps its own."""
    layers = _attention_layers(language_model)
    if layers and all(type(layer).__name__ in _PLAIN_ATTENTIONS and not layer.attention_dropout for layer in layers):
        language_model.set_attn_implementation(register_attention())


def use_fast_attention(module: nn.Module) -> None:
    """Let each Llama attention layer inside train through `_RotaryAttention`. Parameters and names stay."""
    for child in module.modules():
        kind = type(child)
        is_plain = kind.__name__ == "LlamaAttention" and not isinstance(child, FastAttention)
        if is_plain and not getattr(child, "attention_dropout", 0.0):
            child.__class__ = type(kind.__name__, (FastAttention, kind), {"plain_forward": staticmethod(kind.forward)})


def takes_packed_rows(language_model: nn.Module) -> bool:
    """Whether every attention layer inside is a `FastAttention`, ready to train on packed rows."""
    layers = _attention_layers(language_model)
    return bool(layers) and all(isinstance(child, FastAttention) for child in layers)


def _attention_layers(language_model: nn.Module) -> list[Any]:
    return [child for child in language_model.modules() if type(child).__name__.endswith("Attention")]
