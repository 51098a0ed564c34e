"""Distillation: the teacher is the base model on the transcript, and a run learns from it, kept or read anew."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_run import tiny_config
from transformers import LlamaForCausalLM

from ultravox.config.schema import RunConfig
from ultravox.data.collate import loss_mask
from ultravox.errors import ConfigError, DataError
from ultravox.model.adapters import lora_layers, merged_lora, without_adapters
from ultravox.model.factory import build_model, build_processor, load_language_model
from ultravox.training import teacher as teachers
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.tune import TuneTask


def distilling(parts, run_dir, tune=None, **stage_changes):
    config = tiny_config(*parts, run_dir).model_dump(mode="json")
    (stage,) = config["stages"] = config["stages"][1:]
    stage["max_steps"], stage["optim"]["warmup_steps"] = 4, 1
    stage["tune"] = tune or {"cross_entropy_weight": 0.0, "distillation": {"weight": 1.0}}
    stage.update(stage_changes)
    return RunConfig.model_validate(config)


def make_task(config):
    torch.manual_seed(0)
    model, processor = build_model(config.model), build_processor(config.model)
    task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[0], 1)
    for layer in lora_layers(model).values():  # as if it had been trained
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    task.train_mode()
    return task


def losses(run_dir):
    rows = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["distillation"], row["cross_entropy"]) for row in rows if "loss" in row]


def test_the_teacher_is_the_base_model_on_the_transcript(parts, tmp_path):
    task = make_task(distilling(parts, tmp_path))
    batch = task.batch()
    base = load_language_model(str(parts[0][0]))
    assert len(batch.as_text) == len(batch.ids) > 3
    for dialogue, ids, supervised in zip(batch.as_text, batch.input_ids, batch.supervised, strict=True):
        read = task.tokenizer.decode(dialogue.input_ids)
        assert "<|audio|>" not in read
        assert "<|audio|>" in task.tokenizer.decode(ids)
        assert dialogue.input_ids[dialogue.supervised].tolist() == ids[supervised].tolist()
        logits = base(torch.from_numpy(dialogue.input_ids)[None]).logits[0]
        places = np.flatnonzero(loss_mask(dialogue.input_ids, dialogue.supervised, -1, "response"))
        found = task.teacher.logits(task.teacher.hidden([dialogue]))
        assert torch.allclose(found, logits[places - 1], atol=1e-4)
        assert task.tokenizer.decode(task.teacher.targets(dialogue)) == task.tokenizer.decode(ids[supervised])


def test_the_text_stands_where_the_audio_is_heard(parts, tmp_path):
    task = make_task(distilling(parts, tmp_path))
    rows = map(json.loads, (parts[1] / "train.jsonl").read_text().splitlines())
    texts = {row["id"]: row["text"] for row in rows}
    batch = task.batch()
    prompts = [task.tokenizer.decode(dialogue.input_ids[~dialogue.supervised]) for dialogue in batch.as_text]
    assert all(texts[name] in prompt for name, prompt in zip(batch.ids, prompts, strict=True))


@pytest.mark.parametrize("packing", ["on", "off"])
def test_the_divergence_is_of_the_same_tokens(parts, tmp_path, packing):
    """Packed or not, in a batch: the sum over rows, each by itself through plain logits and torch's own functions."""
    task = make_task(distilling(parts, tmp_path, packing=packing, augment={}))
    batch = task.batch()
    output = task._loss(batch)
    total = 0.0
    with torch.no_grad():
        for row, dialogue in enumerate(batch.as_text):
            (ids,) = [batch.input_ids[row]]
            audio, counts = task.audio_embeddings(batch, augmented=False)
            repeats = np.where(ids == task.audio_token_id, int(counts[row]), 1)
            supervised = np.repeat(batch.supervised[row], repeats)
            whole = torch.from_numpy(np.repeat(ids, repeats))[None]
            inputs = task.model.embed(whole, audio[row : row + 1], counts[row : row + 1])
            student = task.model.language_model(inputs_embeds=inputs).logits[0][np.flatnonzero(supervised) - 1]
            with without_adapters(task.model.language_model):
                read = task.model.language_model(torch.from_numpy(dialogue.input_ids)[None]).logits[0]
            teacher = read[np.flatnonzero(dialogue.supervised) - 1]
            total += 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="sum")
    assert output.sum.item() == pytest.approx(float(total), rel=1e-4)
    assert output.means["distillation"][0] == pytest.approx(float(total), rel=1e-4)
    assert output.count == sum(int(dialogue.supervised.sum()) for dialogue in batch.as_text)


def test_the_end_of_the_turn_counts_as_asked(parts, tmp_path):
    plain = make_task(distilling(parts, tmp_path))
    tune = {"cross_entropy_weight": 0.0, "distillation": {"weight": 1.0, "end_of_turn_weight": 0.0}}
    without = make_task(distilling(parts, tmp_path, tune))
    batch = plain.batch()
    where = np.cumsum([int(dialogue.supervised.sum()) for dialogue in batch.as_text]) - 1
    targets = np.concatenate([plain.teacher.targets(dialogue) for dialogue in batch.as_text])
    _, emphasis = without._teacher_states(without.teacher, batch, torch.arange(len(targets)), torch.tensor(targets))
    assert np.flatnonzero(emphasis.numpy() == 0).tolist() == where.tolist()
    assert without._loss(without.batch()).sum.item() < plain._loss(plain.batch()).sum.item()


