"""A model without weights: all its layers, names and shapes, on tensors that take no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PretrainedConfig

from ultravox.config.model import ModelConfig
from ultravox.errors import ModelError
from ultravox.estimate.known import KNOWN
from ultravox.model import kernels
from ultravox.model.audio_encoder import encoder_from_config, keep_layers
from ultravox.model.configuration import UltravoxConfig
from ultravox.model.factory import freeze_and_adapt, projector_settings, tower_settings
from ultravox.model.joint_encoder import JointAudioEncoder
from ultravox.model.loading import load_config
from ultravox.model.modeling import UltravoxModel
from ultravox.model.pretrained import quiet_loading, resolve_model

MOST_KNOWN = 1 << 16
"""Tensors of at most so many numbers keep their values where those are known: lengths, and masks of them."""


@contextmanager
def weightless(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block tensors are made of this dtype, and have no memory: operations give shapes alone."""
    before = fake_tensor.CONSTANT_NUMEL_LIMIT, kernels._HAS_ONEDNN
    # without oneDNN, as on a GPU: its kernels for CPUs know no such tensors
    fake_tensor.CONSTANT_NUMEL_LIMIT, kernels._HAS_ONEDNN = MOST_KNOWN, False
    try:
        with _default(dtype), fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), _KnownPlaces():
            yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT, kernels._HAS_ONEDNN = before


class _KnownPlaces(TorchDispatchMode):
    """Keeps the values of `torch.arange`, which masks of lengths are compared with."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket is not torch.ops.aten.arange or made.numel() > MOST_KNOWN:
            return made
        with fake_tensor.unset_fake_temporarily():
            values = func(*args, **(kwargs or {})).tolist()
        return torch.tensor(values, dtype=made.dtype)


@contextmanager
def with_memory() -> Iterator[None]:
    """Inside of `weightless`: real tensors, of float32."""
    with _default(torch.float32), fake_tensor.unset_fake_temporarily():
        yield


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_skeleton(model: ModelConfig) -> UltravoxModel:
    """What `ultravox.model.factory.build_model` builds, to be called in `weightless`.

    Raises:
        ModelError: a part of which no shapes are known; ConfigError: adapters where there is no such layer.
    """
    with quiet_loading():
        tower = encoder_from_config(shapes_of(model.audio_encoder))
        if model.audio_encoder_layers is not None:
            keep_layers(tower, model.audio_encoder_layers)
        if model.second_audio_encoder is not None:
            tower = JointAudioEncoder(tower, encoder_from_config(shapes_of(model.second_audio_encoder)))
        text = shapes_of(model.language_model)
        text.dtype = torch.get_default_dtype()
        config = UltravoxConfig(
            tower.config,
            text,
            audio_token_index=text.vocab_size,
            **tower_settings(model, tower),
            **projector_settings(model),
        )
        built = UltravoxModel(config)
    freeze_and_adapt(built, model)
    return built


def shapes_of(name: str) -> PretrainedConfig:
    """The configuration of a bundled model, a folder or a hub id. ModelError: it is not to be had."""
    if name in KNOWN:
        return AutoConfig.for_model(**KNOWN[name])
    try:
        config = load_config(resolve_model(name), name)
    except ModelError as error:
        raise ModelError(
            f"{error}; an estimate needs its config.json alone, so name a folder with that, or one of "
            f"{', '.join(KNOWN)}"
        ) from error
    if hasattr(config, "layerdrop"):
        config.layerdrop = 0.0  # layers that are left out at random: as many as there can be
    return config
