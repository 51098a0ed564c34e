"""A learned mix of an encoder's layers, in place of its last one.

One weight for each layer, softmax over them, as for the tasks of SUPERB (Yang et al. 2021, arXiv 2105.01051). Which
layer carries what differs between encoders: what is said stands clearest in the middle of self-supervised ones.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init


class LayerMix(nn.Module):
    """A weighted mean of layers that stand side by side in a frame; all alike at the beginning.

    Args:
        num_layers: that there are, what goes into the first one included.
    """

    def __init__(self, num_layers: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers))

    def reset_parameters(self) -> None:
        """All layers alike."""
        init.zeros_(self.weight)

    def forward(self, frames: Float[Tensor, "clip frame layers"]) -> Float[Tensor, "clip frame hidden"]:
        """From all layers' channels, layer after layer, to as many as one has."""
        layers = frames.unflatten(-1, (len(self.weight), -1))
        return torch.einsum("cflh,l->cfh", layers, self.weight.softmax(0).to(frames.dtype))
