"""Each planted bug is named by the check that is made for it, and a healthy run by none."""

import pytest
from diagnosed import config_of, statuses
from planted_bugs import (
    BUGS,
    compounding_rate,
    deaf_projector,
    double_shift,
    frames_in_another_order,
    leaked_text,
    match_over_the_batch,
    next_token_seen,
    one_placeholder_too_many,
)

from ultravox.config.schema import RunConfig
from ultravox.diagnosis.finding import Status
from ultravox.diagnosis.run import diagnose

NOT_ASKED = {"aligned": {16}, "tuned": {16, 18}, "encoder": {16, 17}, "taught": set()}
"""Of each kind of run: it has no teacher, does not augment frames, or does not align."""
CAUSES = {
    compounding_rate: "does not take the schedule's rate as it is",
    next_token_seen: "a causal mask that lets a token see the next one",
    frames_in_another_order: "frames reshaped along the wrong axis",
}
"""Of bugs that another bug of the same check looks like."""


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_named(bug, parts, tmp_path, monkeypatch):
    number = BUGS[bug]
    config = config_of(parts, tmp_path, "taught" if number in (16, 17) else "aligned")
    bug(monkeypatch)
    found = diagnose(config, "planted", numbers=[number])
    (result,) = found.results
    assert result.status == Status.FAIL, result.finding.evidence
    assert result.finding.cause
    assert CAUSES.get(bug, "") in result.finding.cause
    assert result.finding.action
    assert "could not be carried through" not in result.finding.evidence
    assert not found.healthy
    assert f"check {number} " in found.verdict
    assert str(result.check.blame) in found.verdict


@pytest.mark.parametrize(
    ("kind", "seed"), [*((kind, seed) for kind in ("aligned", "tuned", "encoder") for seed in range(3)), ("taught", 0)]
)
def test_a_healthy_run_has_no_fault(kind, seed, parts, tmp_path):
    found = diagnose(config_of(parts, tmp_path, kind, seed=seed), "healthy")
    assert found.healthy, found.verdict
    skipped = {number for number, status in statuses(found).items() if status == Status.SKIP}
    assert skipped == {11, 12} | NOT_ASKED[kind]
    assert [result.check.number for result in found.results] == list(range(1, 19))
    assert f"No fault found in {18 - len(skipped)} checks" in found.verdict
    assert not (tmp_path / "run").exists(), "nothing is written into the run's folder"


@pytest.mark.parametrize(
    ("key", "changes"), [("model", {"dtype": "bfloat16"}), ("stage", {"tune": {"loss_mask": "all_text"}})]
)
def test_learning_by_heart_in_16_bits_and_where_prompts_count(key, changes, parts, tmp_path):
    content = config_of(parts, tmp_path).model_dump(mode="json")
    content["model"].update(changes) if key == "model" else content["stages"][1].update(changes)
    found = diagnose(RunConfig.model_validate(content), "healthy", numbers=[1, 5, 6, 8, 9, 10])
    assert found.healthy, found.verdict
    assert Status.SKIP not in statuses(found).values()


def test_positions_whose_number_depends_on_what_is_heard(parts, tmp_path):
    content = config_of(parts, tmp_path).model_dump(mode="json")
    content["model"]["projector"] = "ctc_compressed"
    found = diagnose(RunConfig.model_validate(content), "healthy", numbers=[2, 3, 5, 8, 9, 10])
    assert found.healthy, found.verdict
    assert Status.SKIP not in statuses(found).values()


def test_of_all_checks_the_verdict_names_the_cause(parts, tmp_path, monkeypatch):
    """A bug makes other checks fail too; what the verdict names first is the one to mend."""
    double_shift(monkeypatch)
    found = diagnose(config_of(parts, tmp_path), "planted")
    assert statuses(found)[5] == Status.FAIL
    assert found.verdict.startswith("It is real: a data or label bug (check 5 shift scan)")
    assert statuses(found)[1] == statuses(found)[2] == Status.PASS


def test_counts_that_do_not_fit_leave_nothing_to_train(parts, tmp_path, monkeypatch):
    one_placeholder_too_many(monkeypatch)
    found = diagnose(config_of(parts, tmp_path), "planted", numbers=[2, 3, 6, 8])
    assert statuses(found) == {2: Status.FAIL, 3: Status.FAIL, 6: Status.SKIP, 8: Status.SKIP}
    assert "see checks 2 and 3" in found.results[2].finding.evidence


def test_a_leak_is_learnt_without_audio(parts, tmp_path, monkeypatch):
    """A projector that tells nothing, of clips of one length: only the leaked text can tell the rows apart."""
    leaked_text(monkeypatch)
    deaf_projector(monkeypatch)
    content = config_of(parts, tmp_path).model_dump(mode="json")
    content["data"]["sources"] = content["data"]["sources"][:1]
    content["data"]["sources"][0]["filters"] |= {"min_seconds": 0.55, "max_seconds": 0.65}
    content["data"]["speeds"] = [1.0]
    found = diagnose(RunConfig.model_validate(content), "planted", numbers=[8, 9])
    assert statuses(found) == {8: Status.PASS, 9: Status.FAIL}
    assert "audio that is not used (check 9" in found.verdict


def test_which_shift_it_is(parts, tmp_path, monkeypatch):
    double_shift(monkeypatch)
    (result,) = diagnose(config_of(parts, tmp_path), "planted", numbers=[5]).results
    assert result.finding.numbers["fits_shift"] == 1
    assert "1 later (s = +1)" in result.finding.evidence


def alignment_alone(parts, tmp_path, projector="swiglu"):
    content = config_of(parts, tmp_path).model_dump(mode="json")
    content["model"]["projector"] = projector
    return RunConfig.model_validate(content | {"stages": content["stages"][:1]})


@pytest.mark.parametrize("projector", ["swiglu", "ctc_compressed"])
def test_an_alignment_alone_is_checked_as_far_as_it_goes(parts, tmp_path, projector):
    found = diagnose(alignment_alone(parts, tmp_path, projector), "align")
    assert found.healthy, found.verdict
    passed = {number for number, status in statuses(found).items() if status in (Status.PASS, Status.WARN)}
    assert passed == {4, 6, 7, 10, 13, 14, 15, 17, 18}
    assert "no stage with objective tune" in found.results[0].finding.evidence


def test_an_alignment_that_averages_over_the_batch_is_named(parts, tmp_path, monkeypatch):
    match_over_the_batch(monkeypatch)
    found = diagnose(alignment_alone(parts, tmp_path), "planted", numbers=[10, 14])
    assert statuses(found) == {10: Status.FAIL, 14: Status.FAIL}
