"""Parts of transformers' models from a folder or the hub, and one clear error when they are not to be had."""

import difflib
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from ultravox.errors import ModelError
from ultravox.model.pretrained import BUNDLED, quiet_loading


def load_config(path: str, name: str) -> PretrainedConfig:
    """The configuration at a path or hub id, which the user called `name`. ModelError: there is none."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise unavailable("model", name, error) from error


def load_pretrained(kind: Any, path: str, name: str, dtype: torch.dtype) -> Any:
    """A model with its weights by an Auto class or a model class. ModelError: there is none."""
    try:
        with quiet_loading():
            return kind.from_pretrained(path, dtype=dtype)
    except Exception as error:  # safetensors' errors are no OSError
        raise unavailable("model", name, error) from error


def unavailable(what: str, name: str, error: Exception) -> ModelError:
    """What to say when it could not be loaded: why, and what was perhaps meant."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # by the last word of a hub id too: with its owner, or in capitals, a bundled model is easily meant
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), BUNDLED, n=1, cutoff=0.75)
    return ModelError(
        f"no {what} of {name!r} could be loaded ({reason}): "
        + (f"did you mean {close[0]!r}? " if close else "")
        + "expected a bundled name (ultravox models list), a local model folder, or a hub id and a network"
    )
