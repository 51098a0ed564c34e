"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) for frozen linear layers; rank 0 means frozen.

A layer keeps the name and the weight that it had, so the state dict of the base model does not change; the two small
matrices lie beside it. On a CPU the forward is ONE matmul with the merged weight, and the frozen weight's gradient is
never formed: 4 thin products a layer instead of the usual 6, and no additions as large as the activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultravox.errors import ConfigError
from ultravox.model.kernels import FastLinear, linear, matmul_transposed, needs_gradient, uses_onednn


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Frozen weight + scale · B A, [out, in]."""
    return torch.addmm(weight, lora_b, lora_a, alpha=scale)


def lora_gradients(
    rows: Tensor, gradient: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, from a layer's input [row, in] and the gradient of its output [row, out]; float32, CPU."""
    # Both as products with few ROWS: oneDNN takes a quarter of the time that a product with few columns needs.
    reduced = matmul_transposed(rows, lora_a)
    b_gradient = matmul_transposed(reduced.t(), gradient.t()).t().mul(scale)
    a_gradient = matmul_transposed(matmul_transposed(gradient, lora_b.t()).t(), rows.t()).mul_(scale)
    return a_gradient, b_gradient


class _MergedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        merged = merge(weight, lora_a, lora_b, scale)
        ctx.save_for_backward(rows, merged, lora_a, lora_b)
        ctx.scale = scale
        return matmul_transposed(rows, merged, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, merged, lora_a, lora_b = ctx.saved_tensors
        gradient = gradients[0]
        rows_gradient = matmul_transposed(gradient, merged.t()) if ctx.needs_input_grad[0] else None
        return rows_gradient, None, None, *lora_gradients(rows, gradient, lora_a, lora_b, ctx.scale), None


class LoraLinear(FastLinear):
    """A frozen linear layer with trainable `lora_A` [rank, in] and `lora_B` [out, rank] beside it."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    merged: bool

    @classmethod
    def wrap(cls, layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> "LoraLinear":
        """Turn `layer` into one of these in place: A uniform as in Kaiming's rule, B zero, so nothing changes yet."""
        layer.__class__ = cls
        assert isinstance(layer, LoraLinear)
        layer.requires_grad_(False)
        bound = layer.in_features**-0.5
        start = torch.rand(rank, layer.in_features, generator=generator) * (2 * bound) - bound
        layer.lora_A = nn.Parameter(start.to(layer.weight))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank).to(layer.weight))
        layer.scale = alpha / rank
        layer.merged = False
        return layer

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return linear(input, self.weight, self.bias)
        if uses_onednn(input) and self.weight.dtype == torch.float32:
            if not needs_gradient(input, self.lora_A):
                return linear(input, self.merged_weight(), self.bias)
            rows = input.reshape(-1, input.shape[-1])
            output = _MergedLora.apply(rows, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)
            return output.view(*input.shape[:-1], -1)
        return (
            F.linear(input, self.weight, self.bias) + F.linear(F.linear(input, self.lora_A), self.lora_B) * self.scale
        )

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """What one matmul needs in place of the layer and its adapter, [out, in]."""
        return merge(self.weight, self.lora_A, self.lora_B, self.scale)


def lora_layers(module: nn.Module) -> dict[str, LoraLinear]:
    """Name → layer of every adapted layer inside."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoraLinear)}


def add_lora(module: nn.Module, rank: int, alpha: float, target_modules: list[str], seed: int = 0) -> int:
    """Adapt each linear layer whose last name is among `target_modules`; rank 0 adds nothing.

    Returns:
        The number of layers adapted.
    Raises:
        ConfigError: a target that matches no linear layer, with the names that there are.
    """
    if rank == 0:
        return 0
    found = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    last_names = {name.rpartition(".")[2] for name in found}
    if unknown := sorted(set(target_modules) - last_names):
        raise ConfigError(
            f"LoRA target {', '.join(unknown)} matches no linear layer of {type(module).__name__}; "
            f"it has {', '.join(sorted(last_names))}"
        )
    generator = torch.Generator().manual_seed(seed)
    targets = [child for name, child in found.items() if name.rpartition(".")[2] in target_modules]
    for layer in targets:
        LoraLinear.wrap(layer, rank, alpha, generator)
    return len(targets)


@contextmanager
def merged_lora(module: nn.Module) -> Iterator[None]:
    """Inside the block the adapters are merged, so that generation pays nothing for them; afterwards exact again."""
    originals = {}
    with torch.no_grad():
        for name, layer in lora_layers(module).items():
            if not layer.merged:
                originals[name] = layer.weight.data
                layer.weight.data = layer.merged_weight()
                layer.merged = True
    try:
        yield
    finally:
        layers = lora_layers(module)
        for name, weight in originals.items():
            layers[name].weight.data = weight
            layers[name].merged = False
