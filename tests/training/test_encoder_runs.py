"""Whole runs with encoders that are not Whisper: features of their own, cached, and lengths that all parts agree on."""

import json

import pytest
import torch
from tiny_run import tiny_config
from transformers import (
    AutoModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

from ultravox.inference.api import load
from ultravox.training.run import run_training

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CONVOLUTIONS = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
ENCODERS = {
    "wav2vec2-bert": (Wav2Vec2BertConfig(**SMALL, feature_projection_input_dim=160), SeamlessM4TFeatureExtractor()),
    "wavlm": (WavLMConfig(**SMALL, **CONVOLUTIONS, num_buckets=16), Wav2Vec2FeatureExtractor()),
}


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_run(name, trains, parts, tmp_path):
    (language_model, _), tones = parts
    config, extractor = ENCODERS[name]
    torch.manual_seed(2)
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    extractor.save_pretrained(tmp_path / "encoder")
    content = tiny_config((language_model, tmp_path / "encoder"), tones, tmp_path / "run").model_dump(mode="json")
    if trains:
        targets = ["linear_q", "linear_v"] if name == "wav2vec2-bert" else ["q_proj", "v_proj"]
        content["model"]["audio_encoder_lora"] = {"rank": 2, "target_modules": targets}
    for stage in content["stages"]:
        stage["max_steps"] = 4
    run_training(type(tiny_config((language_model, tmp_path / "encoder"), tones, tmp_path)).model_validate(content))
    stages = json.loads((tmp_path / "run" / "train.json").read_text())["stages"]
    assert [(stage["steps"], stage["skipped_steps"]) for stage in stages] == [(4, 0), (4, 0)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("update_ratio_audio_encoder" in row for row in rows) == trains
    model = load(tmp_path / "run")
    (text,) = model.transcribe([tones / "audio" / "000.wav"], max_new_tokens=4)
    assert isinstance(text, str)
