"""Healthy tiny runs of several kinds, and what was found of each check."""

from pathlib import Path

from tiny_run import tiny_config

from ultravox.config.schema import RunConfig
from ultravox.diagnosis.finding import Diagnosis, Status


def config_of(parts, tmp_path: Path, kind: str = "aligned", **changes) -> RunConfig:
    """Aligned first, tuned at once, with an encoder that trains, from a teacher ("taught"), or long ("learnt")."""
    models, tones = parts
    content = tiny_config(models, tones, tmp_path / "run", **changes).model_dump(mode="json")
    content["evaluation"]["num_progress_clips"] = 12
    if kind == "tuned":
        content["stages"] = content["stages"][1:]
        content["stages"][0] |= {"packing": "off", "tune": {"loss_mask": "assistant_turns"}}
        content["data"]["speeds"] = [1.0]
        content["model"]["language_model_lora"]["rank"] = 8
    if kind == "encoder":
        content["model"]["train_audio_encoder"] = True
        content["stages"][1]["augment"] = {"waveform": {"noise_share": 0.5}}
    if kind == "taught":
        content["model"]["language_model_lora"]["rank"] = 4
        content["stages"][1]["tune"] = {"distillation": {"weight": 0.5}}
        masks = {"time_masks": 2, "max_time_mask_seconds": 0.2, "channel_masks": 1, "max_channel_mask_share": 0.1}
        content["stages"][1]["augment"] = {**masks, "noise_std": 0.1}
    if kind == "learnt":
        content["data"] |= {"sources": content["data"]["sources"][:1], "speeds": [1.0]}
        for stage, steps in zip(content["stages"], (300, 80), strict=True):
            stage |= {"max_steps": steps, "augment": {}, "accumulation_steps": 1, "log_every": 2}
    return RunConfig.model_validate(content)


def statuses(found: Diagnosis) -> dict[int, Status]:
    """Number of each check → how it came out."""
    return {result.check.number: result.status for result in found.results}
