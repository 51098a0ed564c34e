"""Checkpoints of a run whose ranks hold parts of its tensors: each rank writes its own, and reads its own back.

A folder holds what `checkpoint` says of one of format version 2. It appears under its name once every rank's files are
on the disk. Each rank has a thread that writes; the threads meet in a group of their own over gloo, so that nothing
that they exchange can come between what training exchanges.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ultravox.config.checkpoints import CheckpointsConfig
from ultravox.errors import CheckpointError, UltravoxError
from ultravox.files import atomic_folder, explain_full_disk, sha256_file
from ultravox.training.checkpoint import (
    MANIFEST,
    PARTS_VERSION,
    STATE,
    Checkpoint,
    load_checkpoint,
    read_manifest,
    read_state,
    stored_tensors,
    verify_files,
)
from ultravox.training.checkpoint_store import CheckpointStore
from ultravox.training.engines.base import Engine
from ultravox.training.tensor_parts import KINDS, StoredTensors, on_cpu, write_parts

T = TypeVar("T")


class WritingRanks:
    """The ranks' threads that write, among themselves."""

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        """Args:
        rank: of this process.
        timeout_seconds: longest wait for another rank, which has as much to write as this one.
        """
        self.rank = rank
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self.mesh = DeviceMesh.from_group(self.group, "cpu")

    def agree(self, work: Callable[[], T]) -> list[T]:
        """What the work gave on each rank.

        Raises:
            Exception: this rank's, or an UltravoxError that says what another one met: all raise if one does.
        """
        result: T | None = None
        mine: Exception | None = None
        try:
            result = work()
        except Exception as error:  # told to the others first, which would wait in vain
            mine = error
        found: list[Any] = [None] * dist.get_world_size(self.group)
        try:
            dist.all_gather_object(found, (result, None if mine is None else _said(mine)), self.group)
        except RuntimeError as error:
            if isinstance(mine, OSError | UltravoxError):
                raise mine from error
            raise UltravoxError(
                f"rank {self.rank} waited in vain for the other ranks' parts of a checkpoint: one has ended, or its "
                f"disk is slower by more than engine.timeout_seconds; see what they said ({_said(error)})"
            ) from error
        if mine is not None:
            raise mine
        for rank, (_, said) in enumerate(found):
            if said is not None:
                raise UltravoxError(f"rank {rank} could not write its part of a checkpoint: {said}")
        return [result for result, _ in found]


class ShardedCheckpointStore(CheckpointStore):
    """The checkpoints of a run, of which each rank writes a part. All ranks must save, and join, alike."""

    def __init__(self, run_dir: Path, stages: Sequence[str], *, ranks: WritingRanks, **options: Any) -> None:
        """Args:
        ranks: that write.
        run_dir, stages, **options: see `CheckpointStore`.
        """
        super().__init__(run_dir, stages, **options)
        self._ranks = ranks

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts, on the CPU."""
        return {name: on_cpu(tensor, self._ranks.mesh) for name, tensor in tensors.items()}

    def _write(self, folder: Path, checkpoint: Checkpoint) -> None:
        save_in_parts(folder, checkpoint, self._ranks)
        if self._ranks.rank == 0:
            self._after(folder)


def open_store(run_dir: Path, stages: Sequence[str], config: CheckpointsConfig, engine: Engine) -> CheckpointStore:
    """The store of a run's checkpoints: in parts, where the engine's ranks hold parts. All ranks must call it."""
    if not engine.saves_parts:
        return CheckpointStore.from_config(run_dir, stages, config)
    ranks = WritingRanks(engine.rank, engine.timeout_seconds)
    return ShardedCheckpointStore.from_config(run_dir, stages, config, ranks=ranks)


def save_in_parts(folder: Path, checkpoint: Checkpoint, ranks: WritingRanks) -> None:
    """Write a checkpoint, on every rank; a kill of any of them leaves either the whole folder or none of that name.

    Args:
        folder: of the checkpoint, on storage that all ranks share.
        checkpoint: with this rank's parts, on the CPU; the first rank's state is written.
        ranks: that write.

    Raises:
        UltravoxError: on every rank, if one could not write.
    """
    with ExitStack() as stack:

        def begin() -> str:
            return str(stack.enter_context(atomic_folder(folder))) if ranks.rank == 0 else ""

        temporary = Path(ranks.agree(begin)[0])

        def look() -> None:  # not where it writes, which is collective: all must come to that, or none
            if not temporary.is_dir():
                raise CheckpointError(
                    f"{temporary.parent} is not the first rank's: with engine.kind fsdp2 each rank writes its part, so "
                    "put run_dir on storage that all machines share"
                )

        ranks.agree(look)
        tensors = dict(zip(KINDS, (checkpoint.trainable, checkpoint.optimizer), strict=True))

        def write() -> dict[str, str]:
            with explain_full_disk(folder):
                names = write_parts(temporary, tensors, ranks.group)
            return {name: sha256_file(temporary / name) for name in names}

        hashes = {name: digest for found in ranks.agree(write) for name, digest in found.items()}

        def finish() -> None:
            if ranks.rank == 0:
                with explain_full_disk(folder):
                    (temporary / STATE).write_text(json.dumps(checkpoint.state, indent=1))
                    hashes[STATE] = sha256_file(temporary / STATE)
                    shapes = {kind: {name: list(t.shape) for name, t in tensors[kind].items()} for kind in KINDS}
                    content = {"version": PARTS_VERSION, "sha256": hashes, "shapes": shapes}
                    (temporary / MANIFEST).write_text(json.dumps(content, indent=1))
            stack.close()  # the first rank waits for the disk, and gives the folder its name

        ranks.agree(finish)


def load_for_engine(folder: Path, engine: Engine) -> Checkpoint:
    """Read and verify a checkpoint on each rank of an engine. Of one in parts, a sharded engine's ranks read no tensor
    yet (see `StoredTensors`), and verify a share of the files each. All ranks must call it.

    Raises:
        CheckpointError: on every rank, the same; see `load_checkpoint`.
    """
    if not engine.saves_parts or read_manifest(folder)["version"] != PARTS_VERSION:
        return load_checkpoint(folder)
    fault = None
    try:
        names = sorted(read_manifest(folder)["sha256"])
        verify_files(folder, names[engine.rank :: engine.world_size])
    except CheckpointError as error:
        fault = str(error)
    if faults := [fault for fault in engine.gather(fault) if fault is not None]:
        raise CheckpointError(faults[0])
    return Checkpoint(*stored_tensors(folder), read_state(folder))


def parts_like(stored: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a checkpoint holds, for who holds `targets`: this rank's parts of what is stored in parts."""
    return stored.like(targets) if isinstance(stored, StoredTensors) else stored


def _said(error: Exception) -> str:
    """In one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UltravoxError) else f"{type(error).__name__}: {text}"
