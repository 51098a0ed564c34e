"""Floating-point operations of a batch: of the model's products with its weights, as utilisation is usually counted.

Two for each weight and position forwards, two more for the gradient of the input, two more for that of a weight that
trains (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; the share of the peak that they come to is PaLM's "model FLOP
utilisation", arXiv 2204.02311, appendix B). Attention's own products, padding, and what is computed again on the way
back are left out.
"""

from typing import Any

from torch import nn

from ultravox.model.adapters import lora_layers


class ModelFlops:
    """Counts for one stage, whose parameters already say whether they train."""

    def __init__(self, model: Any) -> None:
        self._frames_per_second = model.audio_tower.frames_per_second
        encoder = _of(model.audio_tower)
        self._per_frame = encoder if any(p.requires_grad for p in model.audio_tower.parameters()) else encoder / 2
        self._per_audio_position = _of(model.multi_modal_projector)
        self._per_token = _of(model.get_decoder())
        head = model.get_output_embeddings()
        self._per_logits = 0.0 if head is None else head.weight.numel() * (6.0 if head.weight.requires_grad else 4.0)

    def encoder(self, audio_seconds: float) -> float:
        """Of an encoder that runs in the step; a frozen one has no way back."""
        return self._per_frame * audio_seconds * self._frames_per_second

    def projector(self, num_positions: int) -> float:
        """Of so many audio positions."""
        return self._per_audio_position * num_positions

    def language_model(self, num_tokens: int, num_logits: int) -> float:
        """Of so many tokens, and of the logits that are made of some of them."""
        return self._per_token * num_tokens + self._per_logits * num_logits


def num_matmul_parameters(language_model: nn.Module) -> int:
    """Parameters of the language model that a token is multiplied with: without embeddings and adapters."""
    tables = {id(p) for m in language_model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = language_model.get_output_embeddings()  # type: ignore[operator]
    tables |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    tables |= {id(p) for layer in lora_layers(language_model).values() for p in (layer.lora_A, layer.lora_B)}
    return sum(parameter.numel() for parameter in language_model.parameters() if id(parameter) not in tables)


def _of(module: nn.Module) -> float:
    """For each position, forwards and backwards."""
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    weights = [p for p in module.parameters() if p.dim() >= 2 and id(p) not in tables]
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in weights))
