"""Training checkpoints: whole or absent, hash-verified, without pickle.

``checkpoints/<stage>-<step:06d>/`` holds ``trainable.safetensors`` (only what trains), ``optimizer.safetensors``
(AdamW's moments under the parameters' names), ``state.json`` (where the run stands, its random states, its config and
the identities of the base models) and ``manifest.json`` (format version 1 and SHA-256 of the other three).

Where ranks hold parts of the tensors (`sharded_store`), the format version is 2, and each rank has written files of its
own parts (`tensor_parts`): ``trainable-<rank>-of-<ranks>.safetensors``, ``optimizer-<rank>-of-<ranks>.safetensors``.
"""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ultravox.errors import CheckpointError
from ultravox.files import atomic_folder, sha256_file
from ultravox.training.tensor_parts import KINDS, PART, StoredTensors

FORMAT_VERSION = 1
PARTS_VERSION = 2
STATE = "state.json"
FILES = (*(f"{kind}.safetensors" for kind in KINDS), STATE)
MANIFEST = "manifest.json"


@dataclass(slots=True)
class Checkpoint:
    """One training checkpoint in memory. `state` is JSON; tensors are whole, or this rank's parts of them."""

    trainable: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]


def checkpoint_folder(run_dir: Path, stage: str, step: int) -> Path:
    """Where the checkpoint of a stage's step lies."""
    return run_dir / "checkpoints" / f"{stage}-{step:06d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a kill at any point leaves either the whole folder or none of that name."""
    with atomic_folder(folder) as temporary:
        for name, tensors in zip(FILES[:2], (checkpoint.trainable, checkpoint.optimizer), strict=True):
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, temporary / name)
        (temporary / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
        hashes = {name: sha256_file(temporary / name) for name in FILES}
        (temporary / MANIFEST).write_text(json.dumps({"version": FORMAT_VERSION, "sha256": hashes}, indent=1))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint, with whole tensors, whoever has written them.

    Raises:
        CheckpointError: naming the file that is missing, damaged or of another version.
    """
    manifest = read_manifest(folder)
    verify_files(folder, list(manifest["sha256"]))
    if manifest["version"] == PARTS_VERSION:
        trainable, optimizer = (stored.whole() for stored in stored_tensors(folder))
        return Checkpoint(trainable, optimizer, read_state(folder))
    try:
        tensors = [load_file(folder / name) for name in FILES[:2]]
    except SafetensorError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return Checkpoint(tensors[0], tensors[1], read_state(folder))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Version and SHA-256 of each file: of `FILES`, or of the state and of parts, and the shapes of these.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    manifest = _read_json(folder / MANIFEST)
    version, hashes = manifest.get("version"), manifest.get("sha256")
    if version not in (FORMAT_VERSION, PARTS_VERSION):
        raise CheckpointError(
            f"{folder} has format version {version}, expected {FORMAT_VERSION} or {PARTS_VERSION}: take the UltraVox "
            "that wrote it, or a newer one"
        )
    if not isinstance(hashes, dict):
        raise CheckpointError(f"{folder / MANIFEST} holds no hashes: delete {folder} and resume again")
    if version == FORMAT_VERSION:
        return {"version": version, "sha256": {name: hashes.get(name) for name in FILES}}
    shapes = manifest.get("shapes")
    if not (isinstance(shapes, dict) and all(isinstance(shapes.get(kind), dict) for kind in KINDS)):
        raise CheckpointError(f"{folder / MANIFEST} holds no shapes: delete {folder} and resume again")
    if odd := sorted(name for name in hashes if name != STATE and not PART.fullmatch(name)):
        raise CheckpointError(f"{folder / MANIFEST} names {odd[0]}, which is no file of a checkpoint")
    there = {path.name for path in folder.glob("*.safetensors")}
    if odd := sorted(there - set(hashes)):
        raise CheckpointError(f"{folder / odd[0]} is not in {MANIFEST}: take it away, it is not of this checkpoint")
    return {"version": version, "sha256": {STATE: None, **hashes}, "shapes": shapes}


def verify_files(folder: Path, names: Sequence[str]) -> None:
    """Hold files of a checkpoint against its manifest. CheckpointError names the first that is missing or damaged."""
    hashes = read_manifest(folder)["sha256"]
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: delete {folder} to resume from the checkpoint before it")
        if sha256_file(path) != hashes[name]:
            raise CheckpointError(
                f"{path} is damaged (its SHA-256 is not the one in manifest.json): "
                f"delete {folder} to resume from the checkpoint before it"
            )


def stored_tensors(folder: Path) -> tuple[StoredTensors, StoredTensors]:
    """What trains and the optimizer's, of a checkpoint in parts that is verified. CheckpointError: they do not fit."""
    shapes = read_manifest(folder)["shapes"]
    trainable, optimizer = (StoredTensors(folder, kind, shapes[kind]) for kind in KINDS)
    return trainable, optimizer


def read_state(folder: Path) -> dict[str, Any]:
    """All of a checkpoint that is not a tensor. CheckpointError: it is missing, or no JSON."""
    return _read_json(folder / STATE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        return content
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: expected a training checkpoint in {path.parent}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): delete {path.parent} and resume again") from error


def list_checkpoints(run_dir: Path, stages: Sequence[str]) -> list[Path]:
    """The run's checkpoints, oldest first: by the order of the stages, then by step. Half-written ones do not count."""
    found = []
    for folder in (run_dir / "checkpoints").glob("*-*"):
        stage, _, step = folder.name.rpartition("-")
        if stage in stages and step.isdigit() and folder.is_dir():
            found.append((stages.index(stage), int(step), folder))
    return [folder for _, _, folder in sorted(found)]


def remove_checkpoints(run_dir: Path, folders: Sequence[Path]) -> None:
    """Remove these, and what a killed process left behind.

    A folder is renamed before its files go, so that no half-deleted one can be taken for a checkpoint.
    """
    for folder in folders:
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
    for leftover in (run_dir / "checkpoints").glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """The states of the random generators (torch, numpy, python, and the GPU's where one is in use) as JSON."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [kind, np.asarray(keys).tobytes().hex(), int(position), int(has_gauss), float(cached).hex()],
        "python": [version, list(words), gauss],
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_initialized() else None,
    }


def state_of_rank(state: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Any] | None:
    """Random state, stream and position of a rank; None where other numbers of ranks saved them, but for rank 0."""
    others = state.get("other_ranks", [])
    if rank == 0:
        loop = state["loop"]
        position = [loop["epoch"], loop["window"], loop["batch"]]
        return {"random": state["random"], "stream": state["stream"], "position": position}
    return others[rank - 1] if len(others) + 1 == world_size else None


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undo `random_state`; on another kind of device than it was saved on, the GPU's generator stays as it is."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state.get("cuda") is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))
    kind, keys, position, has_gauss, cached = state["numpy"]
    words = np.frombuffer(bytes.fromhex(keys), dtype=np.uint32)
    np.random.set_state((kind, words, position, has_gauss, float.fromhex(cached)))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
