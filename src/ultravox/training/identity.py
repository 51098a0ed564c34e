"""What makes two runs the same run: the keys that decide its numbers, and the models that it starts from."""

import hashlib
from pathlib import Path
from typing import Any

from ultravox.config.schema import RunConfig
from ultravox.files import sha256_file
from ultravox.model.pretrained import hub_commit, resolve_model

#: Keys that a resumed run may change, since they do not touch its numbers.
FREE_KEYS = ("run_dir", "logging", "evaluation", "device", "engine", "checkpoints")
FREE_PERFORMANCE_KEYS = ("empty_cache_every", "peak_tflops")
FREE_DATA_KEYS = ("max_cache_gb", "loader")
FREE_STAGE_KEYS = ("log_every", "evaluate_every", "checkpoint_every")


def deciding_keys(config: RunConfig) -> dict[str, Any]:
    """The part of the configuration that decides the run's numbers, as JSON."""
    content = config.model_dump(mode="json")
    progress_clips = content["evaluation"]["num_progress_clips"]
    content = {key: value for key, value in content.items() if key not in FREE_KEYS}
    for key in FREE_PERFORMANCE_KEYS:
        content["performance"].pop(key)
    if content["init_from"] is None:  # as in checkpoints that know no such key
        del content["init_from"]
    for key in FREE_DATA_KEYS:
        content["data"].pop(key)
    for stage in content["stages"]:
        for key in FREE_STAGE_KEYS:
            stage.pop(key)
    return {**content, "evaluation": {"num_progress_clips": progress_clips}}  # they are kept out of training


def base_models(config: RunConfig) -> dict[str, dict[str, str]]:
    """Name of the pretrained models that a run starts from, and their content's hash or, from the hub, their commit."""
    found = {}
    for part in ("language_model", "audio_encoder"):
        name = getattr(config.model, part)
        folder = Path(resolve_model(name))
        if folder.is_dir():
            files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")])
            digest = hashlib.sha256("".join(sha256_file(path) for path in files).encode()).hexdigest()
            found[part] = {"name": name, "sha256": digest}
        else:
            found[part] = {"name": name, "commit": hub_commit(name)}
    return found
