"""Named tensors on disk of which each rank has written its part, through PyTorch's distributed checkpoints (DCP).

The files are safetensors, written and read by DCP's `HuggingFaceStorageWriter` and `HuggingFaceStorageReader`
(torch/distributed/checkpoint/hf_storage.py): the place of each part in its tensor, `saved_offsets`, is in its file's
header, and there is no file of metadata, where DCP's own format has a pickled one. A tensor that every rank holds whole
is written by the first. A reader opens the headers of all files, and reads of each only what it asks for, so that any
number of processes can read what any number has written.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ultravox.errors import CheckpointError
from ultravox.training.engines.shards import local_part

KINDS = ("trainable", "optimizer")
PART = re.compile(rf"({'|'.join(KINDS)})-\d{{5}}-of-\d{{5}}\.safetensors")


def on_cpu(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A copy on the CPU, not to be changed by further steps; of a shard, this rank's part on a mesh of CPUs."""
    part = local_part(tensor.detach()).to("cpu", copy=True).contiguous()
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def write_parts(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], group: dist.ProcessGroup) -> list[str]:
    """Write what this rank holds, and wait until it is on the disk. All ranks of the group must call it.

    Args:
        folder: that all ranks see.
        tensors: kind → name → tensor on the CPU.
        group: of the ranks, over gloo.

    Returns: the names of this rank's files, at most one of each kind. None of them counts unless all ranks return.

    Raises:
        OSError: this rank could not write. What another one met is told there alone.
        RuntimeError: another rank is gone.
    """
    import torch.distributed.checkpoint as dcp

    flat = {f"{kind}/{name}": tensor for kind, of_kind in tensors.items() for name, tensor in of_kind.items()}
    places = {name: 1 + KINDS.index(name.partition("/")[0]) for name in flat}  # each kind has a file of its own
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=places, save_distributed=True)
    # What all ranks hold is the first one's: tokens that a stream has brought differ, and its are those of the run.
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True)
    try:
        dcp.save(flat, storage_writer=writer, planner=planner, process_group=group)
    except dcp.api.CheckpointException as failure:  # no Exception: it would pass by those who clean up
        if dist.get_rank(group) in failure.failures:
            raise failure.failures[dist.get_rank(group)][0] from failure
    number, names = dist.get_rank(group) + 1, []
    for index, kind in enumerate(KINDS, start=1):
        for written in folder.glob(f"shard-{number:05d}-model-{index:05d}-of-*.safetensors"):
            names.append(f"{kind}-{number:05d}-of-{dist.get_world_size(group):05d}.safetensors")
            written.rename(folder / names[-1])
    return names


class StoredTensors(Mapping[str, Tensor]):
    """One kind of a folder's tensors, read when they are asked for."""

    def __init__(self, folder: Path, kind: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Args:
        folder: in which all files of parts are whole.
        kind: of KINDS.
        shapes: of the whole tensors. A part says where it begins, and not how much follows the last one.

        Raises:
            CheckpointError: a file that is none of parts, or parts that do not make up the tensors.
        """
        self._folder, self._kind = folder, kind
        found, prefix = self._metadata(), f"{kind}/"
        self._found = {name.removeprefix(prefix): found[name] for name in sorted(found) if name.startswith(prefix)}
        for name in sorted({*shapes, *self._found}):
            tensor = self._found.get(name)
            count = -1 if tensor is None else sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if tensor is None or list(tensor.size) != shapes.get(name) or count != math.prod(tensor.size):
                raise CheckpointError(f"{folder} does not hold all of {kind} {name}: copy the whole checkpoint again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, name: str) -> Tensor:
        """The whole of one tensor, on the CPU."""
        return self._read({name: self._empty(name)})[name]

    def whole(self) -> dict[str, Tensor]:
        """All of them, whole, on the CPU."""
        return self._read({name: self._empty(name) for name in self})

    def like(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of them, each sharded as the target of its name and shape is, of which only this rank's part is read.

        What has no such target is read whole, on the CPU.
        """
        empty = {}
        for name, found in self._found.items():
            target = targets.get(name)
            if isinstance(target, DTensor) and target.shape == found.size:
                empty[name] = torch.zeros_like(target.detach(), dtype=found.properties.dtype)
            else:
                empty[name] = self._empty(name)
        return self._read(empty)

    def _empty(self, name: str) -> Tensor:
        found = self._found[name]
        return torch.zeros(found.size, dtype=found.properties.dtype)

    def _metadata(self) -> dict[str, Any]:
        """Kind and name of each tensor → its DCP metadata, from the headers."""
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        try:
            return HuggingFaceStorageReader(str(self._folder)).read_metadata().state_dict_metadata
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self._folder} cannot be read: {error}") from error

    def _read(self, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fill targets. Nothing is exchanged: each process reads for itself."""
        import torch.distributed.checkpoint as dcp

        reader = dcp.HuggingFaceStorageReader(str(self._folder))
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        flat: dict[str, Any] = {f"{self._kind}/{name}": tensor for name, tensor in targets.items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(flat, storage_reader=reader, planner=planner, no_dist=True)
        except dcp.api.CheckpointException as failure:
            error, _ = next(iter(failure.failures.values()))
            raise CheckpointError(f"{self._folder} cannot be read: {error}") from error
        return targets
