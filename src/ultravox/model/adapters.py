"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) for frozen linear layers; rank 0 means frozen.

A layer keeps the name and the weight that it had, so the state dict of the base model does not change; the two small
matrices lie beside it. On a CPU the forward is ONE matmul with the merged weight, and the frozen weight's gradient is
never formed: 4 thin products a layer instead of the usual 6, and no additions as large as the activations.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultravox.errors import ConfigError
from ultravox.model.kernels import (
    FastLinear,
    add_matmul_transposed,
    linear,
    matmul_transposed,
    needs_gradient,
    uses_onednn,
)


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Frozen weight + scale · B A, [out, in]."""
    if uses_onednn(weight):
        return add_matmul_transposed(weight, lora_b * scale, lora_a.t())
    return torch.addmm(weight, lora_b, lora_a, alpha=scale)


def lora_gradients(
    rows: Tensor, gradients: Sequence[Tensor], adapters: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """Gradients of A and B of layers that read the same input; float32, CPU.

    Args:
        rows: the input, [row, in].
        gradients: of each layer's output, [row, out].
        adapters: A and B of the first layer, A and B of the second …
        scales: of each layer.
    """
    # All as products with few ROWS: oneDNN takes a quarter of the time that a product with few columns needs.
    many_a, many_b = adapters[::2], adapters[1::2]
    ranks = [len(lora_a) for lora_a in many_a]
    reduced = matmul_transposed(rows, torch.cat(list(many_a))).split(ranks, 1)
    back = torch.cat([matmul_transposed(g, b.t()) for g, b in zip(gradients, many_b, strict=True)], 1)
    a_gradients = matmul_transposed(back.t(), rows.t()).split(ranks)
    found = []
    for a_gradient, few, gradient, scale in zip(a_gradients, reduced, gradients, scales, strict=True):
        found += [a_gradient.mul_(scale), matmul_transposed(few.t(), gradient.t()).t().mul(scale)]
    return found


def rows_gradient(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Gradient of the input [row, in] of layers that share it, from those of their outputs [row, out]."""
    total = matmul_transposed(gradients[0], weights[0].t())
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        total = add_matmul_transposed(total, gradient, weight.t())
    return total


class _MergedLora(torch.autograd.Function):
    """Layers that share their input rows [row, in]. `tensors`: weight, bias, A and B of the first, of the second …"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scales: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, many_a, many_b = (tensors[i::4] for i in range(4))
        merged = [merge(*parts) for parts in zip(weights, many_a, many_b, scales, strict=True)]
        adapters = [tensor for pair in zip(many_a, many_b, strict=True) for tensor in pair]
        ctx.save_for_backward(rows, *merged, *adapters)
        ctx.scales = scales
        return tuple(matmul_transposed(rows, weight, bias) for weight, bias in zip(merged, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = len(gradients)
        rows, *saved = ctx.saved_tensors
        found = lora_gradients(rows, gradients, saved[count:], ctx.scales)
        of_rows = rows_gradient(gradients, saved[:count]) if ctx.needs_input_grad[0] else None
        of_tensors = [(None, None, *found[2 * i : 2 * i + 2]) for i in range(count)]
        return of_rows, None, *[gradient for four in of_tensors for gradient in four]


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
            return _apply_merged([self], input)[0]
        return (
            F.linear(input, self.weight, self.bias) + F.linear(F.linear(input, self.lora_A), self.lora_B) * self.scale
        )

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """What one matmul needs in place of the layer and its adapter, [out, in]."""
        return merge(self.weight, self.lora_A, self.lora_B, self.scale)


def project_together(layers: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """Each layer of the same input, [..., in] → [..., out] each; adapted ones share their adapters' thin products."""
    adapted = [layer for layer in layers if is_plainly_adapted(layer)]
    if len(adapted) == len(layers) and uses_onednn(x) and needs_gradient(x, *(layer.lora_A for layer in adapted)):
        return _apply_merged(adapted, x)
    return [layer(x) for layer in layers]


def is_plainly_adapted(layer: nn.Module) -> TypeGuard["LoraLinear"]:
    """Whether a layer is float32 with an adapter beside it."""
    return isinstance(layer, LoraLinear) and not layer.merged and layer.weight.dtype == torch.float32


def _apply_merged(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias, layer.lora_A, layer.lora_B)]
    outputs = _MergedLora.apply(x.reshape(-1, x.shape[-1]), tuple(layer.scale for layer in layers), *tensors)
    return [output.view(*x.shape[:-1], -1) for output in outputs]


def lora_layers(module: nn.Module) -> dict[str, LoraLinear]:
    """Name → layer of every adapted layer inside."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoraLinear)}


def add_lora(module: nn.Module, rank: int, alpha: float, target_modules: list[str], seed: int = 0) -> int:
    """Adapt each linear layer whose last name is among `target_modules`; rank 0 adds nothing.

    Returns:
        The number of layers adapted.
    Raises:
        ConfigError: see `find_targets`.
    """
    if rank == 0:
        return 0
    targets = find_targets(module, target_modules)
    generator = torch.Generator().manual_seed(seed)
    for layer in targets.values():
        LoraLinear.wrap(layer, rank, alpha, generator)
    return len(targets)


def find_targets(module: nn.Module, target_modules: list[str]) -> dict[str, nn.Linear]:
    """The linear layers whose last name is among `target_modules`, by their whole names.

    Raises:
        ConfigError: a target that matches no linear layer, with the names that there are; or one that shares its
            weights with the embeddings.
    """
    found = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    last_names = {name.rpartition(".")[2] for name in found}
    if unknown := sorted(set(target_modules) - last_names):
        raise ConfigError(
            f"LoRA target {', '.join(unknown)} matches no linear layer of {type(module).__name__}; "
            f"it has {', '.join(sorted(last_names))}"
        )
    targets = {name: child for name, child in found.items() if name.rpartition(".")[2] in target_modules}
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    if tied := [name for name, child in targets.items() if id(child.weight) in tables]:
        raise ConfigError(
            f"LoRA target {tied[0]} shares its weights with the embeddings of {type(module).__name__}, and those would "
            "change with it: leave it out of target_modules"
        )
    return targets


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


@torch.no_grad()
def merged_state(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's whole state without adapters, each merged into its weight; `state` is left as it is."""
    state = dict(state)
    for name, layer in lora_layers(module).items():
        lora_a, lora_b = (state.pop(f"{name}.{side}", None) for side in ("lora_A", "lora_B"))
        if not layer.merged and lora_a is not None and lora_b is not None:
            state[f"{name}.weight"] = merge(state[f"{name}.weight"], lora_a, lora_b, layer.scale)
    return state


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside the block every adapted layer is the base model's: nothing is added to its weight.

    Raises:
        ConfigError: the adapters are merged into the weights just now, so that the base model is not to be had.
    """
    layers = list(lora_layers(module).values())
    if any(layer.merged for layer in layers):
        raise ConfigError("adapters that are merged cannot be left out: leave `merged_lora` first")
    for layer in layers:
        layer.merged = True  # a merged layer is its weight alone, and nothing was merged into this one
    try:
        yield
    finally:
        for layer in layers:
            layer.merged = False
