"""Where the parts of a CHECKPOINT argument lie, and what identifies the weights that were measured."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ultravox.errors import CheckpointError
from ultravox.files import sha256_file
from ultravox.model.folder import find_model_folder

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved model, and the run that made it where there is one.

    ``model`` is the folder that ``save_pretrained`` wrote; ``run`` is None for a model folder that lies on its own;
    ``config`` and ``train`` are the run's config.yaml and train.json as plain data, empty when absent.
    """

    model: Path
    run: Path | None
    config: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluation(self) -> dict[str, Any]:
        """The ``evaluation`` part of the run's config."""
        return self.config.get("evaluation") or {}

    @property
    def audio_encoder(self) -> str | None:
        """Name of the pretrained audio encoder that the run began from, or None where nothing says it."""
        return (self.config.get("model") or {}).get("audio_encoder")


def find_checkpoint(path: str | Path) -> Checkpoint:
    """Resolve a run folder, its ``model/``, or any saved model folder. CheckpointError when it is none of them."""
    path = Path(path).expanduser()
    model = find_model_folder(path)
    run = path if model != path else path.absolute().parent
    if model == path and not (run / "config.yaml").is_file():
        return Checkpoint(model, None)
    return Checkpoint(model, run, read_yaml(run / "config.yaml"), read_json(run / "train.json"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty when the file is absent. CheckpointError when it is not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a run config: expected keys and values")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty when the file is absent. CheckpointError when it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Path of the model, the SHA-256 of each file that decides its output, and one SHA-256 over all of them."""
    files = sorted({file for pattern in _WEIGHTS for file in checkpoint.model.glob(pattern)})
    hashes = {file.name: sha256_file(file) for file in files}
    joined = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
    path = str(checkpoint.run or checkpoint.model)
    return {"path": path, "sha256": hashlib.sha256(joined.encode()).hexdigest(), "files": hashes}