def test_adapters_come_back_and_merged_ones_are_refused(parts, tmp_path):
    task = make_task(distilling(parts, tmp_path))
    model = task.model.language_model
    with without_adapters(model):
        assert all(layer.merged for layer in lora_layers(model).values())
    assert not any(layer.merged for layer in lora_layers(model).values())
    with merged_lora(model), pytest.raises(ConfigError, match="merged"), without_adapters(model):
        pass
    was = [module.training for module in model.modules()]
    task.teacher.hidden(task.batch().as_text[:1])
    assert [module.training for module in model.modules()] == was


def test_a_teacher_reads_a_dialogue_once(parts, tmp_path):
    task = make_task(distilling(parts, tmp_path))
    dialogues = task.batch().as_text
    first = task.teacher.hidden(dialogues)
    passes = task.teacher.num_passes
    assert torch.equal(task.teacher.hidden(dialogues), first)
    assert task.teacher.num_passes == passes
    forgetful = teachers.Teacher(task.model, "response", max_bytes=0)
    for _ in range(2):
        assert torch.equal(forgetful.hidden(dialogues), first)
    assert forgetful.num_passes == 2 * len(dialogues)
    assert not forgetful._kept
    small = teachers.Teacher(task.model, "response", max_bytes=first[:8].numel() * 4)
    small.hidden(dialogues)
    assert 0 < sum(kept.numel() * 4 for kept in small._kept.values()) <= small.max_bytes


@pytest.fixture
def opinionated(parts, tmp_path):
    """The same parts with a language model that is sure of what it says, so that it has something to teach."""
    folder = tmp_path / "llm"
    shutil.copytree(parts[0][0], folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data *= 30
    model.save_pretrained(folder)
    return (folder, parts[0][1]), parts[1]


def test_a_run_learns_from_its_teacher(opinionated, tmp_path):
    tune = {"cross_entropy_weight": 0.0, "distillation": {"weight": 1.0}}
    run_training(distilling(opinionated, tmp_path / "run", tune, max_steps=40))
    found = losses(tmp_path / "run")
    assert np.mean([row[2] for row in found[-5:]]) < 0.8 * np.mean([row[2] for row in found[:5]])
    assert all(row[1] == pytest.approx(row[2], rel=1e-4) for row in found)


def test_a_run_resumes_exactly_whatever_its_teacher_has_kept(opinionated, tmp_path, monkeypatch):
    parts, tune = opinionated, {"cross_entropy_weight": 0.5, "distillation": {"weight": 1.0}}
    run_training(
        distilling(
            parts,
            tmp_path / "forgetful",
            {**tune, "distillation": {"weight": 1.0, "teacher_cache_gb": 0.0}},
            max_steps=6,
        )
    )
    short = distilling(parts, tmp_path / "short", tune, max_steps=6)
    inner, calls = TuneTask.loss, []

    def loss(self, batch):
        calls.append(batch)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TuneTask, "loss", loss)
        with pytest.raises(TrainingInterrupted):
            run_training(short)
    run_training(short, resume=True)
    assert losses(tmp_path / "short") == losses(tmp_path / "forgetful")
    assert all(row[1] == pytest.approx(0.5 * row[3] + row[2], rel=1e-4) for row in losses(tmp_path / "short"))


def test_a_missing_transcript_is_an_error_before_anything_loads(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("ultravox.training.run.build_model", lambda config: pytest.fail("the model was loaded"))
    rows = [json.loads(line) for line in (parts[1] / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = str(parts[1] / row["audio"])
    rows[20]["text"] = ""
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = distilling(parts, tmp_path / "run").model_dump(mode="json")
    config["data"]["sources"] = [{"name": str(manifest), "task": "answer"}]
    with pytest.raises(DataError, match=r"row tone-020 has no transcript, which the teacher .* distillation.weight"):
        run_training(RunConfig.model_validate(config))


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"cross_entropy_weight": 0.0}, "both 0, so that nothing is learnt"),
        ({"distillation": {"weight": 1.0}, "loss_mask": "all_text"}, "teacher and student share"),
        ({"distillation": {"temperature": 3.0}}, "no effect while distillation.weight is 0"),
        ({"label_smoothing": 0.1, "cross_entropy_weight": 0.0, "distillation": {"weight": 1.0}}, "whose weight is 0"),
    ],
)
def test_what_cannot_go_together_is_refused(parts, tmp_path, tune, message):
    with pytest.raises(ValueError, match=message):
        distilling(parts, tmp_path, tune)


def test_smoothing_and_z_loss_train(parts, tmp_path):
    run_training(distilling(parts, tmp_path / "run", {"label_smoothing": 0.1, "z_loss_weight": 1e-3}, max_steps=2))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert all(row["loss"] > row["cross_entropy"] for row in rows)
    assert all(row["perplexity"] == pytest.approx(np.exp(row["cross_entropy"])) for row in rows)
