"""Tokens around the audio: two rows train and no others, they are saved, and inference writes them too."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from ultravox.audio.waveform import load_waveform
from ultravox.config.schema import RunConfig
from ultravox.data.prompts import render_prompt, user_message
from ultravox.model.boundaries import AUDIO_END_TOKEN, AUDIO_START_TOKEN, with_boundaries
from ultravox.model.factory import build_model, build_processor, load_language_model, load_model
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.tune import TuneTask


def config_of(parts, run_dir, share=None, **changes):
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    content["model"]["audio_boundaries"] = True
    for stage in content["stages"]:
        stage["max_steps"], stage["optim"]["warmup_steps"] = 4, 1
    content["stages"][1]["tune"]["boundary_share"] = share
    content["stages"][1] |= changes
    return RunConfig.model_validate(content)


def make_task(config):
    torch.manual_seed(0)
    model, processor = build_model(config.model), build_processor(config.model)
    task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[1], 1)
    return task, processor


def test_they_stand_around_each_placeholder_and_are_not_supervised():
    ids, marks = with_boundaries(np.array([5, 9, 6, 9, 7]), np.array([0, 0, 0, 0, 1], dtype=bool), 9, [11, 12])
    assert ids.tolist() == [5, 11, 9, 12, 6, 11, 9, 12, 7]
    assert marks.tolist() == [False] * 8 + [True]
    ids, marks = with_boundaries(np.array([9, 9]), np.array([False, True]), 9, [11, 12])
    assert ids.tolist() == [11, 9, 12, 11, 9, 12]


def test_the_table_grows_by_them_and_is_the_base_models_otherwise(parts, tmp_path):
    config = config_of(parts, tmp_path)
    model, processor = build_model(config.model), build_processor(config.model)
    start, end = processor.tokenizer.convert_tokens_to_ids([AUDIO_START_TOKEN, AUDIO_END_TOKEN])
    assert model.config.audio_boundary_ids == [start, end]
    for token, number in ((AUDIO_START_TOKEN, start), (AUDIO_END_TOKEN, end)):
        assert processor.tokenizer.encode(token, add_special_tokens=False) == [number]
    base = load_language_model(str(parts[0][0])).get_input_embeddings().weight
    table = model.get_input_embeddings().weight
    assert len(table) == end + 1 > len(base)
    assert torch.equal(table[: len(base)], base)
    assert torch.allclose(table[[start, end]], base.mean(0).expand(2, -1), atol=1e-6)
    assert not table.requires_grad
    assert model.audio_boundaries.weight.requires_grad


@pytest.mark.parametrize("packing", ["on", "off"])
def test_only_their_rows_train(parts, tmp_path, packing):
    task, _ = make_task(config_of(parts, tmp_path, packing=packing, accumulation_steps=1))
    task.parameter_groups()
    task.train_mode()
    task.loss(task.batch()).sum.backward()
    gradient = task.model.audio_boundaries.weight.grad
    assert gradient.abs().sum(1).min() > 0
    assert task.model.get_input_embeddings().weight.grad is None


def test_a_share_of_the_clips_has_them(parts, tmp_path):
    task, _ = make_task(config_of(parts, tmp_path, share=0.5))
    rows = task.batch().input_ids
    has = [task.boundary_ids[0] in ids for ids in rows]
    assert 0 < sum(has) < len(has)
    assert all((task.boundary_ids[1] in ids) == there for ids, there in zip(rows, has, strict=True))
    whole = make_task(config_of(parts, tmp_path))[0].batch().input_ids
    assert all(task.boundary_ids[0] in ids for ids in whole)
    assert {len(ids) - 1 for ids in whole} <= set(task.text_tokens.reshape(-1).tolist())


def test_a_run_saves_them_and_inference_uses_them(parts, tmp_path):
    config = config_of(parts, tmp_path / "run")
    run_training(config)
    model, processor = load_model(tmp_path / "run")
    assert model.audio_boundaries is None
    assert processor.audio_boundaries
    ids = model.config.audio_boundary_ids
    table = model.get_input_embeddings().weight
    base = load_language_model(str(parts[0][0])).get_input_embeddings().weight
    assert torch.equal(table[: len(base)], base)
    assert (table[ids] - base.mean(0)).abs().max() > 1e-4, "they have trained"
    assert "audio_boundaries.weight" not in model.state_dict()

    # the very prompt that training makes of a clip
    row = json.loads((parts[1] / "train.jsonl").read_text().splitlines()[0])
    waveform = load_waveform(parts[1] / row["audio"])
    prompt = render_prompt(processor.tokenizer, [user_message("Transcribe")])
    inputs = processor(text=prompt, audio=waveform)
    task, _ = make_task(config_of(parts, tmp_path / "other"))
    example = next(example for example in task.examples if example.id == row["id"])
    bounded = task.first_versions([example])
    written = bounded.input_ids[0][~bounded.supervised[0]]
    counts = np.where(written == task.audio_token_id, bounded.audio_tokens[0][0], 1)
    assert inputs["input_ids"][0].tolist() == np.repeat(written, counts)[: inputs["input_ids"].shape[1]].tolist()
    assert set(ids) <= set(inputs["input_ids"][0].tolist())
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not set(ids) & set(output[0].tolist()[-8:])


def test_a_share_without_the_tokens_is_refused(parts, tmp_path):
    content = config_of(parts, tmp_path, share=0.5).model_dump(mode="json")
    content["model"]["audio_boundaries"] = False
    with pytest.raises(ValueError, match=r"boundary_share, but model\.audio_boundaries is false"):
        RunConfig.model_validate(content)


def test_a_run_resumes_exactly(parts, tmp_path):
    config = config_of(parts, tmp_path / "whole", share=0.7, checkpoint_every=2)
    run_training(config)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(sorted((tmp_path / "again" / "checkpoints").iterdir())[-1])
    run_training(config_of(parts, tmp_path / "again", share=0.7, checkpoint_every=2), resume=True)
    first, second = (load_model(tmp_path / name)[0].state_dict() for name in ("whole", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
