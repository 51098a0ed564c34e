"""UltraVox: train, evaluate and serve large language models that hear.

Importing this package is cheap: neither torch nor transformers is loaded until one of the names below is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ultravox.inference.api import load
    from ultravox.model.configuration import UltravoxConfig
    from ultravox.model.modeling import UltravoxModel
    from ultravox.model.processing import UltravoxProcessor

_HOMES = {
    "UltravoxConfig": "ultravox.model.configuration",
    "UltravoxModel": "ultravox.model.modeling",
    "UltravoxProcessor": "ultravox.model.processing",
    "load": "ultravox.inference.api",
}

__all__ = ["UltravoxConfig", "UltravoxModel", "UltravoxProcessor", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ultravox' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come through here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
