"""Where a new run begins: with the weights of another. Steps, moments and random states do not come along.

Whatever the new run would leave out, train from another beginning, or read in another way, is refused. So all that is
taken over trains here, or could; it is in this run's checkpoints, and the other run's folder is not needed again.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultravox.config.model import ModelConfig
from ultravox.errors import CheckpointError, ConfigError
from ultravox.files import sha256_file
from ultravox.model.factory import load_model
from ultravox.training.checkpoint import MANIFEST, STATE, load_checkpoint
from ultravox.training.checkpoint_tools import find_checkpoints
from ultravox.training.resume import compare
from ultravox.training.summary import tell

MOST_DIFFERENCES = 4
#: Of a model's settings, those that another run may have had: names, whose content is compared, and what trains.
FREE_SETTINGS = (
    "language_model",
    "audio_encoder",
    "chat_template",
    "dtype",
    "train_audio_encoder",
    "train_feature_encoder",
)
#: Of a saved model's configuration, what decides what its projector and encoder do.
SAVED_SETTINGS = (
    "stack_factor",
    "downsampling",
    "projector_type",
    "projector_ln_mid",
    "hidden_size",
    "num_projector_layers",
    "num_projector_queries",
    "audio_padding",
    "audio_blocks",
    "audio_layer_mix",
)
BOUNDARIES = "audio_boundaries.weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the weights lie."""

    folder: Path
    is_checkpoint: bool
    """A training checkpoint, or else a saved model."""


def find_start(path: str, run_dir: Path) -> Place:
    """The newest checkpoint of a run folder, or the checkpoint or saved model that `path` is.

    The `model/` of a finished run stands for its last checkpoint, since in a saved model adapters are merged.

    Raises:
        ConfigError: there is none, or it lies in the folder that the new run replaces.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"init_from: no folder {path}: expected a run, a training checkpoint or a saved model; of a model on the "
            "hub fetch its files first (hf download NAME --local-dir FOLDER)"
        )
    if run_dir.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ConfigError(f"init_from: {path} lies in {run_dir}, which this run replaces: choose another --run_dir")
    run = folder.parent if folder.name == "model" and (folder.parent / "train.json").is_file() else folder
    for here in dict.fromkeys((run, folder)):
        try:
            return Place(find_checkpoints(here)[-1], True)
        except CheckpointError:
            continue
    for here in (folder / "model", folder):
        if (here / "config.json").is_file():
            return Place(here, False)
    raise ConfigError(
        f"init_from: {path} holds no weights: expected a run folder with checkpoints or a model/, a training "
        f"checkpoint ({MANIFEST}, {STATE}) or a saved model (config.json)"
    )


def begin_from(
    path: str | None, run_dir: Path, model: Any, settings: ModelConfig, bases: Mapping[str, Any]
) -> dict[str, str] | None:
    """Take over the weights, and say so.

    Args:
        path, run_dir: see `find_start`; None = keep those that are there.
        model: as `build_model(settings)` has made it.
        settings: of the model.
        bases: see `base_models`.

    Returns: the place and the hash of what was read, for the run's summary; None = nothing.

    Raises:
        ConfigError: see `find_start`.
        CheckpointError: it does not fit, and in what; nothing is taken over then.
    """
    if path is None:
        return None
    place = find_start(path, run_dir)
    parameters = dict(model.named_parameters())
    if place.is_checkpoint:
        checkpoint = load_checkpoint(place.folder)
        found = {name: tensor for name, tensor in checkpoint.trainable.items() if not name.startswith("objective.")}
        saved = ModelConfig.model_validate(checkpoint.state["resolved_config"]["model"])
        _refuse(place, _other_bases(checkpoint.state["base_models"], bases))
        _refuse(place, _other_settings(saved, settings))
        fresh = _fresh_adapters(parameters, found)
        _refuse(place, _misfits(parameters, found, fresh))
        read = sha256_file(place.folder / MANIFEST)
    else:
        source = load_model(place.folder)[0]
        _refuse(place, _other_saved_settings(source.config, model.config))
        found = _of_saved_model(place, source, model, parameters)
        fresh = _fresh_adapters(parameters, found)
        _refuse(place, _misfits(parameters, found, fresh))
        files = sorted([*place.folder.glob("*.safetensors"), place.folder / "config.json"])
        read = hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
    with torch.no_grad():
        for name, tensor in found.items():
            parameters[name].copy_(tensor)
    count = sum(tensor.numel() for tensor in found.values())
    told = f"begins from {place.folder}: {count / 1e6:.1f} M parameters"
    if fresh:
        told += f"; {len(fresh)} tensors of adapters begin anew, since there are none, such as {fresh[0]}"
    tell(told)
    return {"path": str(place.folder), "sha256": read}


def _other_bases(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Base models of another content; their names may differ."""
    for part in ours:
        before, now = ({k: v for k, v in of[part].items() if k != "name"} for of in (theirs, ours))
        if before != now:
            named = [
                f"{of[part]['name']!r} ({next(iter(kept.values()))[:12]}…)"
                for of, kept in ((theirs, before), (ours, now))
            ]
            yield f"its {part} is {named[0]}, here it is {named[1]}"


