"""Fully sharded data parallel: each rank holds a part of every layer of the language model, frozen weights included.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv 2304.11277) gathers a layer's weights before it
runs and scatters its gradients afterwards. The layers of the decoder are sharded, which all but the smallest models
consist of; the projector, the audio encoder, the embeddings and heads are replicas, whose gradients are added as in
`data_parallel`. Each rank must run the decoder as often as the others, so that a rank without examples runs it on a
token of no weight.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ultravox.training.engines.data_parallel import DataParallelEngine
from ultravox.training.engines.layers import decoder_layers
from ultravox.training.engines.ranks import Ranks
from ultravox.training.engines.shards import is_shard, local_part


class FullyShardedEngine(DataParallelEngine):
    """Layers in parts."""

    kind = "fsdp2"
    is_sharded = True
    saves_parts = True

    def __init__(
        self, ranks: Ranks, timeout_seconds: float, device: torch.device, *, reshard_after_forward: bool = True
    ) -> None:
        """Args:
        ranks, timeout_seconds, device: see `DataParallelEngine`.
        reshard_after_forward: give a layer's weights back between its forward and backward pass; without it more
            memory is taken and less is sent.
        """
        super().__init__(ranks, timeout_seconds, device)
        self._reshard = reshard_after_forward
        self._sharded: list[FSDPModule] = []

    def prepare(self, model: nn.Module) -> None:
        """See `Engine`. ConfigError: a decoder without a list of layers."""
        super().prepare(model)
        layers = decoder_layers(model)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=self._reshard)
            assert isinstance(layer, FSDPModule)
            self._sharded.append(layer)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Engine`. FSDP has averaged the gradients of what is sharded, once a micro-batch."""
        parameters = list(parameters)
        super().reduce(parameters)
        for parameter in parameters:
            if is_shard(parameter) and parameter.grad is not None:
                local_part(parameter.grad).mul_(self.world_size)

    def backward(self, total: Tensor) -> None:
        """See `Engine`: also of a sum that is not finite, since the other ranks wait."""
        if total.requires_grad:
            total.backward()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """See `Engine`."""
        for layer in self._sharded:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in self._sharded:
                layer.reshard()
                layer.set_reshard_after_forward(self._reshard)
