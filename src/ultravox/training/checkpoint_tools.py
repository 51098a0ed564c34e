"""What can be done with training checkpoints beside going on from them: look, compare hashes, average, make a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ultravox.config.schema import RunConfig
from ultravox.errors import CheckpointError, UltravoxError
from ultravox.files import atomic_folder
from ultravox.model.ctc_projector import CtcProjector
from ultravox.model.factory import build_model, build_processor, save_model
from ultravox.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from ultravox.training.identity import base_models
from ultravox.training.resume import require_same

REPORT_VERSION = 1


def find_checkpoints(path: Path) -> list[Path]:
    """Checkpoints of a run folder, in the order of its stages and steps, or the one that `path` is.

    Raises:
        CheckpointError: there are none.
    """
    if (path / "manifest.json").is_file() and (path / "state.json").is_file():
        return [path]
    config = path / "config.yaml"
    stages = yaml.safe_load(config.read_text())["stages"] if config.is_file() else []
    found = list_checkpoints(path, [stage["name"] for stage in stages])
    if not found:
        raise CheckpointError(
            f"{path} is no training checkpoint and holds none: expected <run>/checkpoints/<stage>-<step>, or a run "
            "folder"
        )
    return found


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """What a verified checkpoint holds, as JSON."""
    checkpoint = load_checkpoint(folder)
    state = checkpoint.state
    parts = Counter[str]()
    for name, tensor in checkpoint.trainable.items():
        parts[name.split(".")[0]] += tensor.numel()
    return {
        "version": REPORT_VERSION,
        "folder": str(folder),
        "stage": state["stage"],
        "step": state["step"],
        "max_steps": next(s["max_steps"] for s in state["resolved_config"]["stages"] if s["name"] == state["stage"]),
        "epoch": state["loop"]["epoch"],
        "seconds": state["run"]["seconds"],
        "ranks": 1 + len(state.get("other_ranks", [])),
        "parts": len(list(folder.glob("trainable*.safetensors"))),
        "metrics": state.get("metrics", {}),
        "trainable_parameters": dict(parts),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.trainable.values()}),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "config_sha256": state["config_sha256"],
        "base_models": state["base_models"],
        "data": state["data"],
    }


def average(checkpoints: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The mean of their weights, in float64 and rounded once (Izmailov et al. 2018, arXiv 1803.05407).

    Raises:
        CheckpointError: they are of different stages, configurations or tensors.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for key in ("stage", "config_sha256"):
            if other.state[key] != first.state[key]:
                raise CheckpointError(
                    f"checkpoints of different {'stages' if key == 'stage' else 'configurations'} cannot be averaged: "
                    f"step {first.state['step']} has {first.state[key][:12]}, step {other.state['step']} "
                    f"{other.state[key][:12]}"
                )
        if other.trainable.keys() != first.trainable.keys():
            raise CheckpointError("the checkpoints hold different tensors: expected those of one stage of one run")
    return {
        name: torch.stack([one.trainable[name].double() for one in checkpoints]).mean(0).to(tensor.dtype)
        for name, tensor in first.trainable.items()
    }


def write_model(trainable: Mapping[str, Tensor], state: dict[str, Any], output: Path) -> None:
    """A model in the public form, of a checkpoint's configuration with these weights.

    Args:
        trainable: as a checkpoint holds them.
        state: of the checkpoint.
        output: folder, which must not be there.

    Raises:
        UltravoxError: the base models are others than those of the run, or weights that do not fit.
    """
    if output.exists():
        raise UltravoxError(f"{output} is there already: choose another --output, or remove it")
    config = RunConfig.model_validate(state["resolved_config"])
    model, processor = build_model(config.model), build_processor(config.model)
    require_same(state["base_models"], base_models(config), "a base model", output)
    if isinstance(model.multi_modal_projector, CtcProjector):
        raise UltravoxError(
            f"the projector {config.model.projector} scores rows that are chosen from the training data: end the run "
            "(ultravox train CONFIG --resume), which writes its model/"
        )
    parameters = dict(model.named_parameters())
    weights = {name: tensor for name, tensor in trainable.items() if not name.startswith("objective.")}
    if odd := sorted(
        name for name in weights if name not in parameters or parameters[name].shape != weights[name].shape
    ):
        raise CheckpointError(f"{odd[0]} of the checkpoint does not fit the model of its configuration")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    with atomic_folder(output) as folder:
        save_model(model, processor, folder)
