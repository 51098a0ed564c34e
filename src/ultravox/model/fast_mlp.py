"""The SwiGLU layer of Llama's kind with an adapter on each of its three matrices, as one step, for training on a CPU.

Composed operations keep silu(gate) and silu(gate) · up beside gate and up, and allocate each product anew. Here only
gate and up are kept, the rest is made again from them, and gradients are formed where they are read.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultravox.model.adapters import is_plainly_adapted, lora_gradients, merge, rows_gradient
from ultravox.model.kernels import matmul_transposed, needs_gradient, uses_onednn

MATRICES = ("gate_proj", "up_proj", "down_proj")

#: Layers that are exactly ``down(silu(gate(x)) * up(x))``.
_SILUS = ("SiLU", "SiLUActivation")
_PLAIN_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


class _LoraSwiglu(torch.autograd.Function):
    """Rows [row, hidden] → [row, hidden]. `tensors` are weight, A and B of gate, up and down; `scales` of the three."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scales: tuple[float, float, float], *tensors: Tensor) -> Tensor:
        merged = [merge(tensors[3 * i], tensors[3 * i + 1], tensors[3 * i + 2], scales[i]) for i in range(3)]
        gate, up = matmul_transposed(rows, merged[0]), matmul_transposed(rows, merged[1])
        adapters = [tensor for i, tensor in enumerate(tensors) if i % 3]
        ctx.save_for_backward(rows, gate, up, *merged, *adapters)
        ctx.scales = scales
        return matmul_transposed(F.silu(gate).mul_(up), merged[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, gate_weight, up_weight, down_weight, *adapters = ctx.saved_tensors
        gradient = gradients[0]
        hidden_gradient = matmul_transposed(gradient, down_weight.t())
        activated = F.silu(gate)
        up_gradient = hidden_gradient * activated
        of_down = lora_gradients(activated.mul_(up), [gradient], adapters[4:], ctx.scales[2:])
        gate_gradient = hidden_gradient.mul_(up)
        torch.ops.aten.silu_backward.grad_input(gate_gradient, gate, grad_input=gate_gradient)
        both = [gate_gradient, up_gradient]
        of_gate_and_up = lora_gradients(rows, both, adapters[:4], ctx.scales[:2])
        of_rows = rows_gradient(both, [gate_weight, up_weight]) if ctx.needs_input_grad[0] else None
        return of_rows, None, None, *of_gate_and_up[:2], None, *of_gate_and_up[2:], None, *of_down


class FastMlp(nn.Module):
    """An adapted SwiGLU layer through `_LoraSwiglu` where gradients are wanted; otherwise it computes as before."""

    plain_forward: Any

    def forward(self, x: Tensor) -> Tensor:
        layers = [getattr(self, name) for name in MATRICES]
        if not all(is_plainly_adapted(layer) and layer.bias is None for layer in layers) or not uses_onednn(x):
            return self.plain_forward(self, x)
        if not needs_gradient(x, layers[0].lora_A):
            return self.plain_forward(self, x)
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.lora_A, layer.lora_B)]
        rows = x.reshape(-1, x.shape[-1])
        return _LoraSwiglu.apply(rows, tuple(layer.scale for layer in layers), *tensors).view(x.shape)


def use_fast_mlps(module: nn.Module) -> None:
    """Let the SwiGLU layers of a known kind inside train through `_LoraSwiglu`. Parameters and names stay."""
    for child in module.modules():
        kind = type(child)
        is_plain = kind.__name__ in _PLAIN_MLPS and not isinstance(child, FastMlp)
        if is_plain and type(child.act_fn).__name__ in _SILUS:
            child.__class__ = type(kind.__name__, (FastMlp, kind), {"plain_forward": staticmethod(kind.forward)})
