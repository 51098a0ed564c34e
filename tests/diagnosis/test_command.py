"""`ultravox diagnose` on the command line: what it prints and writes, and how it ends."""

import json
import re
from pathlib import Path

import pytest
import yaml
from diagnosed import config_of
from planted_bugs import detached_projector

from ultravox.cli.main import main
from ultravox.diagnosis.finding import Blame, Check, Diagnosis, Result, failed, passed, skipped, warned
from ultravox.diagnosis.registry import CHECKS


@pytest.fixture
def config_file(parts, tmp_path):
    path = tmp_path / "tiny.yaml"
    content = config_of(parts, tmp_path).model_dump(mode="json")
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def test_a_healthy_run(config_file, tmp_path, capsys):
    words = ["--checks", "1,2,4", "--json", str(tmp_path / "d.json"), "--html", str(tmp_path / "d.html")]
    assert main(["diagnose", str(config_file), *words]) == 0
    printed = capsys.readouterr()
    assert "PASS  1 a batch, read" in printed.out
    assert "⟦" in printed.out, "a batch, as a person would read it"
    assert "No fault found in 3 checks" in printed.out
    assert "check 2: placeholders = frames" in printed.err
    found = json.loads((tmp_path / "d.json").read_text())
    assert (found["version"], found["healthy"], found["stage"]) == (1, True, "tune")
    assert [check["check"] for check in found["checks"]] == [1, 2, 4]
    assert all(check["seconds"] >= 0 and check["evidence"] for check in found["checks"])
    page = (tmp_path / "d.html").read_text()
    assert "a batch, read" in page
    assert "&lt;|audio|&gt; ×" in page, "texts are escaped"
    assert not (tmp_path / "run").exists()


def test_a_fault(config_file, capsys, monkeypatch):
    detached_projector(monkeypatch)
    assert main(["diagnose", str(config_file), "--checks", "6"]) == 1
    printed = capsys.readouterr()
    assert "FAIL  6 what trains" in printed.out
    assert "no gradient reaches projector" in printed.out
    assert "probable cause: the graph is cut" in printed.out
    assert "It is real: a part that does not train" in printed.out
    assert "failed: check 6" in printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checks", "19"], "there is no check 19: choose from 1, 2"),
        (["--checks", "one"], "expected numbers such as 1,2,5"),
        (["--checkpoint", "nowhere"], "nowhere is no run folder"),
        (["--seeds", "1"], "seed"),
        (["--html", "."], "is a folder"),
    ],
)
def test_bad_input(words, said, config_file, capsys):
    assert main(["diagnose", str(config_file), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_an_override_counts(config_file, capsys):
    assert main(["diagnose", str(config_file), "--checks", "4", "--stages.tune.optim.lr.projector", "0.002"]) == 0
    assert main(["diagnose", str(config_file), "--checks", "13", "--stages.tune.optim.lr.projector", "1"]) in (0, 1)
    assert main(["diagnose", str(config_file), "--checks", "13", "--stages.tune.optim.lr.language_model", "1"]) == 1
    assert "at or above divergence" in capsys.readouterr().out


def test_the_help_names_every_check(capsys):
    assert main(["diagnose", "--help"]) == 0
    printed = capsys.readouterr().out
    assert [check.number for check in CHECKS] == list(range(1, len(CHECKS) + 1))
    assert len(CHECKS) >= 15
    for check in CHECKS:
        assert check.name in printed


def test_the_page_of_the_docs_names_every_check():
    page = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert rows == [(str(check.number), check.name) for check in CHECKS]


def diagnosis_of(outcomes, checkpoint="run"):
    """Findings by the numbers of the checks."""
    known = {check.number: check for check in CHECKS}
    return Diagnosis("c", "tune", checkpoint, [Result(known[n], finding, 0.0) for n, finding in outcomes.items()], 1.0)


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (
            {1: failed("e", "c", "a"), 8: failed("e", "c", "a")},
            "a data or label bug (check 1 a batch, read). Mend that",
        ),
        ({2: failed("e", "c", "a"), 5: failed("e", "c", "a")}, "(checks 2 placeholders = frames, 5 shift scan)"),
        ({8: failed("e", "c", "a"), 9: skipped("s")}, "a fault in the model or the optimizer (check 8"),
        ({8: passed("e"), 9: failed("e", "c", "a")}, "audio that is not used (check 9"),
        ({11: passed("e"), 12: warned("e", "c", "a")}, "Not a bug"),
        ({11: passed("e"), 12: passed("e")}, "the loss still falls"),
        ({1: passed("e"), 12: skipped("s")}, "No fault found in 1 checks."),
    ],
)
def test_verdicts(outcomes, said):
    found = diagnosis_of(outcomes)
    assert said in found.verdict
    assert found.healthy == (not any(result.status == "FAIL" for result in found.results))


def test_a_check_that_breaks_is_a_fault_of_what_it_checks():
    from ultravox.diagnosis.run import ask

    def break_down(bench):
        raise ZeroDivisionError("by 0")

    result = ask(Check(16, "breaks", "never", Blame.MODEL, break_down), None)
    assert result.status == "FAIL"
    assert "ZeroDivisionError: by 0" in result.finding.evidence


def test_when_no_check_could_be_asked_that_is_the_verdict(parts, tmp_path):
    from diagnosed import config_of

    from ultravox.diagnosis.run import diagnose

    found = diagnose(config_of(parts, tmp_path), "fresh", numbers=[11, 12])
    assert found.verdict.startswith("Nothing was looked at")
    assert "--checkpoint RUN" in found.verdict
