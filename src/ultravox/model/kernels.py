"""The arithmetic that training on a CPU spends its time in: linear layers and attention.

PyTorch sends a float32 ``linear`` to MKL, which picks slow kernels on processors that are not Intel's; oneDNN, which
PyTorch also carries, compiles its own for what the processor has. ``benchmarks/matmul.py`` measures both. Everywhere
else (CUDA, other dtypes, builds without oneDNN) these functions are plain PyTorch.
"""

import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

ATTENTION_NAME = "ultravox_cpu"


def uses_onednn(tensor: Tensor) -> bool:
    """Whether `linear` takes the oneDNN way for this input."""
    if torch.compiler.is_compiling():
        return False  # the compiler has products of its own
    return _HAS_ONEDNN and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0


def matmul_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T (+ bias)`` in float32 on a CPU, x [row, in], weight [out, in]; no gradient is recorded."""
    return _compiled(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


#: oneDNN compiles a product anew for each number of rows, and keeps half a megabyte of it; so they come in multiples.
ROWS_MULTIPLE = 32

#: So many compiled products are kept (oneDNN's own choice is 1024): a step needs about 30 for each number of rows, and
#: compiling one takes less than a millisecond, but all of 1024 would take half a gigabyte of addresses.
MAX_COMPILED = 128


def bound_compiled() -> None:
    """Let oneDNN keep no more than `MAX_COMPILED`, if nobody has said otherwise. It asks once, before its first one."""
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(MAX_COMPILED))


def _compiled(product: Callable[[], Tensor]) -> Tensor:
    """What a product gives that oneDNN may have to compile first.

    Once compiling has failed in a thread, since there was no memory, it fails there for good: the compiler (Xbyak)
    keeps its first error, and nobody clears it. A fresh thread has none, and what it compiles is kept for all.
    """
    try:
        return product()
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
    return _in_fresh_thread(product)


#: Stack of a fresh thread, room for what it compiles, and the stack of each thread that helps it, of the system's size
#: and as a rule this large: those end the process if they find no room.
_STACK_BYTES, _COMPILED_BYTES, _HELPER_BYTES = 4 << 20, 2 << 20, 9 << 20


def _in_fresh_thread(function: Callable[[], Tensor]) -> Tensor:
    """What a function gives, or its error. MemoryError where there is no room for the threads."""
    results: list[Tensor] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                results.append(function())
        except BaseException as error:
            errors.append(error)

    try:
        mmap.mmap(-1, _STACK_BYTES + _COMPILED_BYTES + _HELPER_BYTES * (torch.get_num_threads() - 1)).close()
    except OSError as error:
        raise MemoryError("no room to compile a product") from error
    usual = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def fill_rows(rows: Tensor) -> Tensor:
    """Rows [row, channel] with zeros after them, up to a multiple of `ROWS_MULTIPLE` where oneDNN is used."""
    missing = -len(rows) % ROWS_MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing and uses_onednn(rows) else rows


def add_matmul_transposed(other: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``other + x @ weight.T`` in one pass over the result, as `matmul_transposed`; other [row, out]."""
    return _compiled(lambda: torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add"))


class _Linear(torch.autograd.Function):
    """oneDNN forward and input gradient of rows [row, in]; the weight's gradient only where it is wanted."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows if weight.requires_grad else rows.new_empty(0), weight)
        ctx.has_bias = bias is not None
        return matmul_transposed(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            rows_gradient = matmul_transposed(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            weight_gradient = matmul_transposed(gradient.t().contiguous(), rows.t())
        if ctx.has_bias and ctx.needs_input_grad[2]:
            bias_gradient = gradient.sum(0)
        return rows_gradient, weight_gradient, bias_gradient


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has anything to record of a function of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` by the fastest kernel: x [..., in], weight [out, in] → [..., out]."""
    if not uses_onednn(x) or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    recorded = needs_gradient(x, weight, bias)
    output = _Linear.apply(rows, weight, bias) if recorded else matmul_transposed(rows, weight, bias)
    return output.view(*x.shape[:-1], weight.shape[0])


class FastLinear(nn.Linear):
    """``nn.Linear`` through `linear`: same parameters, same names, same result up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_fast_linears(module: nn.Module) -> None:
    """Let each plain ``nn.Linear`` inside compute through `linear`. Parameters and state-dict names stay."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = FastLinear


class _RmsNorm(torch.autograd.Function):
    """``x / rms(x) * weight`` with a frozen weight, in half the passes over memory that composed operations take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        scaled = gradients[0] * weight
        along = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(inverse.square()).div_(x.shape[-1])
        return scaled.addcmul_(x, along, value=-1).mul_(inverse), None, None


#: Norms that are exactly ``weight * x / sqrt(mean(x²) + variance_epsilon)`` (Gemma's, for one, adds 1 to its weight).
_PLAIN_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class FastRmsNorm(nn.Module):
    """A language model's frozen norm through `_RmsNorm`; trainable or in another dtype, it computes as before."""

    weight: nn.Parameter
    variance_epsilon: float
    plain_forward: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        is_plain = hidden_states.dtype == self.weight.dtype == torch.float32 and hidden_states.device.type == "cpu"
        if is_plain and not self.weight.requires_grad:
            return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return self.plain_forward(self, hidden_states)


def use_fast_norms(module: nn.Module) -> None:
    """Let the frozen norms of a known kind inside compute through `_RmsNorm`. Parameters and names stay."""
    for child in module.modules():
        kind = type(child)
        if kind.__name__ in _PLAIN_RMS_NORMS and not isinstance(child, FastRmsNorm):
            child.__class__ = type(kind.__name__, (FastRmsNorm, kind), {"plain_forward": staticmethod(kind.forward)})


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped keys, which are never repeated; the scale is in the queries already.

    Args:
        query: [batch * group, heads of a group * target, width]; key, value: [batch * group, source, width].
        bias: added to the scores, [batch, 1 or head, target, source].
        heads: of the queries.

    Returns:
        the attended values, formed as the queries are, and the weights, which `attend_backward` wants.
    """
    weights = attention_weights(query, key, bias, heads)
    return torch.bmm(weights, value), weights


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Those of `attend`, [batch * group, heads of a group * target, source]."""
    scores = torch.bmm(query, key.transpose(1, 2))
    if bias is not None:
        scores.view(len(bias), heads, -1, key.shape[1]).add_(bias)
    return torch.softmax(scores, -1)


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`'s query, key and value from that of its result."""
    value_gradient = torch.bmm(weights.transpose(1, 2), gradient)
    weights_gradient = torch.bmm(gradient, value.transpose(1, 2))
    scores_gradient = torch._softmax_backward_data(weights_gradient, weights, -1, weights.dtype)
    return torch.bmm(scores_gradient, key), torch.bmm(scores_gradient.transpose(1, 2), query), value_gradient


class _Attention(torch.autograd.Function):
    """Softmax attention for short sequences with grouped keys, which are never repeated.

    The flash kernel for CPUs is made for long sequences: at 50 tokens its backward takes three times as long.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        batch, heads, targets, width = query.shape
        groups, sources = key.shape[1], key.shape[2]
        q = (query * scale).reshape(batch * groups, -1, width)
        k = key.reshape(batch * groups, sources, width)
        v = value.reshape(batch * groups, sources, -1)
        output, weights = attend(q, k, v, None if bias is None else bias.expand(batch, -1, -1, -1), heads)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shapes, ctx.scale = (query.shape, key.shape, value.shape), scale
        return output.view(batch, heads, targets, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        query_shape, key_shape, value_shape = ctx.shapes
        gradient = gradients[0].reshape(q.shape[0], q.shape[1], -1)
        query_gradient, key_gradient, value_gradient = attend_backward(gradient, q, k, v, weights)
        return (
            query_gradient.mul_(ctx.scale).view(query_shape),
            key_gradient.view(key_shape),
            value_gradient.view(value_shape),
            None,
            None,
        )


#: What transformers passes to every attention function, and the mask or the caller already deals with.
_CARRIED_ELSEWHERE = {
    "cache_position",
    "is_causal",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function in the form that transformers registers: query [batch, head, target, width] and so on.

    Returns [batch, target, head, width]. Refuses what would change the result: dropout, a soft cap, sinks and so on.
    """
    if odd := sorted(name for name in others if others[name] is not None and name not in _CARRIED_ELSEWHERE):
        raise ValueError(f"this attention knows no {', '.join(odd)}: use sdpa or eager for {type(module).__name__}")
    if dropout:
        raise ValueError("attention dropout is not supported by this attention; set attention_dropout to 0 or use sdpa")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _Attention.apply(query, key, value, attention_mask, scale)
    return output.transpose(1, 2).contiguous(), None


def register_attention() -> str:
    """Make `short_attention` known to transformers; returns its name, for ``set_attn_implementation``."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, short_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, eager_mask)
    return ATTENTION_NAME
