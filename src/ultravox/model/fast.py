"""All that makes a model train fast on a CPU, put in its place."""

from typing import Any

import torch

from ultravox.model.fast_attention import use_fast_attention, use_short_attention
from ultravox.model.fast_mlp import use_fast_mlps
from ultravox.model.kernels import bound_compiled, use_fast_linears, use_fast_norms


def use_fast_kernels(model: Any, *, attention: bool = True) -> None:
    """Linear layers, norms, SwiGLU and, if wanted, attention as a CPU likes them; the same numbers up to rounding."""
    if model.device.type == "cpu" and model.dtype == torch.float32:
        bound_compiled()
        use_fast_linears(model)
        use_fast_norms(model.language_model)
        use_fast_mlps(model.language_model)
        if attention:
            use_short_attention(model.language_model)
            use_fast_attention(model.language_model)
