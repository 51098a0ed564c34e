"""Each planted bug is named by the check that is made for it, and a healthy run by none."""

import pytest
from planted_bugs import BUGS, detached_projector, leaked_text
from tiny_run import tiny_config

from ultravox.diagnosis.finding import Status
from ultravox.diagnosis.run import diagnose


def config_of(parts, tmp_path, kind="aligned", **changes):
    """Three kinds of healthy runs: aligned first, tuned at once, with an encoder that trains."""
    models, tones = parts
    config = tiny_config(models, tones, tmp_path / "run", **changes)
    content = config.model_dump(mode="json")
    content["evaluation"]["num_progress_clips"] = 8
    if kind == "tuned":
        content["stages"] = content["stages"][1:]
        content["stages"][0] |= {"packing": "off", "tune": {"loss_mask": "assistant_turns"}}
        content["data"]["speeds"] = [1.0]
        content["model"]["language_model_lora"]["rank"] = 8
    if kind == "encoder":
        content["model"]["train_audio_encoder"] = True
        content["stages"][1]["augment"] = {"waveform": {"noise": {"probability": 0.5}}}
    return type(config).model_validate(content)


def statuses(found):
    return {result.check.number: result.status for result in found.results}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_named(bug, parts, tmp_path, monkeypatch):
    number = BUGS[bug]
    config = config_of(parts, tmp_path)
    bug(monkeypatch)
    found = diagnose(config, "planted", numbers=[number])
    (result,) = found.results
    assert result.status == Status.FAIL, result.finding.evidence
    assert result.finding.cause
    assert result.finding.action
    assert "could not be carried through" not in result.finding.evidence
    assert not found.healthy
    assert f"check {number} " in found.verdict
    assert str(result.check.blame) in found.verdict


@pytest.mark.parametrize("kind", ["aligned", "tuned", "encoder"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_has_no_fault(kind, seed, parts, tmp_path):
    found = diagnose(config_of(parts, tmp_path, kind, seed=seed), "healthy")
    assert found.healthy, found.verdict
    assert {number for number, status in statuses(found).items() if status == Status.SKIP} == {11, 12}
    assert [result.check.number for result in found.results] == list(range(1, 16))
    assert "No fault found in 13 checks" in found.verdict
    assert not (tmp_path / "run").exists(), "nothing is written into the run's folder"
