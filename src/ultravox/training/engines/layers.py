"""What of a model is shared out to the ranks."""

from torch import nn

from ultravox.errors import ConfigError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The language model's layers, of which all but the smallest models consist.

    Raises:
        ConfigError: a decoder without a list of layers.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ConfigError(f"{type(decoder).__name__} has no list of layers to shard: choose engine.kind ddp")
    return list(layers)
