"""Tensors of which each rank may hold a part only: their parts, and the whole of them. Plain tensors are both."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it only."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on each rank. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_of_part(part: Tensor, like: Tensor) -> Tensor:
    """A tensor that is sharded as `like` is, of which `part` is this rank's, in the same memory. Others stay."""
    if not isinstance(like, DTensor) or part.dim() != like.dim():  # AdamW's step count is the same everywhere
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def part_of_whole(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor, whole or sharded as `like` is. Each rank has the whole: nothing is sent."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if not isinstance(like, DTensor) or tensor.dim() != like.dim():
        return tensor
    sharded = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return sharded.to_local()


@torch.no_grad()
def assign(target: Tensor, tensor: Tensor) -> None:
    """Give a parameter the values of a tensor, whole or sharded as the parameter is."""
    local_part(target).copy_(part_of_whole(tensor, target))
