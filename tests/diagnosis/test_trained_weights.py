"""Checks 11 and 12, on the weights and the log of a run that has been."""

import json
import shutil

import numpy as np
import pytest
from diagnosed import config_of, statuses
from planted_bugs import swapped_pairs

from ultravox.diagnosis.finding import Status
from ultravox.diagnosis.run import diagnose
from ultravox.diagnosis.trained_checks import read_losses, slope_interval, theil_sen
from ultravox.errors import CheckpointError, DataError
from ultravox.training.run import run_training


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """A config and the folder of its run, which has learnt to hear some of its words."""
    from ultravox.files import ultravox_home

    folder = tmp_path_factory.mktemp("learnt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "home"))
        assert ultravox_home().name == "home"
        config = config_of(parts, folder, "learnt")
        return config, run_training(config)


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_run_that_hears(run):
    config, folder = run
    before = files_of(folder)
    found = diagnose(config, "learnt", checkpoint=folder)
    assert found.healthy, found.verdict
    unasked = {number for number, status in statuses(found).items() if status == Status.SKIP}
    assert unasked == {16, 17}, "it has no teacher and does not augment"
    assert files_of(folder) == before, "nothing is written into the run's folder"
    losses = found.results[10].finding.numbers["losses"]
    assert losses["U"] < losses["A"] < losses["S"]
    assert losses["A"] < losses["N"]
    assert 0 < found.results[10].finding.numbers["audio_use"] < 1


def test_held_out_clips_with_each_others_audio(run, monkeypatch):
    """Whether the pairs were wrong in training or are wrong here, the audio does not tell the text."""
    config, folder = run
    swapped_pairs(monkeypatch)
    (result,) = diagnose(config, "swapped", numbers=[11], checkpoint=folder).results
    assert result.status == Status.FAIL
    assert result.finding.numbers["interval"][0] <= 0
    assert "includes 0" in result.finding.evidence


def test_a_loss_that_is_flat_is_no_bug(run, tmp_path):
    config, folder = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    noise = np.random.default_rng(0).normal(0, 0.05, size=200)
    rows = [{"stage": "tune", "step": step, "loss": 1 + noise[step]} for step in range(200)]
    (copy / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = diagnose(config, "flat", numbers=[11, 12], checkpoint=copy)
    assert statuses(found) == {11: Status.PASS, 12: Status.WARN}
    assert found.healthy
    assert found.verdict.startswith("Not a bug: ")
    for row in rows[100:]:
        row["loss"] += (row["step"] - 100) * 0.01
    (copy / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rising = diagnose(config, "rising", numbers=[12], checkpoint=copy)
    assert statuses(rising) == {12: Status.FAIL}
    (copy / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    assert statuses(diagnose(config, "short", numbers=[12], checkpoint=copy)) == {12: Status.SKIP}


def test_folders_that_are_no_run_of_the_config(run, parts, tmp_path):
    config, folder = run
    with pytest.raises(CheckpointError, match="no run folder"):
        diagnose(config, "none", numbers=[11], checkpoint=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint of the stage 'tune'"):
        diagnose(config, "none", numbers=[11], checkpoint=tmp_path)
    content = config.model_dump(mode="json")
    content["model"]["language_model_lora"]["rank"] = 2
    with pytest.raises(CheckpointError, match=r"language_model_lora.rank was 4, is 2"):
        diagnose(type(config).model_validate(content), "other", numbers=[11], checkpoint=folder)


def test_slopes():
    steps = np.arange(60.0)
    assert theil_sen(steps, 3 - 0.5 * steps) == pytest.approx(-0.5)
    outlier = 3 - 0.5 * steps
    outlier[7] = 1e6
    assert theil_sen(steps, outlier) == pytest.approx(-0.5)


def test_an_interval_holds_the_slope_about_as_often_as_it_says():
    """Noise that depends on its neighbours, as a loss curve's does: blocks keep that."""
    steps, random, held = np.arange(60.0), np.random.default_rng(1), 0
    for trial in range(40):
        noise = np.convolve(random.normal(size=62), np.ones(3) / 3, mode="valid")
        low, high = slope_interval(steps, -0.01 * steps + 0.1 * noise, seed=trial, num_samples=200)[1]
        held += low <= -0.01 <= high
        assert low < high
    assert held >= 28


def test_logs_that_are_none(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_losses(tmp_path / "log.jsonl", "tune")
    (tmp_path / "log.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_losses(tmp_path / "log.jsonl", "tune")
