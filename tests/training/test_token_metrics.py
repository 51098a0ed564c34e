"""Token metrics of the task `tune`, in the logs and in the terminal."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_run import tiny_config

from ultravox.data.collate import collate_tokens, loss_mask
from ultravox.metrics.token_predictions import count_predictions, pool_predictions
from ultravox.model.adapters import add_lora
from ultravox.model.factory import build_model, build_processor
from ultravox.training.plateau import PlateauNotice
from ultravox.training.progress import TerminalProgress
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.trainer import StepRecord
from ultravox.training.tune import TuneTask

KEPT_OUT = {
    "kept_out_loss",
    "kept_out_token_accuracy",
    "swapped_token_accuracy",
    "audio_use_margin",
    "wer_tf",
    "cer_tf",
}


@pytest.fixture
def task(parts, tmp_path):
    models, tones = parts
    config = tiny_config(models, tones, tmp_path)
    model, processor = build_model(config.model), build_processor(config.model)
    return TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[1], 1)


def test_counts_are_those_of_the_plain_logits(task):
    task.model.eval()
    batch = task.batch()
    with torch.no_grad():
        found = task._forward(batch, training=False)[1]
        embeddings, lengths = task.audio_embeddings(batch, augmented=False)
        assert len(found) == len(batch.ids) > 3
        for row, (best, labels, _) in enumerate(found):
            ids, supervised = batch.input_ids[row], batch.supervised[row]
            tokens = collate_tokens(
                [batch.ids[row]],
                [ids],
                [loss_mask(ids, supervised, task.audio_token_id, "response")],
                [batch.audio_tokens[row]],
                audio_token_id=task.audio_token_id,
                pad_token_id=task.pad_token_id,
            )
            inputs = task.model.embed(tokens.input_ids, embeddings[row : row + 1], lengths[row : row + 1])
            logits = task.model.language_model(inputs_embeds=inputs).logits[0]
            places = (tokens.labels[0] != -100).nonzero()[:, 0]
            assert labels.tolist() == tokens.labels[0, places].tolist()
            assert best.tolist() == logits[places - 1].argmax(-1).tolist()
        output = task._loss(batch)
    expected = pool_predictions([count_predictions(best, labels, np.arange(len(best))) for best, labels, _ in found])
    assert output.count == output.predictions.num_positions == expected.num_positions
    assert output.predictions.hits.tolist() == expected.hits.tolist()


def test_another_clips_audio_stands_beside_a_rows_text(task, monkeypatch):
    """The swapped forward pass has every recording and every text once, and no row has its own."""
    seen = []
    forward = TuneTask._forward

    def watch(self, batch, *, training):
        output = forward(self, batch, training=training)
        seen.append((batch, training, output))
        return output

    monkeypatch.setattr(TuneTask, "_forward", watch)
    metrics = task.evaluate()
    (own, _, output), (swapped, training, swapped_output) = seen
    assert not training
    count = sum(len(labels) for _, labels, _ in output[1])
    assert metrics["kept_out_loss"] == pytest.approx(float(output[0]) / count)
    assert metrics["audio_use_margin"] == pytest.approx(float(swapped_output[0] - output[0]) / count, abs=1e-6)
    assert swapped.values is own.values
    assert swapped.audio_tokens == own.audio_tokens
    for index, ids in enumerate(swapped.input_ids):
        assert ids is own.input_ids[(index + 1) % len(own.ids)]


def test_a_run_logs_them(parts, tmp_path):
    models, tones = parts
    run_training(tiny_config(models, tones, tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    page = (Path(__file__).parents[2] / "docs" / "training-log.md").read_text()
    for key in sorted({key for row in rows for key in row}):
        of_parts = re.sub(r"_(projector|language_model|audio_encoder)$", "_<part>", key)
        assert f"`{of_parts}`" in page, f"{key} is not explained in docs/training-log.md"
    tune = [row for row in rows if row["stage"] == "tune" and "token_accuracy" in row]
    assert len(tune) == 40
    assert tune[-1]["token_accuracy"] > tune[0]["token_accuracy"]
    assert all(row["perplexity"] == pytest.approx(np.exp(row["loss"]), rel=1e-6) for row in tune)
    assert {"best_shift", "best_shift_accuracy", "acc_tol_1", "acc_aligned", "ter_tf"} <= set(tune[0])
    parts = {"align": ["projector"], "tune": ["projector", "language_model"]}
    for stage, names in parts.items():
        logged = [row for row in rows if row["stage"] == stage and "loss" in row]
        for name in names:
            assert all(row[f"grad_norm_{name}"] > 0 for row in logged)
            assert all(1e-6 < row[f"update_ratio_{name}"] < 0.5 for row in logged)
        squares = [sum(row[f"grad_norm_{name}"] ** 2 for name in names) for row in logged]
        assert squares == pytest.approx([row["grad_norm"] ** 2 for row in logged], rel=1e-4)
    (last,) = [row for row in rows if row["stage"] == "tune" and "wer" in row]
    assert set(last) >= KEPT_OUT
    assert abs(last["audio_use_margin"]) < 1  # so short a run learns the words' shares, not yet to hear them
    assert not any("token_accuracy" in row for row in rows if row["stage"] == "align")
    summary = json.loads((tmp_path / "run" / "train.json").read_text())["stages"][1]
    assert summary["final_audio_use_margin"] == pytest.approx(last["audio_use_margin"], abs=1e-6)


def test_an_adapter_on_the_output_layer_trains(task):
    """Only where the table is its own; the loss must go through the layer, not through its weight alone."""
    model = task.model.language_model
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight.data.copy_(model.lm_head.weight)
    model.set_output_embeddings(head)
    add_lora(model, 2, 4.0, ["lm_head"])
    torch.nn.init.normal_(model.lm_head.lora_B)
    task.train_mode()
    task._loss(task.batch()).sum.backward()
    assert model.lm_head.lora_A.grad.abs().max() > 0
    assert model.lm_head.lora_B.grad.abs().max() > 0


def look(notice: PlateauNotice, own: float, swapped: float) -> str:
    return notice.look({"kept_out_token_accuracy": own, "swapped_token_accuracy": swapped})


def test_the_plateau_is_told_once_and_so_is_leaving_it():
    notice = PlateauNotice()
    assert notice.look({"wer": 1.0}) == ""
    assert "goes by the text alone yet" in look(notice, 0.31, 0.30)
    assert look(notice, 0.33, 0.30) == ""
    assert look(notice, 0.40, 0.30) == ""
    assert "left the plateau" in look(notice, 0.55, 0.31)
    assert look(notice, 0.80, 0.31) == ""
    assert look(PlateauNotice(), 0.80, 0.31) == ""  # an aligned model is never on it


def terminal(records, evaluations=()) -> str:
    text = io.StringIO()
    progress = TerminalProgress("tune", 100, 10, Console(file=text, width=400))
    for record in records:
        progress.on_step(record)
    for metrics in evaluations:
        progress.on_evaluation("tune", 100, metrics)
    progress.close()
    return text.getvalue()


def test_labels_that_are_off_by_one_are_told_in_the_terminal():
    labels = np.arange(60)
    right = count_predictions(labels, labels, labels)
    shifted = count_predictions(np.append(labels[1:], 99), labels, labels)

    def steps(predictions):
        common = {"stage": "tune", "max_steps": 100, "loss": 1.0, "lr": {}, "grad_norm": 1.0, "audio_seconds": 1.0}
        return [
            StepRecord(step=step, num_tokens=9, elapsed_seconds=1.0 * step, predictions=predictions, **common)
            for step in range(1, 51)
        ]

    assert "off by" not in terminal(steps(right))
    said = terminal(steps(shifted))
    assert said.count("the labels are off by 1") == 1
    assert said.index("20/100") < said.index("off by 1") < said.index("30/100") or "tune 20  the best" in said
    assert "left the plateau" in terminal(
        [], [{"kept_out_token_accuracy": a, "swapped_token_accuracy": 0.3} for a in (0.3, 0.6)]
    )
