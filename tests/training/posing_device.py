"""An accelerator without one: tensors that say they are on "meta" and are computed on the CPU.

Mixing them with tensors of the CPU is an error, as on a GPU, unless those have no axes. So a forward and backward pass
here goes through exactly where one on a GPU would find its tensors on the right device.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")


class Posing(torch.Tensor):
    """Says "meta"; `inner` is on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError("a tensor on a device cannot become an array: bring it to the CPU first")

    def __repr__(self):
        return f"Posing({self.inner})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation, by the rules of devices."""
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    posing = [leaf for leaf in leaves if isinstance(leaf, Posing)]
    plain = [leaf for leaf in leaves if not isinstance(leaf, Posing)]
    name = str(func)
    target = kwargs.get("device")
    moves = any(word in name for word in ("_to_copy", "copy_", "_local_scalar_dense", "index_put", "equal"))
    mixed = [leaf for leaf in plain if leaf.dim() > 0]
    if posing and mixed and not moves and "aten.index." not in name:
        raise RuntimeError(f"{name}: tensors of two devices, {[tuple(leaf.shape) for leaf in mixed]} on the CPU")
    on_device = torch.device(target) == DEVICE if target is not None else bool(posing)
    if "copy_" in name and isinstance(args[0], torch.Tensor) and "_to_copy" not in name:
        on_device = isinstance(args[0], Posing)
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Posing) else x, (args, kwargs))
    if target is not None:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    result = func(*inner_args, **inner_kwargs)
    if not on_device:
        return result
    same = {id(leaf.inner): leaf for leaf in posing}

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        return same.get(id(value)) if id(value) in same else Posing(value)

    return tree_map(wrap, result)


class PosingMode(TorchDispatchMode):
    """Inside, "meta" is the posing device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})
