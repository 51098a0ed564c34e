"""``ultravox evaluate``: its arguments, its table, and where things go; the model is a fake."""

import json

import pytest

from ultravox.cli import main as cli
from ultravox.evaluation import loading
from ultravox.evaluation.system import System


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder and a dataset of two clips; ``load_system`` gives a model that always says the same."""
    import numpy as np
    import soundfile

    from ultravox.data.manifest import Clip, write_dataset

    data = tmp_path / "data"
    data.mkdir()
    clips = []
    for index, text in enumerate(("hello world", "good <b>bye</b> now")):
        soundfile.write(data / f"{index}.flac", np.full(8000, 0.1 * index, np.float32), 16000)
        clips.append(Clip(f"c{index}", data / f"{index}.flac", text, 0.5, "", "CC0"))
    write_dataset(data, name="two", licence="CC0", attribution="nobody", splits={"heldout": clips})
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "config.yaml").write_text(f"evaluation: {{source: '{data}', batch_size: 5, max_new_tokens: 9}}\n")
    seen = {}

    def load_system(checkpoint, **settings):
        seen.update(settings)
        return System(transcribe=lambda waveforms: ["hello world"] * len(waveforms))

    monkeypatch.setattr(loading, "load_system", load_system)
    return run, data, seen


def test_table_results_and_report(run, capsys):
    folder, _, seen = run
    assert cli.main(["evaluate", str(folder)]) == 0
    out = capsys.readouterr().out
    assert seen == {"batch_size": 5, "max_new_tokens": 9}  # from the run's config
    results = json.loads((folder / "results.json").read_text())
    assert f"{results['wer']['value']:.1%}" in out
    assert "audio use: FAIL" in out
    assert "absent" in out
    assert str(folder / "report.html") in out.replace("\n", "")
    assert "hello world" in (folder / "report.html").read_text()
    assert results["command"] == f"ultravox evaluate {folder}"


def test_options_reach_the_evaluation(run, tmp_path, capsys):
    folder, data, seen = run
    words = ["evaluate", str(folder), "--data", str(data / "heldout.jsonl"), "--limit", "1", "--fast"]
    assert cli.main([*words, "--batch-size", "3", "--questions", "none", "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (seen["batch_size"], results["wer"]["n"], results["fast"]) == (3, 1, True)
    assert not (folder / "results.json").exists()
    assert "--limit 1 --batch-size 3" in results["command"]


def test_a_part_says_so_and_where_it_is(run, capsys):
    folder, _, _ = run
    assert cli.main(["evaluate", str(folder), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "partial: without 1 of 2 clips\n" in out
    assert str(folder / "evaluations" / "data-heldout-partial" / "results.json") in out
    assert not (folder / "results.json").exists()


def test_a_file_in_the_place_of_the_output_is_one_line_before_anything_runs(run, tmp_path, capsys):
    folder, _, seen = run
    (tmp_path / "out").write_text("mine")
    assert cli.main(["evaluate", str(folder), "--output", str(tmp_path / "out")]) == 2
    message = "there is a file where a folder is needed; choose another place"
    assert capsys.readouterr().err == f"ultravox: error: {tmp_path / 'out'}: {message}\n"
    assert (tmp_path / "out").read_text() == "mine"
    assert seen == {}, "the model was loaded first"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no checkpoint nowhere"),
        (["RUN", "--limit", "0"], "at least 1"),
        (["RUN", "--batch-size", "many"], "got 'many'"),
        (["RUN", "--data", "nothing"], "no dataset nothing"),
        (["RUN", "--split", "other"], "no split 'other'"),
    ],
)
def test_bad_arguments_are_one_line(run, words, message, capsys):
    folder, _, _ = run
    before = set(folder.iterdir())
    assert cli.main(["evaluate", *[str(folder) if word == "RUN" else word for word in words]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("ultravox: error: ")
    assert set(folder.iterdir()) == before