def _other_settings(theirs: ModelConfig, ours: ModelConfig) -> Iterator[str]:
    """Settings that change what the same weights do; adapters of their own need not be there."""
    dumps = []
    for settings in (theirs, ours):
        content = settings.model_dump(mode="json")
        for part in ("language_model_lora", "audio_encoder_lora"):
            if getattr(theirs, part).rank == 0:
                del content[part]
            else:
                content[part]["alpha"] = getattr(settings, part).effective_alpha
        dumps.append({name: value for name, value in content.items() if name not in FREE_SETTINGS})
    for _, text in compare(dumps[0], dumps[1]):
        yield f"model.{text}"


def _other_saved_settings(theirs: Any, ours: Any) -> Iterator[str]:
    for name in SAVED_SETTINGS:
        before, now = getattr(theirs, name), getattr(ours, name)
        if before != now:
            yield f"{name} was {before!r}, is {now!r}"


def _of_saved_model(place: Place, source: Any, model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What trains here, of a saved model. CheckpointError: what does not train here is not the same there."""
    theirs = dict(source.named_parameters())
    found, differences = {}, []
    for name, parameter in parameters.items():
        if name == BOUNDARIES:
            found[name] = source.get_input_embeddings().weight[model.config.audio_boundary_ids].detach()
        elif name not in theirs:
            continue  # adapters, or what is told of as missing
        elif parameter.requires_grad:
            found[name] = theirs[name].detach()
        elif theirs[name].shape != parameter.shape:
            differences.append(_shapes(name, theirs[name], parameter))
        elif not _same(theirs[name], parameter, getattr(model.config, "audio_boundary_ids", None) or []):
            differences.append(
                f"{name} differs and is frozen here: another base model, "
                + (
                    "or adapters, which are merged in a saved model: name its run or a training checkpoint"
                    if name.startswith("language_model.")
                    else "or a trained one: set model.train_audio_encoder true (a rate of 0 keeps it as it comes)"
                )
            )
    _refuse(place, differences)
    _refuse(place, (f"{name} is not in this model" for name in theirs if name not in parameters))
    return found


def _same(theirs: Tensor, ours: Tensor, boundary_ids: list[int]) -> bool:
    """Whether two weights are alike in the coarser of their dtypes; of a table, but for the rows that train."""
    coarser = theirs.dtype if theirs.element_size() < ours.element_size() else ours.dtype
    same = theirs.detach().to(coarser) == ours.detach().to(theirs.device, coarser)
    if boundary_ids and theirs.dim() == 2 and len(theirs) > max(boundary_ids):
        differing = (~same).any(1).nonzero()[:, 0].tolist()
        return set(differing) <= set(boundary_ids)
    return bool(same.all())


def _fresh_adapters(parameters: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Adapters of a tower that has none there: they begin as ever, and change nothing yet."""
    adapters = [name for name in parameters if _is_adapter(name)]
    adapted = {name.partition(".")[0] for name in found if _is_adapter(name)}
    return [name for name in adapters if name.partition(".")[0] not in adapted]


def _misfits(parameters: Mapping[str, Tensor], found: Mapping[str, Tensor], fresh: Iterable[str]) -> Iterator[str]:
    """What of these weights has no place here, and what has no weights."""
    for name, tensor in found.items():
        if name not in parameters:
            yield f"{name} is not in this model"
        elif parameters[name].shape != tensor.shape:
            yield _shapes(name, tensor, parameters[name])
        elif not parameters[name].requires_grad:
            yield f"{name} was trained there, is frozen here: set model.train_audio_encoder true (a rate of 0 keeps it)"
    known = {*found, *fresh}
    for name, parameter in parameters.items():
        of_base = name.startswith("audio_tower.") and not _is_adapter(name)  # the same there and here
        if parameter.requires_grad and name not in known and not of_base:
            yield f"{name} trains here, is not there"


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _shapes(name: str, theirs: Tensor, ours: Tensor) -> str:
    return f"{name} has shape {list(theirs.shape)} there, {list(ours.shape)} here"


def _refuse(place: Place, differences: Iterable[str]) -> None:
    if told := list(differences):
        more = len(told) - MOST_DIFFERENCES
        named = "; ".join(told[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"init_from: a run cannot begin from {place.folder}: {named}")
