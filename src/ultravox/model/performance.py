"""How a model runs while it trains, apart from what it computes: kernels, attention, checkpointing, compilation."""

import importlib
import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ultravox.errors import ConfigError
from ultravox.model.fast import use_fast_kernels


def run_efficiently(
    model: Any,
    *,
    attention: str = "auto",
    compile_layers: bool = False,
    liger: bool = False,
    tf32: bool = False,
    checkpoint_language_model: bool = False,
    checkpoint_audio_encoder: bool = False,
) -> None:
    """Put a model, which is on its device, into the form in which it trains. See `config/performance.py`.

    Raises:
        ConfigError: something is asked for that this model, or this device, cannot do.
    """
    language_model = model.language_model
    if attention != "auto":
        choose_attention(language_model, attention)
    if liger:
        use_liger(language_model)
    if not (compile_layers or liger):
        use_fast_kernels(model, attention=attention == "auto")
    if tf32:
        torch.backends.cuda.matmul.allow_tf32 = True  # the newer names of these make PyTorch's own getters raise
        torch.backends.cudnn.allow_tf32 = True
    if checkpoint_language_model:
        checkpoint_activations(language_model, "checkpoint_language_model")
    encoders = [part if isinstance(part, PreTrainedModel) else part.encoder for part in model.audio_tower.parts]
    for encoder in encoders if checkpoint_audio_encoder else ():
        checkpoint_activations(encoder, "checkpoint_audio_encoder")
    if compile_layers:
        require_compiler(model.device, "performance.compile")
        trains = any(parameter.requires_grad for parameter in model.audio_tower.parameters())
        for part in [language_model, *(encoders if trains else [])]:
            for layer in layers_of(part):
                layer.compile(dynamic=True)


def checkpoint_activations(model: PreTrainedModel, key: str) -> None:
    """Keep of each layer what goes into it, and run it again on the way back (Chen et al. 2016, arXiv 1604.06174).

    ConfigError: its class does not say how.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"performance.{key}: transformers cannot do that with {type(model).__name__}; drop it")
    # transformers 5.0 has the old name alone, later ones warn of it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def choose_attention(language_model: PreTrainedModel, name: str) -> None:
    """Let a language model attend by one of transformers' implementations.

    ConfigError: it has none of that name, or it cannot train with it here.
    """
    device, dtype = language_model.device.type, language_model.dtype
    if name in ("flex_attention", "flash_attention_2") and device != "cuda":
        raise ConfigError(f"performance.attention {name} trains on CUDA GPUs alone, and this is {device}: take sdpa")
    if name == "flash_attention_2" and dtype == torch.float32:
        raise ConfigError("performance.attention flash_attention_2 takes 16-bit numbers: set model.dtype: bfloat16")
    try:
        language_model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"performance.attention {name} is not to be had ({reason}): take sdpa") from error


def use_liger(language_model: PreTrainedModel) -> None:
    """Liger's kernels for norms, rotary embeddings and SwiGLU (Hsu et al. 2024, arXiv 2410.10989); not for the loss.

    That has to stay a sum over supervised positions. ConfigError: no GPU, no such package, or no such model.
    """
    if language_model.device.type != "cuda":
        raise ConfigError(
            f"performance.liger is made of Triton kernels, for GPUs, and this is {language_model.device.type}: drop it"
        )
    try:
        kernels = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise ConfigError(f"performance.liger: pip install 'ultravox[liger]', or drop it ({error})") from error
    kind = language_model.config.model_type
    if kind not in kernels.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"performance.liger: Liger has no kernels for {kind!r} models; drop it")
    kernels._apply_liger_kernel_to_instance(model=language_model, cross_entropy=False, fused_linear_cross_entropy=False)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a language model or an encoder, which are all alike.

    ConfigError: it has no list of them.
    """
    inner: Any = model.get_decoder() if hasattr(model, "lm_head") or hasattr(model, "get_decoder") else model
    for owner in (inner, getattr(inner, "encoder", None)):
        layers = getattr(owner, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return list(layers)
    raise ConfigError(f"performance.compile: {type(model).__name__} has no list of layers; drop it")


def require_compiler(device: torch.device, what: str) -> None:
    """ConfigError: `what` uses torch.compile, for which there is no compiler here."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(f"{what} needs a C++ compiler on a CPU, and there is no {compiler}: install g++, or drop it")
