"""How much memory a piece of work holds at most, told by the tensors that it makes. They may be without memory."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class PeakMemory(TorchDispatchMode):
    """Inside the block, counts the bytes of all memory that operations ask for and that is still in use.

    What a kernel takes for itself while it runs is not seen, nor what an allocator holds back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes that are in use."""
        self.peak = 0
        """Most bytes that were in use at once."""
        self._held: dict[int, Any] = {}

    def ignore(self, tensor: Tensor) -> None:
        """Leave out what was there before; it must stay."""
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, output)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._held:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            del self._held[place]
            self.now -= size

        self._held[place] = weakref.ref(storage, gone)
