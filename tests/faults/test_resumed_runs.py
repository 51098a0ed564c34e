"""Cases 7 and 8: a run that goes on, in mid-epoch or where one ends, is the run that was not stopped. Case 10."""

import json
import shutil

import pytest
from faulty_runs import config_for, losses_of, one_line, write_rows, written
from tiny_run import WAVEFORM

from ultravox.training.checkpoint import list_checkpoints
from ultravox.training.run import run_training

STEPS = 28
COMPARED = 20


@pytest.fixture(scope="module")
def dropping(parts, tmp_path_factory):
    """The tiny models, of which the language model drops out attention."""
    (language_model, whisper), tones = parts
    folder = tmp_path_factory.mktemp("dropping") / "llm"
    shutil.copytree(language_model, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "attention_dropout": 0.1}))
    return (folder, whisper), tones


def config_of(parts, run_dir, workers):
    """Augmented waveforms and features, decoded anew each time, and a checkpoint after every step."""
    augment = {"time_masks": 1, "max_time_mask_seconds": 0.1, "channel_masks": 1, "noise_std": 0.05}
    stage = {
        "checkpoint_every": 1,
        "max_batch_tokens": 60,
        "accumulation_steps": 1,
        "augment": augment | {"waveform": WAVEFORM},
    }
    options = {"cache": "none", "loader": {"workers": workers}, "source": {"max_clips": 9}}
    config = config_for(parts, parts[1], run_dir, steps=STEPS, stage=stage, **options)
    config.checkpoints.keep_last = STEPS
    config.logging.samples = True
    return config


def samples_of(run_dir):
    """(step from 0, micro-batch) → epoch and ids in their order."""
    (path,) = (run_dir / "samples").rglob("*.jsonl")
    found = [row for row in map(json.loads, path.read_text().splitlines()) if "step" in row]
    return {(row["step"], row["micro_batch"]): (row["epoch"], row["uids"]) for row in found}


def loop_of(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())["loop"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_losses_and_ids_are_those_of_the_run_that_was_not_stopped(dropping, tmp_path, workers):
    """Bit for bit, with augmentation and dropout; from the middle of an epoch and from its end."""
    whole = run_training(config_of(dropping, tmp_path / "whole", workers))
    found = list_checkpoints(whole, ["tune"])
    drawn = [json.loads((folder / "state.json").read_text())["random"]["torch"] for folder in found]
    assert len(set(drawn)) == STEPS, "each step drops out something"
    places = {loop["step"]: (loop["window"], loop["batch"]) for loop in map(loop_of, found)}
    early = [step for step in places if 2 <= step <= STEPS - COMPARED]
    middle = max(step for step in early if places[step][1] > 0)
    boundary = max(step for step in early if places[step] == (0, 0))
    for step in (middle, boundary):
        run = tmp_path / f"from-{step}"
        shutil.copytree(whole / "checkpoints", run / "checkpoints")
        shutil.copy(whole / "log.jsonl", run)
        for folder in list_checkpoints(run, ["tune"])[step:]:
            shutil.rmtree(folder)
        run_training(config_of(dropping, run, workers), resume=True)
        assert losses_of(run) == losses_of(whole)
        expected = {place: ids for place, ids in samples_of(whole).items() if place[0] >= step}
        assert samples_of(run) == expected
        assert len(expected) >= COMPARED


def test_a_manifest_that_has_changed_is_named(parts, rows, tmp_path, capsys):
    source = write_rows(tmp_path / "set.jsonl", rows)
    path = written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run", steps=1))
    run_training(config_for(parts, source, tmp_path / "run", steps=1))
    write_rows(source, [{**rows[0], "text": "two"}, *rows[1:]])
    line = one_line(["train", path, "--resume"], capsys)
    assert "the training data differs: " in line
    assert f"{source}" in line
