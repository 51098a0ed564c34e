"""Clips over 30 s: training cuts, counts and normalises them as the processor does, for every kind of encoder."""

import json

import numpy as np
import pytest
import torch
from tiny_run import save_tiny_models, save_tones, tiny_config

from ultravox.audio.lengths import num_audio_tokens
from ultravox.audio.waveform import load_waveform, write_waveform
from ultravox.data.manifest import Clip, write_dataset
from ultravox.data.sources import load_clips
from ultravox.model.factory import build_model, build_processor, load_model
from ultravox.training.features import Features
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech

SECONDS = (30.01, 30.0, 31.0, 60.02, 2.0)


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("long"))[0]


def config_for(llama, encoder, tones, run_dir, **model):
    config = tiny_config((llama, encoder), tones, run_dir).model_dump(mode="json")
    config["model"] |= {"stack_factor": 5, **model}
    config["data"] |= {"sources": config["data"]["sources"][:1], "speeds": [1.0], "max_audio_seconds": 120}
    config["stages"] = config["stages"][1:]
    config["stages"][0] |= {"max_steps": 3, "accumulation_steps": 1, "max_batch_tokens": 2000}
    config["stages"][0]["optim"]["warmup_steps"] = 0
    return type(tiny_config((llama, encoder), tones, run_dir)).model_validate(config)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_training_and_the_processor_agree(tiny_models, llama, make_waveform, encoder, live, tmp_path):
    lora = {"audio_encoder_lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]}} if live else {}
    config = config_for(llama, getattr(tiny_models, encoder), tmp_path, tmp_path / "run", **lora).model
    model, processor = build_model(config).eval(), build_processor(config)
    features = Features(model, "float32")
    assert features.trains == live
    waveforms = [make_waveform(seconds, seed) + 0.05 * seed for seed, seconds in enumerate(SECONDS)]
    cached = features.encode(waveforms)
    for waveform, rows in zip(waveforms, cached, strict=True):
        batch = processor(audio=waveform)
        with torch.no_grad():
            expected, lengths = model.encode_audio(batch["audio_values"], batch["audio_lens"])
            pieces = [torch.from_numpy(piece) for piece in features.slots.split(rows)]
            if live:
                assert [len(piece) for piece in pieces] == batch["audio_lens"].tolist()
                pieces = [model.encode_audio(piece.T[None], torch.tensor([len(piece)]))[0][0] for piece in pieces]
        assert [len(piece) for piece in pieces] == lengths.tolist()
        assert [-(-len(piece) // 5) for piece in pieces] == processor.window_tokens(len(waveform))
        for piece, frames in zip(pieces, expected, strict=True):
            torch.testing.assert_close(piece, frames[: len(piece)], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_a_run_on_clips_over_thirty_seconds(tiny_models, llama, tmp_path, encoder):
    tones = save_tones(tmp_path / "tones", 4)
    clips = []
    for clip, seconds in zip(load_clips(str(tones), "train"), (30.01, 31.0, 30.02, 1.0), strict=True):
        waveform = 0.1 * np.sin(np.arange(round(seconds * 16000)) / 7).astype(np.float32)
        write_waveform(clip.audio, waveform)
        clips.append(Clip(clip.id, clip.audio, clip.text, seconds, "tones", "CC0", clip.answer))
    write_dataset(tones, name="tones", licence="CC0", attribution="synthetic", splits={"train": clips})
    config = config_for(llama, getattr(tiny_models, encoder), tones, tmp_path / "run")
    run_training(config)
    model, processor = build_model(config.model), build_processor(config.model)
    for example in prepare_speech(config, model, processor).examples:
        waveform = load_waveform(tones / "audio" / f"{example.id[-3:]}.wav")
        (frames,) = example.versions[0].frames
        tokens = [num_audio_tokens(count, 5) for count in frames]
        assert tokens == processor.window_tokens(len(waveform))
    summary = json.loads((tmp_path / "run" / "train.json").read_text())
    assert summary["num_clips"] == 4
    assert summary["stages"][0]["steps"] == 3
    model, processor = load_model(tmp_path / "run")
    waveform = 0.1 * np.sin(np.arange(480_160) / 7).astype(np.float32)
    batch = processor(text="<|audio|>Transcribe", audio=waveform)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
